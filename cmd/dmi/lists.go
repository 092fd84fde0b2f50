package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"dmi/query"

	"github.com/spf13/cobra"
)

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

// selection is the flags that say what is asked about.
type selection struct {
	requests     []string
	run, session string
	site         string
	layer        int
	layerSet     bool
}

func (s *selection) register(c *cobra.Command, requests, site bool) {
	f := c.Flags()
	if requests {
		f.StringArrayVarP(&s.requests, "request", "r", nil, "request id (repeatable)")
	}
	f.StringVar(&s.run, "run", "", "run id")
	f.StringVar(&s.session, "session", "", "session id")
	if site {
		f.StringVarP(&s.site, "site", "s", "", "site: a name, an alias, its end (resid_post), or a glob (blocks.*.hook_resid_post)")
		f.IntVarP(&s.layer, "layer", "l", 0, "layer; negative counts from the last")
		s.layerSet = true
	}
}

// arguments is the selection as the API takes it.
func (s *selection) arguments(c *cobra.Command) url.Values {
	v := url.Values{}
	for _, r := range s.requests {
		v.Add("request", r)
	}
	set(v, "run", s.run)
	set(v, "session", s.session)
	set(v, "site", s.site)
	if s.layerSet && c.Flags().Changed("layer") {
		v.Set("layer", strconv.Itoa(s.layer))
	}
	return v
}

func set(v url.Values, name, value string) {
	if value != "" {
		v.Set(name, value)
	}
}

// latest fills an empty selection with the latest request or session: what people who just ran something mean.
func (s *selection) latest(c *cobra.Command, r *reader) error {
	if len(s.requests) > 0 || s.run != "" || s.session != "" {
		return nil
	}
	var page struct{ Items []query.RequestInfo }
	if err := r.get(c.Context(), "/requests", url.Values{"latest": {"1"}}, &page); err != nil {
		return err
	}
	if len(page.Items) == 0 {
		return &exitError{exitNotFound, fmt.Errorf("the store has no requests yet; attach a model and run it")}
	}
	s.requests = []string{page.Items[0].ID}
	fmt.Fprintf(c.ErrOrStderr(), "request %s (the latest; --request, --run or --session name others)\n", page.Items[0].ID)
	return nil
}

// printList prints a list as a table, or as a JSON array.
func printList[T any](c *cobra.Command, o *options, r *reader, path string, arguments url.Values, limit int, head []string, row func(T) []string) error {
	return printItems(c, o, limit, head, row, func(yield func(json.RawMessage) error) error { return r.list(c.Context(), path, arguments, yield) })
}

// printItems prints what each gives it, as printList does.
func printItems[T any](c *cobra.Command, o *options, limit int, head []string, row func(T) []string, each func(yield func(json.RawMessage) error) error) error {
	printed := 0
	separator := "[\n  "
	t := newTable(c.OutOrStdout(), head...)
	stop := fmt.Errorf("enough")
	err := each(func(item json.RawMessage) error {
		if limit > 0 && printed == limit {
			return stop
		}
		printed++
		if o.json {
			_, err := fmt.Fprintf(c.OutOrStdout(), "%s%s", separator, item)
			separator = ",\n  "
			return err
		}
		var info T
		if err := json.Unmarshal(item, &info); err != nil {
			return err
		}
		t.row(row(info)...)
		return nil
	})
	if err != nil && err != stop {
		return err
	}
	if o.json {
		if printed == 0 {
			fmt.Fprint(c.OutOrStdout(), "[")
		}
		_, err := fmt.Fprintln(c.OutOrStdout(), "\n]")
		return err
	}
	if printed == 0 {
		fmt.Fprintln(c.ErrOrStderr(), "none")
	}
	return t.flush()
}

func addLabels(v url.Values, labels []string, tag string) {
	for _, l := range labels {
		v.Add("label", l)
	}
	set(v, "tag", tag)
}

