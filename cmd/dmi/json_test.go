//go:build linux

package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// Every command prints JSON, a value or a line each, where it is asked for it: none is added without a line here.
func TestEveryCommandPrintsJSON(t *testing.T) {
	dir, sample := sampleStore(t)
	first, second := sample.Requests[0].ID, sample.Requests[1].ID
	policy := filepath.Join(t.TempDir(), "policy.yaml")
	if err := os.WriteFile(policy, []byte("default: full\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	pattern := " -r " + first + " -s pattern"
	arguments := map[string][]string{
		"runs": {""}, "requests": {"", first}, "ls": {""}, "coverage": {"-r " + first}, "stats": {"-r " + first}, "topk": {"-r " + first + " -s resid_post"},
		"get": {pattern, pattern + " -o " + filepath.Join(t.TempDir(), "a.npy")}, "verify": {""}, "top": {"--once"}, "tail": {"--events --count 1"}, "config": {""}, "version": {""},
		"policy set": {policy}, "policy get": {""}, "policy explain": {"-r " + first}, "policy off": {""}, "policy on": {""}, "policy watch": {"--count 1"},
		"inspect stats": {"-r " + first}, "inspect heads": {pattern}, "inspect tokens": {"-r " + first + " -s resid_post"}, "inspect outliers": {"-r " + first},
		"inspect similarity": {"-r " + first}, "inspect compare": {first + " " + second + " -s tokens"},
		"delete": {"--tag nobody"}, "compact": {""}, "repair": {""}, // the last two need the store for themselves
		"inspect lens": nil, "inspect router": nil, // need a model: python/tests/test_inspect.py
		"serve": nil, // prints one line of JSON in any case: every test that starts an engine reads it
		"ui":    nil, // TestPageOverAStore
	}
	var commands []string
	var walk func(c *cobra.Command, path string)
	walk = func(c *cobra.Command, path string) {
		for _, sub := range c.Commands() {
			name := strings.TrimSpace(path + " " + sub.Name())
			if sub.HasSubCommands() {
				walk(sub, name)
			} else {
				commands = append(commands, name)
			}
		}
	}
	walk(newCommand(), "")
	order := append(commands, "compact", "repair")
	e := mustStart(t, dir)
	for i, name := range order {
		lines, ok := arguments[name]
		if !ok {
			t.Errorf("dmi %s: say here how it is called", name)
		}
		if i < len(commands) && (name == "compact" || name == "repair") {
			continue
		}
		if i == len(commands) {
			e.end(t)
		}
		for _, line := range lines {
			text := mustDMI(t, append(append(strings.Fields(name), strings.Fields(line)...), "--json", "--store", dir)...)
			values := json.NewDecoder(strings.NewReader(text))
			count := 0
			for ; values.More(); count++ {
				var value any
				if err := values.Decode(&value); err != nil {
					t.Errorf("dmi %s %s --json: %v\n%s", name, line, err, text)
					break
				}
				switch value.(type) {
				case map[string]any, []any:
				default:
					t.Errorf("dmi %s %s --json: %T is neither an object nor a list", name, line, value)
				}
			}
			if count == 0 {
				t.Errorf("dmi %s %s --json prints nothing", name, line)
			}
		}
	}
}
