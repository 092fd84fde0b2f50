package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strconv"
	"time"
)

// notifySupervisor tells systemd how the engine is, where it runs as a unit of Type=notify (sd_notify(3): one datagram to $NOTIFY_SOCKET).
func notifySupervisor(state string, log *slog.Logger) {
	name := os.Getenv("NOTIFY_SOCKET") // one that begins with @ is abstract; package net knows
	if name == "" {
		return
	}
	connection, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: name, Net: "unixgram"})
	if err == nil {
		_, err = connection.Write([]byte(state))
		connection.Close()
	}
	if err != nil {
		log.Warn("the supervisor was not told; it may take the engine for one that does not start, or that hangs", "socket", name, "error", err)
	}
}

// watchdogInterval is how long the supervisor waits for a sign of life before it kills the engine (sd_watchdog_enabled(3)); 0: it does not.
func watchdogInterval() time.Duration {
	if pid := os.Getenv("WATCHDOG_PID"); pid != "" && pid != strconv.Itoa(os.Getpid()) {
		return 0
	}
	microseconds, err := strconv.ParseUint(os.Getenv("WATCHDOG_USEC"), 10, 40)
	if err != nil {
		return 0
	}
	return time.Duration(microseconds) * time.Microsecond
}

// feedWatchdog gives signs of life until ctx ends: each only after the readers' own socket answered /healthz. That needs no disk, on purpose: a disk that
// hangs is not healed by killing the engine, which would only lose what waits in memory.
func feedWatchdog(ctx context.Context, socket string, log *slog.Logger) error {
	within := watchdogInterval()
	if within == 0 {
		return nil
	}
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
	client := http.Client{Transport: transport, Timeout: within / 3}
	tick := time.NewTicker(within / 3)
	defer tick.Stop()
	for {
		if err := healthy(ctx, &client); err == nil {
			notifySupervisor("WATCHDOG=1", log)
		} else if ctx.Err() == nil {
			log.Warn("the engine does not answer itself; unless it does soon the supervisor ends it", "within", within, "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func healthy(ctx context.Context, client *http.Client) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://localhost/healthz", nil)
	if err != nil {
		return err
	}
	answer, err := client.Do(request)
	if err != nil {
		return err
	}
	answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("/healthz: %s", answer.Status)
	}
	return nil
}
