package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"dmi/serve"
	"dmi/store"

	"github.com/spf13/cobra"
)

func deleteCommand(o *options) *cobra.Command {
	var requests []string
	var tag, before string
	c := &cobra.Command{
		Use:   "delete",
		Short: "Remove what is kept of requests: rows, token ids and text; the books say since when they are gone",
		Long: "Removes what is kept of requests for good, without asking again: rows, token ids and text, from every file of the store. The books stay, and say since when the rows\n" +
			"are gone; so do ids, labels and tags. Cut off, it leaves a part: run it again. `dmi requests` shows what a tag names.",
		Example: "  dmi delete --request r1a2b3c4.0 --request r1a2b3c4.1\n  dmi delete --tag trial\n  dmi delete --before 30d            # begun more than 30 days ago\n  dmi delete --tag trial --before 2026-05-01",
		Args:    cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if len(requests) == 0 && tag == "" && before == "" || len(requests) > 0 && (tag != "" || before != "") {
				return usage(fmt.Errorf("delete: name requests with --request, or all of a kind with --tag or --before, or both"))
			}
			v := url.Values{"request": requests}
			set(v, "tag", tag)
			if before != "" {
				t, err := parseBefore(before, time.Now())
				if err != nil {
					return usage(err)
				}
				v.Set("before", strconv.FormatInt(t.UnixNano(), 10))
			}
			r, err := o.writer(c)
			if err != nil {
				return err
			}
			defer r.close()
			return runDelete(c, o, r, v)
		},
	}
	c.Flags().StringArrayVarP(&requests, "request", "r", nil, "request id (repeatable)")
	c.Flags().StringVar(&tag, "tag", "", "requests with this tag")
	c.Flags().StringVar(&before, "before", "", "requests that began before then: an age (36h, 30d), a day (2026-05-01) or a time (2026-05-01T12:00:00Z)")
	return c
}

// parseBefore reads a moment that has passed: so long ago, a day's beginning here, or a time.
func parseBefore(text string, now time.Time) (time.Time, error) {
	t, err := time.Parse(time.RFC3339, text)
	if err != nil {
		t, err = time.ParseInLocation(time.DateOnly, text, time.Local)
	}
	if err != nil {
		var age time.Duration
		if days, is := strings.CutSuffix(text, "d"); is {
			var n uint64
			if n, err = strconv.ParseUint(days, 10, 16); err == nil {
				age = time.Duration(n) * 24 * time.Hour
			}
		} else {
			age, err = time.ParseDuration(text)
		}
		t = now.Add(-age)
	}
	if err != nil || t.After(now) || t.UnixNano() <= 0 {
		return time.Time{}, fmt.Errorf("delete: --before %q: say an age (36h, 30d), a day (2026-05-01) or a time (2026-05-01T12:00:00Z) that has passed", text)
	}
	return t, nil
}

// writer opens what may change the store that the flags name: the engine that owns it, else this process, for as long as it takes.
func (o *options) writer(c *cobra.Command) (*reader, error) {
	r, err := o.reader(c) // which says what is wrong with a store that cannot be read
	if err != nil || o.engine != "" || r.live != nil {
		return r, err
	}
	r.close()
	e, err := o.effective(c, nil)
	if err != nil {
		return nil, err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	s, err := store.Open(e.Store.Path, e.storeOptions(func(level, code, message string) {
		if level != "info" {
			log.Log(context.Background(), logLevel(level), message, "code", code)
		}
	}))
	if err != nil {
		return nil, &exitError{exitStore, err}
	}
	server := serve.New(serve.Options{Identity: serve.Identity{ID: "in-process", Version: version(), Revision: revision(), Store: absolute(e.Store.Path), Started: time.Now()}, Store: s,
		Config: []configLine{}, Log: log})
	return &reader{http: &http.Client{Transport: serve.InProcess(server.Local())}, base: "http://in-process", close: func() {
		server.Stop()
		if err := s.Close(); err != nil {
			fmt.Fprintln(os.Stderr, "dmi:", err)
		}
	}}, nil
}

func runDelete(c *cobra.Command, o *options, r *reader, v url.Values) error {
	var result json.RawMessage
	err := r.events(c.Context(), http.MethodPost, "/delete", v, func(name string, data []byte) error {
		switch name {
		case "progress":
			var p store.DeletionProgress
			if err := json.Unmarshal(data, &p); err != nil {
				return err
			}
			if !o.json && isTerminal(c.ErrOrStderr()) {
				fmt.Fprintf(c.ErrOrStderr(), "\r%d of %d segments, %d of %d manifest files, %s rows deleted ", p.Segments, p.SegmentsTotal, p.ManifestFiles, p.ManifestTotal, humanCount(p.Rows))
			}
		case "error":
			var failed answerError
			if err := json.Unmarshal(data, &failed.Body); err != nil {
				return err
			}
			return &failed
		case "result":
			result = append(result, data...)
		}
		return nil
	})
	if !o.json && isTerminal(c.ErrOrStderr()) {
		fmt.Fprint(c.ErrOrStderr(), "\r\x1b[K")
	}
	if err != nil {
		return err
	}
	if result == nil {
		return fmt.Errorf("delete: the engine ended before it was done: a part is deleted; run it again")
	}
	if o.json {
		return printJSON(c, result)
	}
	var d store.Deletion
	if err := json.Unmarshal(result, &d); err != nil {
		return err
	}
	fmt.Fprintf(c.OutOrStdout(), "%d requests: %s rows, %s, deleted from %d segments; token ids or text of %d requests removed\n", d.Requests, humanCount(d.Rows), humanBytes(d.Bytes), d.Segments, d.Prompts)
	if d.Active > 0 {
		fmt.Fprintf(c.OutOrStdout(), "%d of them go on: what comes of them from now on is captured\n", d.Active)
	}
	return nil
}
