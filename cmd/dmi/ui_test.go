//go:build linux

package main

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
)

// A page over a store: its own files for everybody, the rest for its token alone, and that token reads and changes nothing. It finds the engine when one
// comes, and reads by itself when that has gone.
func TestPageOverAStore(t *testing.T) {
	dir, sample := sampleStore(t)
	api := newReaderHandler(dir, "")
	defer api.close()
	if err := api.check(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	doors, ended := make(chan pageDoor, 1), make(chan error, 1)
	go func() {
		ended <- servePage(ctx, "127.0.0.1:0", 0, api, func(d pageDoor) error { doors <- d; return nil })
	}()
	door := <-doors
	client := &http.Client{Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	ask := func(method, path, token string, header ...string) (int, string, http.Header) {
		request, err := http.NewRequest(method, door.Base+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if token != "" {
			request.Header.Set("Authorization", "Bearer "+token)
		}
		if len(header) == 2 && header[0] == "Host" {
			request.Host = header[1]
		} else if len(header) == 2 {
			request.Header.Set(header[0], header[1])
		}
		answer, err := client.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		text, err := io.ReadAll(answer.Body)
		if err != nil {
			t.Fatal(err)
		}
		return answer.StatusCode, string(text), answer.Header
	}
	if strings.Contains(door.Base, door.Token) || door.Address != door.Base+"/#token="+door.Token {
		t.Errorf("address %s: the token belongs in the fragment, and only there", door.Address)
	}
	if status, text, header := ask("GET", "/", ""); status != 200 || !strings.Contains(text, "<title>DMI") || !strings.Contains(header.Get("Content-Security-Policy"), "default-src 'none'") {
		t.Errorf("the page: %d %s %v", status, text, header)
	}
	id := sample.Requests[0].ID
	for _, c := range []struct {
		method, path, token string
		header              []string
		status              int
	}{
		{"GET", "/v1/status", "", nil, 401}, {"GET", "/v1/status", strings.Repeat("x", 32), nil, 401}, {"GET", "/v1/status", door.Token, nil, 200},
		{"GET", "/v1/status", door.Token, []string{"Host", "evil.example"}, 403}, {"GET", "/v1/status", door.Token, []string{"Origin", "https://evil.example"}, 403},
		{"GET", "/v1/status", door.Token, []string{"Origin", door.Base}, 200}, {"GET", "/v1/requests/" + id, door.Token, nil, 200},
		{"GET", "/v1/config", door.Token, nil, 403}, {"POST", "/v1/flush", door.Token, nil, 403}, {"POST", "/v1/verify", door.Token, nil, 403},
		{"GET", "/healthz", "", nil, 200}, {"GET", "/v1/nothing", door.Token, nil, 404}, {"GET", "/assets/none.js", "", nil, 404},
	} {
		if status, text, _ := ask(c.method, c.path, c.token, c.header...); status != c.status {
			t.Errorf("%s %s with token %q and %v: %d, want %d: %s", c.method, c.path, c.token, c.header, status, c.status, text)
		}
	}
	if _, text, _ := ask("GET", "/v1/requests/"+id, door.Token); !strings.Contains(text, "The capital of France") {
		t.Errorf("the prompt is not shown: %s", text)
	}

	engineOf := func() (id string, readOnly bool) {
		_, text, _ := ask("GET", "/v1/status", door.Token)
		var status struct {
			Engine struct {
				ID       string `json:"id"`
				ReadOnly bool   `json:"read_only"`
			} `json:"engine"`
		}
		if err := json.Unmarshal([]byte(text), &status); err != nil {
			t.Fatalf("%v: %s", err, text)
		}
		return status.Engine.ID, status.Engine.ReadOnly
	}
	if _, readOnly := engineOf(); !readOnly {
		t.Error("nobody captures, and the page says that it is live")
	}
	live := mustStart(t, dir)
	if found, readOnly := engineOf(); readOnly || !strings.HasPrefix(found, "e") {
		t.Errorf("with an engine: %s, read only %v", found, readOnly)
	}
	live.end(t)
	if _, readOnly := engineOf(); !readOnly {
		t.Error("the engine has gone, and the page still says that it is live")
	}
	client.CloseIdleConnections()
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestPageEndsWhenNobodyLooks(t *testing.T) {
	dir, _ := sampleStore(t)
	api := newReaderHandler(dir, "")
	defer api.close()
	started := time.Now()
	if err := servePage(t.Context(), "localhost:0", time.Second, api, func(pageDoor) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(started); took < time.Second || took > patience {
		t.Errorf("ended after %v", took)
	}
}

func TestPagesThatCannotBe(t *testing.T) {
	dir, _ := sampleStore(t)
	for _, c := range []struct {
		arguments []string
		code      int
		says      string
	}{
		{[]string{"ui", dir, "--http", "0.0.0.0:0"}, exitUsage, "loopback"}, {[]string{"ui", dir, "--store", "other"}, exitUsage, "named twice"},
		{[]string{"ui", dir + "/none"}, exitStore, "none"}, {[]string{"ui", dir, "--end-when-unused", "-1s"}, exitUsage, "how long"}, {[]string{"ui", dir, "--ready-fd", "987"}, exitUsage, "987"},
	} {
		if _, text, code := dmi(t, c.arguments...); code != c.code || !strings.Contains(text, c.says) {
			t.Errorf("dmi %v: exit %d, want %d: %s", c.arguments, code, c.code, text)
		}
	}
}
