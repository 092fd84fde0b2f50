package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"dmi/store"

	"github.com/spf13/cobra"
)

func compactCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "compact [STORE]",
		Short: "Rewrite segments in which requests lie scattered, so that reading them takes few reads",
		Long: "Rewrites segments in which requests lie scattered: afterwards each request is in as few segments as hold it, and each of its sites in chunks of up to 16 MiB.\n" +
			"Books and answers stay as they are. An engine does this by itself while nothing comes (store.compact_after_s); this is for a store that no engine has open.\n" +
			"It needs room for four full segments, and can be stopped at any time.",
		Example: "  dmi compact captures/",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, given []string) error {
			if err := o.name(c, given); err != nil {
				return err
			}
			e, err := o.effective(c, nil)
			if err != nil {
				return err
			}
			check, err := openStoreToRead(e.Store.Path) // where there is no store, none is made
			if err != nil {
				return err
			}
			check.Close()
			log := slog.New(slog.NewTextHandler(os.Stderr, nil))
			settings := e.storeOptions(func(level, code, message string) {
				if level != "info" {
					log.Log(context.Background(), logLevel(level), message, "code", code)
				}
			})
			settings.FS, settings.CompactAfter = diskOf(e.Store.Path), 0
			s, err := store.Open(e.Store.Path, settings)
			if errors.Is(err, store.ErrInUse) {
				err = fmt.Errorf("%w; an engine compacts by itself while nothing comes (store.compact_after_s)", err)
			}
			if err != nil {
				return &exitError{exitStore, err}
			}
			done, err := s.Compact(c.Context(), o.compactProgress(c))
			if err = errors.Join(err, s.Close()); err != nil {
				return err
			}
			return o.compacted(c, &done)
		},
	}
}

func (o *options) compactProgress(c *cobra.Command) func(store.CompactionProgress) {
	if o.json || !isTerminal(c.ErrOrStderr()) {
		return nil
	}
	var shown time.Time
	return func(p store.CompactionProgress) {
		if now := time.Now(); now.Sub(shown) > 100*time.Millisecond {
			shown = now
			fmt.Fprintf(c.ErrOrStderr(), "\rpass %d: %s of %s requests, %d segments written anew, %s ", p.Pass, humanCount(p.Requests), humanCount(p.RequestsTotal), p.Segments, humanBytes(p.Bytes))
		}
	}
}

func (o *options) compacted(c *cobra.Command, done *store.Compaction) error {
	if o.json {
		return printJSON(c, done)
	}
	if isTerminal(c.ErrOrStderr()) {
		fmt.Fprint(c.ErrOrStderr(), "\r\x1b[K")
	}
	if done.Segments == 0 {
		fmt.Fprintln(c.OutOrStdout(), "nothing to do: no request takes more reads than it has to")
		return nil
	}
	fmt.Fprintf(c.OutOrStdout(), "%d segments with %s chunks are now %d with %s; %s were written\n", done.Segments, humanCount(done.Chunks), done.Made, humanCount(done.Merged), humanBytes(done.Bytes))
	return nil
}