func runsCommand(o *options) *cobra.Command {
	var session, tag string
	var labels []string
	var limit int
	c := &cobra.Command{Use: "runs", Short: "List runs", Args: cobra.NoArgs, RunE: func(c *cobra.Command, _ []string) error {
		r, err := o.reader(c)
		if err != nil {
			return err
		}
		defer r.close()
		v := url.Values{}
		set(v, "session", session)
		addLabels(v, labels, tag)
		return printList(c, o, r, "/runs", v, limit, []string{"run", "session", "began", "ended", "requests", "rows", "bytes", "labels"}, func(i query.RunInfo) []string {
			return []string{i.ID, i.Session, humanTime(i.Begun), humanTime(i.Ended), humanCount(i.Requests), humanCount(i.Rows), humanBytes(i.Bytes), humanLabels(i.Labels, i.Tags)}
		})
	}}
	c.Flags().StringVar(&session, "session", "", "of this session")
	c.Flags().StringVar(&tag, "tag", "", "with this tag")
	c.Flags().StringArrayVar(&labels, "label", nil, "with this label, KEY=VALUE (repeatable)")
	c.Flags().IntVar(&limit, "limit", 0, "at most so many")
	return c
}

func requestsCommand(o *options) *cobra.Command {
	var run, session, tag string
	var labels []string
	var latest, limit int
	var hidden bool
	c := &cobra.Command{Use: "requests [ID]", Short: "List requests, or show one with its tokens and text", Args: cobra.MaximumNArgs(1), RunE: func(c *cobra.Command, args []string) error {
		r, err := o.reader(c)
		if err != nil {
			return err
		}
		defer r.close()
		if len(args) == 1 {
			return showRequest(c, o, r, args[0])
		}
		v := url.Values{}
		set(v, "run", run)
		set(v, "session", session)
		addLabels(v, labels, tag)
		if latest > 0 {
			v.Set("latest", strconv.Itoa(latest))
		}
		if hidden {
			v.Set("hidden", "true")
		}
		return printList(c, o, r, "/requests", v, limit, []string{"request", "run", "began", "ended", "positions", "rows", "bytes", "labels"}, func(i query.RequestInfo) []string {
			ended := humanTime(i.Ended)
			if i.Reason != "" && i.Reason != "finished" {
				ended += " " + i.Reason
			}
			return []string{i.ID, i.Run, humanTime(i.Begun), ended, humanCount(i.Positions), humanCount(i.Rows), humanBytes(i.Bytes), humanLabels(i.Labels, i.Tags)}
		})
	}}
	f := c.Flags()
	f.StringVar(&run, "run", "", "of this run")
	f.StringVar(&session, "session", "", "of this session")
	f.StringVar(&tag, "tag", "", "with this tag")
	f.StringArrayVar(&labels, "label", nil, "with this label, KEY=VALUE (repeatable)")
	f.IntVarP(&latest, "latest", "n", 0, "the latest so many")
	f.BoolVar(&hidden, "hidden", false, "hidden ones too (slots of a beam search)")
	f.IntVar(&limit, "limit", 0, "at most so many")
	return c
}

func showRequest(c *cobra.Command, o *options, r *reader, id string) error {
	var info query.RequestInfo
	if err := r.get(c.Context(), "/requests/"+url.PathEscape(id), nil, &info); err != nil {
		return err
	}
	if o.json {
		return printJSON(c, info)
	}
	t := newTable(c.OutOrStdout())
	t.row("request", info.ID)
	t.row("run", dash(info.Run))
	t.row("session", info.Session)
	t.row("labels", dash(humanLabels(info.Labels, info.Tags)))
	t.row("began", humanTime(info.Begun))
	t.row("ended", strings.TrimSpace(humanTime(info.Ended)+" "+info.Reason))
	t.row("positions", humanCount(info.Positions))
	t.row("captured", humanCount(info.Rows)+" rows, "+humanBytes(info.Bytes))
	if len(info.Tokens) > 0 {
		t.row("tokens", strings.Trim(fmt.Sprint(info.Tokens), "[]"))
	}
	if info.Text != "" {
		t.row("text", strconv.Quote(info.Text))
	}
	for _, p := range info.Path {
		t.row("path", fmt.Sprintf("positions %d:%d are those of %s", p.First, p.First+p.Count, p.Request))
	}
	return t.flush()
}

