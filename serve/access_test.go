package serve

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func tokenOf(s Scope) string { return "token-of-scope-" + s.String() }

func gate(t *testing.T) *Gate {
	tokens := &Tokens{}
	for s := ScopeStatistics; s <= ScopeAdmin; s++ {
		if err := tokens.Add(tokenOf(s), s, "reader-"+s.String()); err != nil {
			t.Fatal(err)
		}
	}
	return &Gate{Tokens: tokens, Hosts: []string{"gpu7.example"}, Origins: []string{"https://notebook.example"}}
}

// Every scope against every route, arguments left out: whoever may not is told so with 403 before anything is looked at.
func TestEveryScopeAtEveryRoute(t *testing.T) {
	server := newWorld(t).server
	handler := server.Remote(gate(t))
	for _, r := range server.routes() {
		if r.stream || r.path == "/v1/verify" {
			continue // they answer until one leaves; the document's test calls them
		}
		for s := NoScope; s <= ScopeAdmin; s++ {
			request := httptest.NewRequest(r.method, "http://localhost"+strings.ReplaceAll(r.path, "{id}", "none"), nil)
			if s != NoScope {
				request.Header.Set("Authorization", "Bearer "+tokenOf(s))
			}
			answer := httptest.NewRecorder()
			handler.ServeHTTP(answer, request)
			refused := answer.Code == http.StatusUnauthorized || answer.Code == http.StatusForbidden
			want := 0
			switch {
			case r.open:
			case s == NoScope:
				want = http.StatusUnauthorized
			case s < r.scope:
				want = http.StatusForbidden
			}
			if want != 0 && answer.Code != want || want == 0 && refused {
				t.Errorf("%s %s with scope %s: %d", r.method, r.path, s, answer.Code)
			}
		}
	}
}

func TestGate(t *testing.T) {
	server := newWorld(t).server
	handler := server.Remote(gate(t))
	good := "Bearer " + tokenOf(ScopeAdmin)
	for _, c := range []struct {
		what, host, origin, token string
		status                    int
		code                      string
	}{
		{"as it should be", "localhost:8000", "", good, 200, ""},
		{"by address", "127.0.0.1:8000", "", good, 200, ""},
		{"by IPv6 address", "[::1]:8000", "", good, 200, ""},
		{"by a configured name", "GPU7.example:443", "", good, 200, ""},
		{"by a name that resolves to loopback", "evil.example:8000", "", good, 403, "host"},
		{"by a name like ours", "localhost.evil.example", "", good, 403, "host"},
		{"by another machine's address", "10.0.0.7:8000", "", good, 403, "host"},
		{"by the address that it came to", "10.0.0.8:8000", "", good, 200, ""},
		{"no host", "", "", good, 403, "host"},
		{"own page", "localhost:8000", "http://localhost:8000", good, 200, ""},
		{"configured page", "localhost:8000", "https://notebook.example", good, 200, ""},
		{"own host, another port", "localhost:8000", "http://localhost:9000", good, 403, "origin"},
		{"foreign page", "localhost:8000", "https://evil.example", good, 403, "origin"},
		{"sandboxed page", "localhost:8000", "null", good, 403, "origin"},
		{"no token", "localhost", "", "", 401, "token"},
		{"wrong token", "localhost", "", "Bearer " + strings.Repeat("x", 24), 401, "token"},
		{"beginning of a token", "localhost", "", good[:len(good)-1], 401, "token"},
		{"token and more", "localhost", "", good + "x", 401, "token"},
		{"empty bearer", "localhost", "", "Bearer ", 401, "token"},
		{"basic", "localhost", "", "Basic " + tokenOf(ScopeAdmin), 401, "token"},
		{"in lower case", "localhost", "", "Bearer " + strings.ToUpper(tokenOf(ScopeAdmin)), 401, "token"},
	} {
		request := httptest.NewRequest("GET", "/v1/openapi.json", nil)
		request.Host = c.host
		if c.origin != "" {
			request.Header.Set("Origin", c.origin)
		}
		if c.token != "" {
			request.Header.Set("Authorization", c.token)
		}
		// The connection came to 10.0.0.8.
		request = request.WithContext(context.WithValue(request.Context(), http.LocalAddrContextKey, &net.TCPAddr{IP: net.IPv4(10, 0, 0, 8), Port: 8000}))
		answer := httptest.NewRecorder()
		handler.ServeHTTP(answer, request)
		if code := errorCode(answer.Body); answer.Code != c.status || code != c.code {
			t.Errorf("%s: %d %q, want %d %q", c.what, answer.Code, code, c.status, c.code)
		}
	}
}

