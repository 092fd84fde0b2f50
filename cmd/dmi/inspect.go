package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"dmi/inspect"

	"github.com/spf13/cobra"
)

func inspectCommand(o *options) *cobra.Command {
	c := &cobra.Command{Use: "inspect", Short: "Find structure: distributions, kinds of attention heads (docs/inspect.md has formulas and sources)",
		Example: "  dmi inspect stats --run r1a2b3c4 --site 'blocks.*.hook_resid_post'\n  dmi inspect heads --run r1a2b3c4 --json"}
	c.AddCommand(inspectStatsCommand(o), inspectHeadsCommand(o), inspectTokensCommand(o), inspectOutliersCommand(o), inspectRouterCommand(o),
		inspectSimilarityCommand(o), inspectCompareCommand(o), inspectLensCommand(o))
	return c
}

// tool is a subcommand that prints the lines of an inspection.
type tool[T any] struct {
	name, short string
	example     string
	head        []string
	row         func(T) []string
	flags       func(c *cobra.Command)
	arguments   func(v url.Values) error
	withoutSite bool // it knows its sites, and takes a layer alone
}

func (t tool[T]) command(o *options) *cobra.Command {
	s := &selection{}
	c := &cobra.Command{Use: t.name, Short: t.short, Example: t.example, Args: cobra.NoArgs, RunE: func(c *cobra.Command, args []string) error {
		r, err := o.reader(c)
		if err != nil {
			return err
		}
		defer r.close()
		if err := s.latest(c, r); err != nil {
			return err
		}
		v := s.arguments(c)
		if t.arguments != nil {
			if err := t.arguments(v); err != nil {
				return err
			}
		}
		return printTool(c, o, r, t.name, v, t.head, t.row)
	}}
	s.register(c, true, !t.withoutSite)
	if t.withoutSite {
		c.Flags().IntVarP(&s.layer, "layer", "l", 0, "layer; negative counts from the last")
		s.layerSet = true
	}
	if t.flags != nil {
		t.flags(c)
	}
	return c
}

// printTool prints what a tool finds, and on a terminal how far it has come.
func printTool[T any](c *cobra.Command, o *options, r *reader, name string, v url.Values, head []string, row func(T) []string) error {
	said := waiting{out: c.ErrOrStderr(), begun: time.Now()}
	defer said.clear()
	return printItems(c, o, 0, head, row, func(yield func(json.RawMessage) error) error {
		ended := false
		err := r.events(c.Context(), http.MethodGet, "/inspect/"+name, v, func(event string, data []byte) error {
			switch event {
			case "progress":
				var p inspect.State
				if err := json.Unmarshal(data, &p); err != nil {
					return err
				}
				said.say(name, p)
			case "items":
				var items []json.RawMessage
				if err := json.Unmarshal(data, &items); err != nil {
					return err
				}
				said.clear()
				for _, item := range items {
					if err := yield(item); err != nil {
						return err
					}
				}
				said.lines += len(items)
			case "error":
				failed := &answerError{}
				if err := json.Unmarshal(data, &failed.Body); err != nil {
					return err
				}
				return failed
			case "result":
				ended = true
			}
			return nil
		})
		if err == nil && !ended {
			err = fmt.Errorf("inspect %s: the engine ended before it was done; run it again", name)
		}
		return err
	})
}

// waiting is a line on a terminal that says, after a second, how far work has come.
type waiting struct {
	out   io.Writer
	begun time.Time
	lines int // that have come
	stood bool
}

func (w *waiting) say(what string, p inspect.State) {
	if took := time.Since(w.begun); took >= time.Second && isTerminal(w.out) {
		w.stood = true
		fmt.Fprintf(w.out, "\r%s: %s, %d %% (%s), %d s, %s lines so far\x1b[K", what, p.Stage, int(100*p.Share), humanBytes(p.Bytes), int(took.Seconds()), humanCount(w.lines))
	}
}

func (w *waiting) clear() {
	if w.stood {
		w.stood = false
		fmt.Fprint(w.out, "\r\x1b[K")
	}
}

func figure(n inspect.Number) string {
	v := float64(n)
	return humanNumber(&v)
}

func textOf(v *string) string {
	if v == nil {
		return "-"
	}
	return *v
}

func numberOf(v *int) string {
	if v == nil {
		return "-"
	}
	return strconv.Itoa(*v)
}

func setNumber(v url.Values, name string, n int) {
	if n != 0 {
		v.Set(name, strconv.Itoa(n))
	}
}

func setFraction(v url.Values, name string, n float64) {
	if n != 0 {
		v.Set(name, strconv.FormatFloat(n, 'g', -1, 64))
	}
}

