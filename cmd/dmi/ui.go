package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync/atomic"
	"time"

	"dmi/serve"
	"dmi/web"

	"github.com/spf13/cobra"
	"golang.org/x/net/netutil"
)

// pageDoor is what `dmi ui` prints with --json, a line.
type pageDoor struct {
	Address string `json:"address"` // with the token in its fragment, which browsers send to nobody
	Base    string `json:"base"`
	Token   string `json:"token"`
	Store   string `json:"store"`
	PID     int    `json:"pid"`
}

func uiCommand(o *options) *cobra.Command {
	var address string
	var unused time.Duration
	readyFD := -1
	c := &cobra.Command{
		Use:   "ui [STORE]",
		Short: "Open the page: look inside a store, or inside a model that runs",
		Long: "Serves the page and what it asks for on loopback, and prints its address. The address holds a token made for this run of the command: it may read tensors and\n" +
			"prompts, and change nothing. While an engine captures into the store the page is live; otherwise it shows what was stored. Ends with Ctrl-C.",
		Example: "  dmi ui captures/\n  dmi ui captures/ --http 127.0.0.1:8080",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, given []string) error {
			if err := o.name(c, given); err != nil {
				return err
			}
			config, err := o.effective(c, nil)
			if err != nil {
				return err
			}
			if unused < 0 {
				return usage(fmt.Errorf("ui: --end-when-unused %v: say how long, or 0 for never", unused))
			}
			api := newReaderHandler(config.Store.Path, o.engine)
			defer api.close()
			if err := api.check(c.Context()); err != nil { // a store that cannot be opened is said here, not in the page
				return err
			}
			if readyFD >= 0 {
				if err := openReady("ui", readyFD); err != nil {
					return err
				}
			}
			return servePage(c.Context(), address, unused, api, func(d pageDoor) error {
				d.Store = absolute(config.Store.Path)
				switch {
				case readyFD >= 0:
					return sayReady(d)
				case o.json:
					return json.NewEncoder(c.OutOrStdout()).Encode(d)
				}
				if !web.Built() {
					fmt.Fprintln(os.Stderr, "dmi: the page was not built into this program (make setup builds it, with Node 20.19 or newer): the address serves the HTTP API alone")
				}
				_, err := fmt.Fprintf(c.OutOrStdout(), "%s\n(whoever has this address can read the store %s; Ctrl-C ends it)\n", d.Address, d.Store)
				return err
			})
		},
	}
	f := c.Flags()
	f.StringVar(&address, "http", "127.0.0.1:0", "HOST:PORT to serve on; a loopback address")
	f.DurationVar(&unused, "end-when-unused", 0, "end after so long without a question from the page; 0: never")
	f.IntVar(&readyFD, "ready-fd", -1, "write a line of JSON with the address to this file descriptor, and close it")
	return c
}

// servePage serves the page over api until ctx ends, or nobody has asked for as long as unused says.
func servePage(ctx context.Context, address string, unused time.Duration, api http.Handler, ready func(pageDoor) error) error {
	host, _, err := net.SplitHostPort(address)
	if ip := net.ParseIP(host); err != nil || host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return usage(fmt.Errorf("ui: --http %s: say a loopback address and a port, as 127.0.0.1:8080; to let others in, run `dmi serve --http` with TLS", address))
	}
	var random [24]byte
	rand.Read(random[:])
	token := hex.EncodeToString(random[:])
	tokens := &serve.Tokens{}
	if err := tokens.Add(token, serve.ScopeText, "page"); err != nil {
		return err
	}
	l, err := listenTCP(address, "--http")
	if err != nil {
		return err
	}
	var used atomic.Int64
	var busy atomic.Int32
	used.Store(time.Now().UnixNano())
	handler := withPage(serve.Forward(&serve.Gate{Tokens: tokens}, api), nil)
	server := &http.Server{ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 128 << 10,
		ErrorLog: slog.NewLogLogger(slog.NewTextHandler(os.Stderr, nil), slog.LevelWarn),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			busy.Add(1)
			defer func() {
				used.Store(time.Now().UnixNano())
				busy.Add(-1)
			}()
			handler.ServeHTTP(w, r)
		})}
	base := "http://" + l.Addr().String()
	if err := ready(pageDoor{Address: base + "/#token=" + token, Base: base, Token: token, PID: os.Getpid()}); err != nil {
		l.Close()
		return fmt.Errorf("ui: say where the page is: %w", err)
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(netutil.LimitListener(l, 1024)) }()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case err := <-served:
			return fmt.Errorf("ui: serve on %s: %w", base, err)
		case <-ctx.Done():
		case <-tick.C:
			if unused == 0 || busy.Load() > 0 || time.Since(time.Unix(0, used.Load())) < unused {
				continue
			}
		}
		_ = server.Close() // readers of a page that ends have nothing to finish
		<-served
		return nil
	}
}

// withPage puts the page in front of an API.
func withPage(api http.Handler, embedders []string) http.Handler {
	mux := http.NewServeMux()
	page := web.Handler(embedders)
	mux.Handle("/{$}", page)
	mux.Handle("/assets/", page)
	mux.Handle("/", api)
	return mux
}
