package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"dmi/policy"
	"dmi/steer"

	"github.com/spf13/cobra"
)

func policyCommand(o *options) *cobra.Command {
	c := &cobra.Command{Use: "policy", Short: "Choose what is captured, while models run: rules, the brake, what is in force and why",
		Long: "A policy is a YAML document (docs/format/policy.md). It takes effect at the next step of every model attached.", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() }}
	c.AddCommand(policyGet(o), policySet(o), policyExplain(o), policyWatch(o),
		policyBrake(o, "off", "The brake: stop all capturing at the next step"), policyBrake(o, "on", "Release the brake: the policy decides again"))
	return c
}

// asking runs a question against whoever answers for the store; an engine that is starting will.
func asking(o *options, c *cobra.Command, ask func(r *reader) error) error {
	if e, err := o.effective(c, nil); err == nil && o.engine == "" {
		awaitOwner(c.Context(), e.Store.Path, c.ErrOrStderr())
	}
	r, err := o.reader(c)
	if err != nil {
		return err
	}
	defer r.close()
	return ask(r)
}

func policyGet(o *options) *cobra.Command {
	revision, text := "", false
	c := &cobra.Command{Use: "get", Short: "The policy in force, or that of a revision that coverage names", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return asking(o, c, func(r *reader) error {
				v := url.Values{}
				set(v, "revision", revision)
				var s steer.Status
				if err := r.get(c.Context(), "/policy", v, &s); err != nil {
					return err
				}
				if text {
					_, err := io.WriteString(c.OutOrStdout(), s.Revision.Text)
					return err
				}
				return printPolicy(o, c.OutOrStdout(), s)
			})
		}}
	c.Flags().StringVar(&revision, "revision", "", "of this revision, not the one in force")
	c.Flags().BoolVar(&text, "text", false, "the document alone, as it was set")
	return c
}

func printPolicy(o *options, out io.Writer, s steer.Status) error {
	if o.json {
		return json.NewEncoder(out).Encode(s)
	}
	r := s.Revision
	fmt.Fprintf(out, "revision %d", r.Number)
	if !r.Time.IsZero() {
		fmt.Fprintf(out, ", %s: %s", r.Time.Local().Format(time.DateTime), r.Why)
	}
	if r.Off {
		fmt.Fprint(out, "\nthe brake is on: nothing is captured; dmi policy on releases it")
	}
	fmt.Fprintln(out)
	t := newTable(out, "rule", "level", "in force", "priority", "sites", "bytes/s")
	for i, rule := range s.Rules {
		bytes, priority := "?", strconv.Itoa(rule.Priority)
		if rule.Bytes != nil {
			bytes = humanBytes(uint64(*rule.Bytes))
		}
		if i == len(s.Rules)-1 {
			priority = "lowest"
		}
		t.row(rule.Name, rule.Level, rule.InForce, priority, strconv.Itoa(rule.Sites), bytes)
	}
	if err := t.flush(); err != nil {
		return err
	}
	if len(s.Triggers) > 0 {
		fmt.Fprintln(out)
		t = newTable(out, "trigger", "when", "rows", "fired")
		for _, trigger := range s.Triggers {
			t.row(trigger.Name, trigger.When, strconv.FormatUint(trigger.Rows, 10), strconv.FormatUint(trigger.Fired, 10))
		}
		if err := t.flush(); err != nil {
			return err
		}
	}
	for _, budget := range s.Unheld {
		fmt.Fprintf(out, "budget %s\n", budget)
	}
	for _, p := range r.Promoted {
		fmt.Fprintf(out, "request %s is promoted by %s\n", p.ID, p.Trigger)
	}
	if text := strings.TrimSpace(r.Text); text != "" {
		fmt.Fprintf(out, "\n%s\n", text)
	}
	return nil
}

func policySet(o *options) *cobra.Command {
	return &cobra.Command{Use: "set FILE", Short: "Put a document into force; - is the standard input", Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			in := c.InOrStdin()
			if args[0] != "-" {
				file, err := os.Open(args[0])
				if err != nil {
					return usage(fmt.Errorf("policy set: %w", err))
				}
				defer file.Close()
				in = file
			}
			text, err := io.ReadAll(io.LimitReader(in, policy.MaxBytes+1))
			if err != nil {
				return fmt.Errorf("policy set: read %s: %w", args[0], err)
			}
			return asking(o, c, func(r *reader) error {
				return changePolicy(c.Context(), o, c.OutOrStdout(), r, http.MethodPut, "/policy", text)
			})
		}}
}

func policyBrake(o *options, name, short string) *cobra.Command {
	return &cobra.Command{Use: name, Short: short, Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return asking(o, c, func(r *reader) error {
				return changePolicy(c.Context(), o, c.OutOrStdout(), r, http.MethodPost, "/policy/"+name, nil)
			})
		}}
}

func changePolicy(ctx context.Context, o *options, out io.Writer, r *reader, method, path string, body []byte) error {
	answer, err := r.send(ctx, method, path, nil, body, "")
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	var s steer.Status
	if err := json.NewDecoder(answer.Body).Decode(&s); err != nil {
		return fmt.Errorf("read the engine's answer to %s: %w", path, err)
	}
	return printPolicy(o, out, s)
}

func policyExplain(o *options) *cobra.Command {
	var request, site, position, phase string
	c := &cobra.Command{Use: "explain", Short: "Which rule decides about a token's rows, and what it costs a second at the current traffic", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return asking(o, c, func(r *reader) error {
				v := url.Values{}
				set(v, "request", request)
				set(v, "site", site)
				set(v, "position", position)
				set(v, "phase", phase)
				out := c.OutOrStdout()
				var t *table
				if !o.json {
					t = newTable(out, "site", "rule", "level", "captured", "bytes/s", "why")
				}
				err := r.list(c.Context(), "/policy/explain", v, func(raw json.RawMessage) error {
					if o.json {
						_, err := fmt.Fprintf(out, "%s\n", raw)
						return err
					}
					var line steer.Verdict
					if err := json.Unmarshal(raw, &line); err != nil {
						return err
					}
					captured, bytes := "no", "?"
					if line.Captured {
						captured = "yes"
					}
					if line.Bytes != nil {
						bytes = humanBytes(uint64(*line.Bytes))
					}
					t.row(line.Site, line.Rule, line.Level, captured, bytes, line.Why)
					return nil
				})
				if t != nil && err == nil {
					err = t.flush()
				}
				return err
			})
		}}
	f := c.Flags()
	f.StringVarP(&request, "request", "r", "", "the request whose token is asked about (needed)")
	f.StringVarP(&site, "site", "s", "", "sites: a name, an alias, its end, or a glob (default all)")
	f.StringVarP(&position, "position", "p", "", "position of the token in its request (default 0)")
	f.StringVar(&phase, "phase", "", "prefill or decode (default: what the position is)")
	return c
}

func policyWatch(o *options) *cobra.Command {
	count := 0
	c := &cobra.Command{Use: "watch", Short: "What the policy and its triggers do, as it happens", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			err := asking(o, c, func(r *reader) error {
				return tailEvents(c, o, r, count, func(code string) bool { return code == "policy" || code == "trigger" || code == "governor" })
			})
			if err == errEnough {
				return nil
			}
			return err
		}}
	c.Flags().IntVarP(&count, "count", "n", 0, "end after so many lines")
	return c
}