func inspectStatsCommand(o *options) *cobra.Command {
	var per, tokens string
	return tool[inspect.StatsRow]{name: "stats", short: "The distribution of each site: figures, quantiles, growth of the norm; with --json histograms too",
		head: []string{"request", "site", "rows", "mean", "std", "min", "p01", "p50", "p99", "max", "norm", "growth", "nonfinite", "missing"},
		row: func(l inspect.StatsRow) []string {
			return []string{textOf(l.Request), l.Site, humanCount(l.Rows), figure(l.Mean), figure(l.Std), figure(l.Min), figure(l.P01), figure(l.P50), figure(l.P99), figure(l.Max),
				figure(l.Norm), figure(l.Growth), humanCount(l.NonFinite), humanCount(l.Missing)}
		},
		flags: func(c *cobra.Command) {
			c.Flags().StringVar(&per, "per", "site", "site, or request")
			c.Flags().StringVarP(&tokens, "tokens", "t", "", "positions A:B, half-open; negative ones count from the end")
		},
		arguments: func(v url.Values) error {
			set(v, "per", per)
			set(v, "tokens", tokens)
			return nil
		}}.command(o)
}

func inspectHeadsCommand(o *options) *cobra.Command {
	var period int
	var threshold float64
	return tool[inspect.HeadRow]{name: "heads", short: "The kind of each attention head: previous-token, induction, duplicate-token, first-token-sink or other",
		example: "  dmi inspect heads --run r1a2b3c4     # of a run on repeated random tokens: session.inspect.repeated_tokens() in Python makes one",
		head:    []string{"layer", "head", "kind", "score", "previous", "induction", "duplicate", "first", "queries", "repeats", "missing"},
		row: func(l inspect.HeadRow) []string {
			return []string{numberOf(l.Layer), strconv.Itoa(l.Head), l.Kind, figure(l.Score), figure(l.Previous), figure(l.Induction), figure(l.Duplicate), figure(l.First),
				humanCount(l.Queries), humanCount(l.Repeats), humanCount(l.Missing)}
		},
		flags: func(c *cobra.Command) {
			c.Flags().IntVar(&period, "period", 0, "the prompts repeat themselves every so many tokens (default: found from their ids)")
			c.Flags().Float64Var(&threshold, "threshold", 0, fmt.Sprintf("least score of a kind (default %v)", inspect.DefaultThreshold))
		},
		arguments: func(v url.Values) error {
			setNumber(v, "period", period)
			setFraction(v, "threshold", threshold)
			return nil
		}}.command(o)
}

func inspectTokensCommand(o *options) *cobra.Command {
	var tokens string
	var k int
	return tool[inspect.TokenRow]{name: "tokens", short: "Every token: id, norms through the layers, what it attends to most, how much attention it receives",
		head: []string{"request", "position", "token", "first norm", "last norm", "received", "attends to"},
		row: func(l inspect.TokenRow) []string {
			token, first, last := "-", "-", "-"
			if l.Token != nil {
				token = strconv.FormatInt(*l.Token, 10)
			}
			if n := len(l.Norms); n > 0 {
				first, last = figure(l.Norms[0].L2), figure(l.Norms[n-1].L2)
			}
			var attends []string
			for _, a := range l.Attends {
				attends = append(attends, fmt.Sprintf("%d (%.3g)", a.Position, a.Weight))
			}
			return []string{l.Request, strconv.Itoa(l.Position), token, first, last, figure(l.Received), strings.Join(attends, " ")}
		},
		flags: func(c *cobra.Command) {
			c.Flags().StringVarP(&tokens, "tokens", "t", "", "positions A:B, half-open; negative ones count from the end")
			c.Flags().IntVar(&k, "top", 3, "attended tokens to list")
		},
		arguments: func(v url.Values) error {
			set(v, "tokens", tokens)
			v.Set("k", strconv.Itoa(k))
			return nil
		}}.command(o)
}

func inspectOutliersCommand(o *options) *cobra.Command {
	var threshold, share, tolerance float64
	return tool[inspect.OutlierRow]{name: "outliers", short: "Dimensions that stand out: massive activations, outliers, dead neurons",
		head: []string{"site", "dim", "kind", "rows", "mean", "std", "rms", "absmax", "share", "ratio", "nonfinite", "missing"},
		row: func(l inspect.OutlierRow) []string {
			return []string{l.Site, strconv.Itoa(l.Dim), l.Kind, humanCount(l.Rows), figure(l.Mean), figure(l.Std), figure(l.RMS), figure(l.AbsMax), figure(l.Share), figure(l.Ratio),
				humanCount(l.NonFinite), humanCount(l.Missing)}
		},
		flags: func(c *cobra.Command) {
			c.Flags().Float64Var(&threshold, "threshold", 0, "magnitude of an outlier (default 6)")
			c.Flags().Float64Var(&share, "share", 0, "share of rows in which a dimension has to reach it (default 0.06)")
			c.Flags().Float64Var(&tolerance, "tolerance", 0, "magnitude up to which a dimension counts as dead")
		},
		arguments: func(v url.Values) error {
			setFraction(v, "threshold", threshold)
			setFraction(v, "share", share)
			setFraction(v, "tolerance", tolerance)
			return nil
		}}.command(o)
}