func lsCommand(o *options) *cobra.Command {
	s := &selection{}
	c := &cobra.Command{Use: "ls", Short: "List the sites of a request, run or session, with what is there of each", Args: cobra.NoArgs, RunE: func(c *cobra.Command, _ []string) error {
		r, err := o.reader(c)
		if err != nil {
			return err
		}
		defer r.close()
		if err := s.latest(c, r); err != nil {
			return err
		}
		return printList(c, o, r, "/sites", s.arguments(c), 0, []string{"site", "dtype", "row shape", "rows", "bytes", "aliases"}, func(i query.SiteInfo) []string {
			shape := strings.Trim(strings.ReplaceAll(fmt.Sprint(i.RowShape), " ", "x"), "[]")
			return []string{i.Name, dash(i.DType), dash(strings.ReplaceAll(shape, "-1", "keys")), humanCount(i.Rows), humanBytes(i.Bytes), strings.Join(i.Aliases, " ")}
		})
	}}
	s.register(c, true, true)
	return c
}

func coverageCommand(o *options) *cobra.Command {
	s := &selection{}
	var whole bool
	c := &cobra.Command{Use: "coverage", Short: "Say what became of every row: of requests (with ranges), a run, a session, or the whole store", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			r, err := o.reader(c)
			if err != nil {
				return err
			}
			defer r.close()
			if !whole {
				if err := s.latest(c, r); err != nil {
					return err
				}
			}
			var coverage query.Coverage
			if err := r.get(c.Context(), "/coverage", s.arguments(c), &coverage); err != nil {
				return err
			}
			if o.json {
				return printJSON(c, coverage)
			}
			if err := printOutcomes(c, &coverage); err != nil || len(coverage.Ranges) == 0 {
				return err
			}
			t := newTable(c.OutOrStdout(), "site", "positions", "outcome", "policy", "attempt")
			for _, g := range coverage.Ranges {
				positions := fmt.Sprintf("%d:%d", g.First, g.First+g.Count*g.Stride)
				if g.Stride > 1 {
					positions += fmt.Sprintf(":%d", g.Stride)
				}
				outcome := fmt.Sprintf("%s(%s)", g.Outcome, cmp.Or(g.Reason, g.Level))
				if g.Expired != 0 {
					outcome += ", expired " + time.Unix(0, g.Expired).UTC().Format(time.DateTime)
				}
				t.row(g.Site, positions, outcome, strconv.FormatUint(g.Policy, 10), strconv.Itoa(int(g.Attempt)))
			}
			return t.flush()
		}}
	s.register(c, true, true)
	c.Flags().BoolVar(&whole, "all", false, "the whole store")
	return c
}

func printOutcomes(c *cobra.Command, coverage *query.Coverage) error {
	complete := "complete"
	if !coverage.Complete {
		complete = "INCOMPLETE"
	}
	fmt.Fprintf(c.OutOrStdout(), "%s rows, %s\n", humanCount(coverage.Rows), complete)
	t := newTable(c.OutOrStdout(), "outcome", "rows", "share")
	for _, outcome := range sortedKeys(coverage.Outcomes) {
		for _, reason := range sortedKeys(coverage.Outcomes[outcome]) {
			n := coverage.Outcomes[outcome][reason]
			t.row(fmt.Sprintf("%s(%s)", outcome, reason), humanCount(n), fmt.Sprintf("%.4g %%", 100*float64(n)/float64(max(1, coverage.Rows))))
		}
	}
	if n := coverage.Expired; n > 0 {
		t.row("of them expired", humanCount(n), fmt.Sprintf("%.4g %%", 100*float64(n)/float64(max(1, coverage.Rows))))
	}
	if n := coverage.Repeated; n > 0 {
		t.row("of them repeated", humanCount(n), fmt.Sprintf("%.4g %%", 100*float64(n)/float64(max(1, coverage.Rows))))
	}
	return t.flush()
}
