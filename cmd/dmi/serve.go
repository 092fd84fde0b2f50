package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// serveFlags maps flags of `dmi serve` to the keys they set.
var serveFlags = map[string]string{
	"socket": "control.socket", "http-socket": "http.socket", "http": "http.address", "admin": "admin.address", "read-only": "read_only",
	"exit-when-idle": "exit_when_idle", "retain-mib": "store.retain_mib", "retain-age": "store.retain_age_s", "log-level": "log.level", "log-format": "log.format",
}

func serveCommand(o *options) *cobra.Command {
	readyFD := -1
	withStdin := false
	c := &cobra.Command{
		Use:   "serve",
		Short: "Run the engine: take captures in, keep them in a store, answer readers",
		Long: "Runs until it is told to stop (SIGTERM, SIGINT), then stops intake, drains what was published, seals and commits; a second signal ends it at once.\n" +
			"When it is ready it prints one line of JSON: engine_id, pid, control, http_unix, http. The same is in STORE/engine.json while it runs.",
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if o.engine != "" {
				return usage(fmt.Errorf("serve: --engine names another engine; leave it out"))
			}
			config, err := o.effective(c, serveFlags)
			if err != nil {
				return err
			}
			if runtime.GOMAXPROCS(0) == 1 && os.Getenv("GOMAXPROCS") == "" {
				// Go takes a processor away from a goroutine that waits for the disk, but notices up to 10 ms later: an engine pinned to one core would do nothing meanwhile.
				runtime.GOMAXPROCS(2)
			}
			if readyFD >= 0 {
				if err := openReady("serve", readyFD); err != nil {
					return err
				}
			}
			ctx, cancel := context.WithCancelCause(c.Context())
			defer cancel(nil)
			if withStdin {
				go func() { // ends with the process at the latest
					_, _ = io.Copy(io.Discard, os.Stdin)
					cancel(fmt.Errorf("the standard input closed"))
				}()
			}
			return runEngine(ctx, config, newLog(os.Stderr, config.Log), func(a announcement) error {
				say := sayReady
				if readyFD < 0 {
					say = func(a any) error { return json.NewEncoder(c.OutOrStdout()).Encode(a) }
				}
				if err := say(a); err != nil {
					return fmt.Errorf("serve: say that the engine is ready: %w", err)
				}
				return nil
			})
		},
	}
	f := c.Flags()
	f.String("socket", "", "Unix socket for producers (default STORE/engine.sock)")
	f.String("http-socket", "", "Unix socket for readers (default STORE/http.sock; with --read-only a temporary one)")
	f.String("http", "", "HOST:PORT to serve readers on as well; a token is needed there")
	f.String("admin", "", "loopback HOST:PORT for pprof, metrics and health")
	f.Bool("read-only", false, "answer readers only: no lock, nothing is captured")
	f.Bool("exit-when-idle", false, "end once the last session has ended")
	f.Int("retain-mib", 0, "keep so many MiB of segments; the oldest go")
	f.Float64("retain-age", 0, "keep rows for so many seconds, at least")
	f.String("log-level", "", "debug, info, warning or error")
	f.String("log-format", "", "text or json")
	f.IntVar(&readyFD, "ready-fd", -1, "write the line that says it is ready to this file descriptor, and close it")
	f.BoolVar(&withStdin, "exit-with-stdin", false, "end when the standard input closes: for a program that starts an engine of its own")
	return c
}

func newLog(w io.Writer, c LogConfig) *slog.Logger {
	levels := map[string]slog.Level{"debug": slog.LevelDebug, "info": slog.LevelInfo, "warning": slog.LevelWarn, "error": slog.LevelError}
	o := &slog.HandlerOptions{Level: levels[c.Level]}
	if c.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, o))
	}
	return slog.New(slog.NewTextHandler(w, o))
}

// logLevel turns the level of an event into that of a log line.
func logLevel(name string) slog.Level {
	switch strings.ToLower(name) {
	case "error":
		return slog.LevelError
	case "warning", "warn":
		return slog.LevelWarn
	case "debug":
		return slog.LevelDebug
	}
	return slog.LevelInfo
}

func seconds(s float64) time.Duration   { return time.Duration(s * float64(time.Second)) }
func milliseconds(ms int) time.Duration { return time.Duration(ms) * time.Millisecond }
