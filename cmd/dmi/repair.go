package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"time"

	"dmi/store"

	"github.com/spf13/cobra"
)

func repairCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "repair [STORE]",
		Short: "Make a store's catalogue anew from its manifest and segments; exit code 1 if some of it is damaged",
		Long: "Makes the catalogue of a store anew, from its manifest and segments, and says what of them is damaged; the rest is served. No engine may have the store open.\n" +
			"It changes nothing else, and can be run again at any time; `dmi verify` then checks every byte.",
		Example: "  dmi repair captures/\n  dmi repair captures/ --json",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, given []string) error {
			if err := o.name(c, given); err != nil {
				return err
			}
			e, err := o.effective(c, nil)
			if err != nil {
				return err
			}
			log := slog.New(slog.NewTextHandler(os.Stderr, nil))
			settings := e.storeOptions(func(level, code, message string) {
				if level != "info" && code != "damaged" && code != "catalogue_rebuilt" { // the report has those
					log.Log(context.Background(), logLevel(level), message, "code", code)
				}
			})
			settings.FS = diskOf(e.Store.Path)
			report, err := store.Repair(e.Store.Path, settings, o.repairProgress(c))
			if !o.json && isTerminal(c.ErrOrStderr()) {
				fmt.Fprint(c.ErrOrStderr(), "\r\x1b[K")
			}
			if err != nil {
				return &exitError{exitStore, err}
			}
			return o.repaired(c, &report)
		},
	}
}

// name takes a store that is named by itself, without --store.
func (o *options) name(c *cobra.Command, given []string) error {
	if len(given) == 1 {
		if o.store != "" && o.store != given[0] {
			return usage(fmt.Errorf("%s: the store is named twice, %s and --store %s: name it once", c.Name(), given[0], o.store))
		}
		o.store = given[0]
	}
	return nil
}

func (o *options) repairProgress(c *cobra.Command) func(store.Progress) {
	if o.json || !isTerminal(c.ErrOrStderr()) {
		return nil
	}
	var shown time.Time
	return func(p store.Progress) {
		if now := time.Now(); now.Sub(shown) > 100*time.Millisecond {
			shown = now
			fmt.Fprintf(c.ErrOrStderr(), "\r%5.1f %%  %s of %s ", 100*float64(p.Done)/float64(max(1, p.Total)), humanBytes(p.Done), humanBytes(p.Total))
		}
	}
}

func (o *options) repaired(c *cobra.Command, report *store.Report) error {
	out := c.OutOrStdout()
	if o.json {
		if report.Problems == nil {
			report.Problems = []store.Problem{}
		}
		if err := printJSON(c, report); err != nil {
			return err
		}
	} else {
		fmt.Fprintf(out, "the catalogue is made anew from %d segments with %s chunks and %d manifest files\n", report.Segments, humanCount(report.Chunks), report.ManifestFiles)
		fmt.Fprintf(out, "%s rows produced, %s on the books\n", humanCount(report.Produced), humanCount(report.Booked))
		for _, p := range report.Problems {
			fmt.Fprintf(out, "PROBLEM %s at %d: %s\n", p.File, p.Offset, p.What)
		}
		if len(report.Problems) > 0 {
			fmt.Fprintln(out, "the catalogue before is kept as catalogue.sqlite.old; `dmi verify` gives the extent of the damage")
		}
	}
	if len(report.Problems) > 0 {
		return &exitError{exitFailure, errQuiet}
	}
	return nil
}
