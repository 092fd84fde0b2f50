package web

import (
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

func TestThePageIsServedUnderAStrictPolicy(t *testing.T) {
	handler := Handler([]string{"https://notebooks.example"})
	answer := httptest.NewRecorder()
	handler.ServeHTTP(answer, httptest.NewRequest("GET", "/", nil))
	if answer.Code != 200 || !strings.HasPrefix(answer.Header().Get("Content-Type"), "text/html") {
		t.Fatalf("GET /: %d %v", answer.Code, answer.Header())
	}
	security := answer.Header().Get("Content-Security-Policy")
	for _, want := range []string{"default-src 'none'", "script-src 'self'", "frame-ancestors 'self' https://notebooks.example"} {
		if !strings.Contains(security, want) {
			t.Errorf("policy %q lacks %q", security, want)
		}
	}
	if strings.Contains(security, "unsafe") {
		t.Errorf("policy %q allows what is inline", security)
	}
	if Built() == strings.Contains(answer.Body.String(), "was not built") {
		t.Errorf("built: %v, but the page says %s", Built(), answer.Body)
	}
	again := httptest.NewRequest("GET", "/", nil)
	again.Header.Set("If-None-Match", answer.Header().Get("ETag"))
	same := httptest.NewRecorder()
	handler.ServeHTTP(same, again)
	if same.Code != 304 || same.Body.Len() != 0 {
		t.Errorf("asked again: %d with %d bytes", same.Code, same.Body.Len())
	}
	for _, name := range regexp.MustCompile(`(?:src|href)="([^"]*)"`).FindAllStringSubmatch(answer.Body.String(), -1) {
		part := httptest.NewRecorder()
		handler.ServeHTTP(part, httptest.NewRequest("GET", name[1], nil))
		if !strings.HasPrefix(name[1], "/assets/") || part.Code != 200 {
			t.Errorf("the page asks for %s: %d; it may only ask for its own files", name[1], part.Code)
		}
	}
	for method, path := range map[string]string{"GET": "/../web.go", "POST": "/"} {
		refused := httptest.NewRecorder()
		handler.ServeHTTP(refused, httptest.NewRequest(method, path, nil))
		if refused.Code < 400 {
			t.Errorf("%s %s: %d", method, path, refused.Code)
		}
	}
}

// The lock file must work with any registry, and pin everything.
func TestLockFileNamesNoAddress(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("package-lock.json"))
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(text), `"resolved"`) || strings.Contains(string(text), "http") && regexp.MustCompile(`"https?://[^"]*\.tgz"`).Match(text) {
		t.Error("package-lock.json names download addresses: make it again with npm install --omit-lockfile-registry-resolved")
	}
	if !strings.Contains(string(text), `"integrity": "sha512-`) {
		t.Error("package-lock.json pins nothing")
	}
}