func inspectRouterCommand(o *options) *cobra.Command {
	return tool[inspect.RouterRow]{name: "router", short: "How the experts of a mixture share the tokens", withoutSite: true,
		head: []string{"layer", "expert", "tokens", "share", "load", "probability", "balance", "missing"},
		row: func(l inspect.RouterRow) []string {
			return []string{numberOf(l.Layer), strconv.Itoa(l.Expert), humanCount(l.Tokens), figure(l.Share), figure(l.Load), figure(l.Probability), figure(l.Balance), humanCount(l.Missing)}
		}}.command(o)
}

func inspectSimilarityCommand(o *options) *cobra.Command {
	var tokens string
	var sample int
	return tool[inspect.SimilarityRow]{name: "similarity", short: "How alike sites are, each with each: cosine of a token's rows, and linear CKA",
		head: []string{"a", "b", "cosine", "cka", "rows", "sampled", "nonfinite"},
		row: func(l inspect.SimilarityRow) []string {
			return []string{l.SiteA, l.SiteB, figure(l.Cosine), figure(l.CKA), humanCount(l.Rows), humanCount(l.Sampled), humanCount(l.NonFinite)}
		},
		flags: func(c *cobra.Command) {
			c.Flags().StringVarP(&tokens, "tokens", "t", "", "positions A:B, half-open; negative ones count from the end")
			c.Flags().IntVar(&sample, "sample", 0, "rows that CKA is computed of (default 512)")
		},
		arguments: func(v url.Values) error {
			set(v, "tokens", tokens)
			setNumber(v, "sample", sample)
			return nil
		}}.command(o)
}

func inspectCompareCommand(o *options) *cobra.Command {
	s := &selection{}
	var per, tokens string
	var tolerance float64
	c := &cobra.Command{Use: "compare A B", Short: "Where two requests part, by site and token; or two runs, request by request", Args: cobra.ExactArgs(2),
		Example: "  dmi inspect compare r1a2b3c4.0 r5d6e7f8.0 --site 'blocks.*.hook_resid_post' --tolerance 0.01",
		RunE: func(c *cobra.Command, args []string) error {
			r, err := o.reader(c)
			if err != nil {
				return err
			}
			defer r.close()
			v := s.arguments(c)
			v.Set("a", args[0])
			v.Set("b", args[1])
			v.Set("per", per)
			set(v, "tokens", tokens)
			setFraction(v, "tolerance", tolerance)
			return printTool(c, o, r, "compare", v, []string{"a", "b", "site", "position", "rows", "differ", "first", "max abs", "relative", "cosine", "mismatched", "missing in a", "in b"}, func(l inspect.CompareRow) []string {
				return []string{l.A, l.B, l.Site, numberOf(l.Position), humanCount(l.Rows), humanCount(l.Differ), numberOf(l.First), figure(l.MaxAbs), figure(l.Relative), figure(l.Cosine),
					humanCount(l.Mismatched), humanCount(l.MissingA), humanCount(l.MissingB)}
			})
		}}
	c.Flags().StringVarP(&s.site, "site", "s", "", "site: a name, an alias, its end (resid_post), or a glob")
	c.Flags().IntVarP(&s.layer, "layer", "l", 0, "layer; negative counts from the last")
	s.layerSet = true
	c.Flags().StringVar(&per, "per", "site", "site, or row: a line per token")
	c.Flags().StringVarP(&tokens, "tokens", "t", "", "positions A:B, half-open; negative ones count from the end")
	c.Flags().Float64Var(&tolerance, "tolerance", 0, "relative difference up to which rows are called the same")
	return c
}

func inspectLensCommand(o *options) *cobra.Command {
	var tokens string
	var k int
	return tool[inspect.LensRow]{name: "lens", short: "Logit lens: what the model would predict if it stopped after each layer",
		example: "  dmi inspect lens --request r1a2b3c4.0 --tokens -1:     # a column: every layer at the last token",
		head:    []string{"request", "site", "position", "top", "entropy", "next", "rank", "probability"},
		row: func(l inspect.LensRow) []string {
			var top []string
			for _, c := range l.Top {
				top = append(top, fmt.Sprintf("%s (%.3g)", tokenName(int64(c.Token), c.Text), c.Probability))
			}
			next := "-"
			if l.Next != nil {
				next = tokenName(*l.Next, l.NextText)
			}
			return []string{l.Request, l.Site, strconv.Itoa(l.Position), strings.Join(top, " "), figure(l.Entropy), next, numberOf(l.NextRank), figure(l.NextProb)}
		},
		flags: func(c *cobra.Command) {
			c.Flags().StringVarP(&tokens, "tokens", "t", "", "positions A:B, half-open; negative ones count from the end")
			c.Flags().IntVar(&k, "top", 5, "candidates to list")
		},
		arguments: func(v url.Values) error {
			set(v, "tokens", tokens)
			v.Set("k", strconv.Itoa(k))
			return nil
		}}.command(o)
}

// tokenName is what a token is written as, else its id.
func tokenName(id int64, text *string) string {
	if text == nil {
		return strconv.FormatInt(id, 10)
	}
	return strconv.Quote(*text)
}