func errorCode(body io.Reader) string {
	var failed struct {
		Error struct{ Code, Message, Hint string }
	}
	_ = json.NewDecoder(body).Decode(&failed)
	return failed.Error.Code
}

func TestTokenFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "token")
	first, err := AdminToken(path)
	if err != nil || len(first) != 48 {
		t.Fatalf("%q %v", first, err)
	}
	if info, _ := os.Stat(path); info.Mode().Perm() != 0o600 {
		t.Errorf("mode %#o", info.Mode().Perm())
	}
	if again, err := AdminToken(path); err != nil || again != first {
		t.Errorf("a second start has another token: %v", err)
	}
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := AdminToken(path); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("a file that others read: %v", err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	os.Chmod(path, 0o600)
	if _, err := AdminToken(path); err == nil || !strings.Contains(err.Error(), "empty") {
		t.Errorf("an empty file: %v", err)
	}
}

func TestTokensFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tokens")
	write := func(text string) { os.WriteFile(path, []byte(text), 0o600) }
	write("# for the dashboard\nstatistics " + strings.Repeat("a", 20) + "\n\ntext   " + strings.Repeat("b", 20) + "  eve@lab\n")
	tokens := &Tokens{}
	if err := tokens.ReadTokens(path); err != nil {
		t.Fatal(err)
	}
	unnamed := sha256.Sum256([]byte(strings.Repeat("a", 20)))
	want := []caller{{ScopeStatistics, fmt.Sprintf("sha256:%x", unnamed[:4])}, {ScopeText, "eve@lab"}, {}, {}}
	if got := []caller{tokens.find(strings.Repeat("a", 20)), tokens.find(strings.Repeat("b", 20)), tokens.find(strings.Repeat("c", 20)), tokens.find("")}; !slices.Equal(got, want) {
		t.Errorf("callers %v, want %v", got, want)
	}
	for _, bad := range []string{"root " + strings.Repeat("a", 20), "admin short", "admin", "none " + strings.Repeat("a", 20), "admin " + strings.Repeat("a", 20) + " x y",
		"admin " + strings.Repeat("a", 20) + " na/me"} {
		write(bad)
		if err := new(Tokens).ReadTokens(path); err == nil || !strings.Contains(err.Error(), "line 1") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// A prompt must not come out by any door for those who may not see it: ids in a request, in a tensor, in statistics, in a file's metadata.
func TestPromptsNeedTheirScope(t *testing.T) {
	w := newWorld(t)
	handler := w.server.Remote(gate(t))
	ask := func(scope Scope, path string) (int, string) {
		request := httptest.NewRequest("GET", "http://localhost/v1"+path, nil)
		request.Header.Set("Authorization", "Bearer "+tokenOf(scope))
		answer := httptest.NewRecorder()
		handler.ServeHTTP(answer, request)
		return answer.Code, answer.Body.String()
	}
	id := w.requests[0].ID
	secret := fmt.Sprint(w.requests[0].Tokens[0])
	for _, path := range []string{"/requests/" + id, "/tensor?site=tokens&request=" + id, "/rows?site=tokens&request=" + id, "/stats?site=tokens&per=row&request=" + id,
		"/stats?per=row&request=" + id, "/export?request=" + id + "&site=*", "/sites?request=" + id, "/coverage?request=" + id} {
		if status, body := ask(ScopeText, path); status != 200 {
			t.Errorf("%s with scope text: %d %s", path, status, body)
		}
		status, body := ask(ScopeTensors, path)
		if strings.Contains(body, secret) || strings.Contains(body, w.requests[0].Text) || strings.Contains(body, `"tokens"`) && status == 200 {
			t.Errorf("%s with scope tensors tells the prompt: %d %s", path, status, body)
		}
	}
	if _, body := ask(ScopeText, "/requests/"+id); !strings.Contains(body, secret) || !strings.Contains(body, w.requests[0].Text) {
		t.Errorf("scope text does not see the prompt: %s", body)
	}
}
