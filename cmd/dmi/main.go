// Command dmi is the engine and the command line of Deep Model Inspection: `dmi serve` captures, the other subcommands ask.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
)

// Exit codes, part of the interface.
const (
	exitFailure    = 1 // also: `dmi verify` found problems
	exitUsage      = 2
	exitNotFound   = 3 // no such request, site, run or session
	exitIncomplete = 4 // rows asked for are not all there
	exitStore      = 5 // the store cannot be opened: unreadable, newer, or another engine's
	exitAddress    = 6 // a socket or port cannot be listened on
)

// exitError is an error that knows its exit code.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

// exitCode says how a command ended.
func exitCode(err error) int {
	var known *exitError
	var answer *answerError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &known):
		return known.code
	case errors.As(err, &answer):
		switch answer.status {
		case 400:
			return exitUsage
		case 404:
			return exitNotFound
		case 409:
			return exitIncomplete
		}
	}
	if strings.HasPrefix(err.Error(), "unknown command") { // cobra has no type for it
		return exitUsage
	}
	return exitFailure
}

// released is set by the linker (-X main.released=v1.2.3); without it the module's own version counts.
var released string

func version() string {
	if released != "" {
		return released
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}

// revision is the commit that the binary was built from, with "+" where the tree had changes, or "".
func revision() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	text, changed := "", ""
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			text = s.Value
		case s.Key == "vcs.modified" && s.Value == "true":
			changed = "+"
		}
	}
	if text == "" {
		return ""
	}
	return text + changed
}

// usage makes cobra's own complaints about flags and arguments exit with exitUsage.
func usage(err error) error {
	if err == nil {
		return nil
	}
	return &exitError{exitUsage, err}
}

// options are the flags that every subcommand has.
type options struct {
	store, config, engine string
	json                  bool
	set                   []string
}

func newCommand() *cobra.Command {
	o := &options{}
	root := &cobra.Command{
		Use:   "dmi",
		Short: "See inside a language model while it runs",
		Long: "dmi serve captures what models attached to it compute. The other commands ask about a store: the engine that owns it, if it runs, else they read it themselves.\n\n" +
			"Exit codes: 1 failure, or verify found problems; 2 wrong usage; 3 no such request, site, run or session; 4 rows asked for are not all there;\n" +
			"5 the store cannot be opened; 6 a socket or port cannot be listened on.",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	flags := root.PersistentFlags()
	flags.StringVar(&o.store, "store", "", "the store's folder (default $DMI_STORE, or captures)")
	flags.StringVar(&o.config, "config", "", "YAML configuration file (default STORE/dmi.yaml, where there is one)")
	flags.StringArrayVar(&o.set, "set", nil, "set a configuration key: --set store.buffer_mib=512 (repeatable; `dmi config` lists the keys)")
	flags.StringVar(&o.engine, "engine", "", "ask this engine, not the store's: unix:PATH or http(s)://HOST:PORT, with the token in $DMI_TOKEN")
	flags.BoolVar(&o.json, "json", false, "print JSON, for programs")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usage(err) })
	root.AddCommand(serveCommand(o), runsCommand(o), requestsCommand(o), lsCommand(o), coverageCommand(o), statsCommand(o), topkCommand(o), getCommand(o), inspectCommand(o), tailCommand(o),
		policyCommand(o), verifyCommand(o), repairCommand(o), compactCommand(o), deleteCommand(o), topCommand(o), uiCommand(o), configCommand(o), versionCommand(o))
	strictUsage(root)
	return root
}

// strictUsage has every subcommand's complaint about its arguments exit with exitUsage.
func strictUsage(parent *cobra.Command) {
	for _, c := range parent.Commands() {
		if args := c.Args; args != nil {
			c.Args = func(c *cobra.Command, given []string) error { return usage(args(c, given)) }
		}
		strictUsage(c)
	}
}

// effective loads the configuration as a subcommand's flags have it.
func (o *options) effective(c *cobra.Command, named map[string]string) (*effective, error) {
	flags, err := o.flagSource(c, named)
	if err != nil {
		return nil, err
	}
	e, err := loadConfig(o.config, os.Environ(), flags)
	if err != nil {
		return nil, usage(err)
	}
	return e, nil
}

// reader opens what answers for the store that the flags name.
func (o *options) reader(c *cobra.Command) (*reader, error) {
	e, err := o.effective(c, nil)
	if err != nil {
		return nil, err
	}
	return openReader(c.Context(), e.Store.Path, o.engine)
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	err := newCommand().ExecuteContext(ctx)
	if err != nil && !errors.Is(err, errQuiet) && !(errors.Is(err, context.Canceled) && ctx.Err() != nil) {
		fmt.Fprintln(os.Stderr, "dmi:", err)
	}
	stop()
	os.Exit(exitCode(err))
}

// errQuiet ends a command that has said everything already.
var errQuiet = errors.New("")
