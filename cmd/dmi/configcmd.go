package main

import (
	"encoding/json"
	"fmt"
	"runtime"
	"strings"

	"github.com/spf13/cobra"
)

// flagSource is the layer of configuration that flags make: --store, --set, and those in named (flag -> key).
func (o *options) flagSource(c *cobra.Command, named map[string]string) (source, error) {
	layer := source{name: "flags", values: map[string]any{}, each: map[string]string{}}
	for _, pair := range o.set {
		key, value, two := strings.Cut(pair, "=")
		if !two {
			return layer, usage(fmt.Errorf("--set %q: write KEY=VALUE", pair))
		}
		layer.values[key], layer.each[key] = value, "flag --set"
	}
	if o.store != "" {
		layer.values["store.path"], layer.each["store.path"] = o.store, "flag --store"
	}
	for flag, key := range named {
		if f := c.Flags().Lookup(flag); f != nil && f.Changed {
			layer.values[key], layer.each[key] = f.Value.String(), "flag --"+flag
		}
	}
	return layer, nil
}

func configCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "config",
		Short: "Print the effective configuration, and where each value comes from",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			e, err := o.effective(c, nil)
			if err != nil {
				return err
			}
			if o.json {
				return printJSON(c, e.lines())
			}
			t := newTable(c.OutOrStdout(), "key", "value", "from", "what it is")
			for _, l := range e.lines() {
				value, _ := json.Marshal(l.Value)
				t.row(l.Key, strings.Trim(string(value), `"`), l.Origin, l.Help)
			}
			return t.flush()
		},
	}
}

func versionCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if o.json {
				return printJSON(c, map[string]string{"version": version(), "revision": revision(), "go": runtime.Version(), "platform": runtime.GOOS + "/" + runtime.GOARCH})
			}
			_, err := fmt.Fprintln(c.OutOrStdout(), strings.TrimSpace("dmi "+version()+" "+revision()), runtime.Version(), runtime.GOOS+"/"+runtime.GOARCH)
			return err
		},
	}
}
