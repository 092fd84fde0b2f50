package serve

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// Scope is what a token may see; each includes the ones before.
type Scope uint8

const (
	NoScope         Scope = iota
	ScopeStatistics       // numbers about tensors, books, lists; no tensor, no prompt
	ScopeTensors          // tensors, except the ids of prompts
	ScopeText             // prompts, as ids and text
	ScopeAdmin            // configuration, flush, verify, delete
)

var scopeNames = []string{"none", "statistics", "tensors", "text", "admin"}

func (s Scope) String() string { return scopeNames[s] }

// ParseScope is the inverse of String.
func ParseScope(name string) (Scope, error) {
	if i := slices.Index(scopeNames, name); i > 0 {
		return Scope(i), nil
	}
	return NoScope, fmt.Errorf("serve: scope %q: say statistics, tensors, text or admin", name)
}

// Tokens are the secrets that open the door, and how far. Only their hashes are kept.
type Tokens struct {
	hashes  [][sha256.Size]byte
	callers []caller
}

// caller is who asks, as far as the door knows, and how far that reaches.
type caller struct {
	scope Scope
	token string // its name
}

const minTokenBytes = 16

// Add admits a token. Its name is what the record of reads calls it; without one, the beginning of its hash is.
func (t *Tokens) Add(token string, scope Scope, name string) error {
	if len(token) < minTokenBytes || strings.ContainsFunc(token, func(c rune) bool { return c <= ' ' || c > '~' }) {
		return fmt.Errorf("serve: a token of %d bytes: use at least %d printable ASCII characters without blanks", len(token), minTokenBytes)
	}
	hash := sha256.Sum256([]byte(token))
	if name == "" {
		name = "sha256:" + hex.EncodeToString(hash[:4])
	}
	if !tokenName.MatchString(name) {
		return fmt.Errorf("serve: a token is named %.80q: use letters, digits and -_.:@, at most 64", name)
	}
	t.hashes = append(t.hashes, hash)
	t.callers = append(t.callers, caller{scope, name})
	return nil
}

var tokenName = regexp.MustCompile(`^[A-Za-z0-9_.:@-]{1,64}$`)

// find says whose a token is, and how far it reaches. Its time depends on neither the token nor what it matches.
func (t *Tokens) find(token string) caller {
	given := sha256.Sum256([]byte(token))
	found := 0
	for i := range t.hashes {
		found = subtle.ConstantTimeSelect(subtle.ConstantTimeCompare(given[:], t.hashes[i][:]), i+1, found)
	}
	if found == 0 {
		return caller{}
	}
	return t.callers[found-1]
}

// AdminToken reads the store's own token, or makes one on the first start. Readers of the same user find it by themselves.
func AdminToken(path string) (string, error) {
	token, err := readSecret(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return strings.TrimSpace(token), err
	}
	var random [24]byte
	rand.Read(random[:])
	token = hex.EncodeToString(random[:])
	// Written whole under another name first: whoever reads the file while it is being made sees all of it or nothing.
	temporary, err := os.CreateTemp(filepath.Dir(path), ".token-*") // 0600
	if err != nil {
		return "", fmt.Errorf("serve: make the token file %s: %w", path, err)
	}
	_, err = temporary.WriteString(token + "\n")
	err = errors.Join(err, temporary.Close())
	if err == nil {
		err = os.Rename(temporary.Name(), path)
	}
	if err != nil {
		os.Remove(temporary.Name())
		return "", fmt.Errorf("serve: make the token file %s: %w", path, err)
	}
	return token, nil
}

// ReadTokens adds the tokens of a file: a line each, "SCOPE TOKEN" or "SCOPE TOKEN NAME"; blank lines and those that start with # are skipped.
func (t *Tokens) ReadTokens(path string) error {
	text, err := readSecret(path)
	if err != nil {
		return err
	}
	for i, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		fields := append(strings.Fields(line), "") // the name may be left out
		if len(fields) != 3 && len(fields) != 4 {
			return fmt.Errorf("serve: token file %s, line %d: write SCOPE, TOKEN and, if you like, a NAME for the record of reads, with blanks between them", path, i+1)
		}
		scope, err := ParseScope(fields[0])
		if err == nil {
			err = t.Add(fields[1], scope, fields[2])
		}
		if err != nil {
			return fmt.Errorf("serve: token file %s, line %d: %w", path, i+1, err)
		}
	}
	return nil
}

func readSecret(path string) (string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return "", fmt.Errorf("serve: token file: %w", err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return "", fmt.Errorf("serve: token file %s has mode %#o: others can read it; run chmod 600 on it, and replace the token", path, info.Mode().Perm())
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("serve: token file: %w", err)
	}
	if strings.TrimSpace(string(text)) == "" {
		return "", fmt.Errorf("serve: token file %s is empty; delete it and a new token is made at the next start", path)
	}
	return string(text), nil
}

// Gate is what a request over TCP must pass.
type Gate struct {
	Tokens  *Tokens
	Hosts   []string // names that this server may be called by, besides loopback's
	Origins []string // of pages that may call, besides its own: "https://host:port"
}

// admit says who asks and how far that reaches, or refuses a request.
func (g *Gate) admit(r *http.Request) (caller, *failure) {
	if !g.hostKnown(r) {
		return caller{}, &failure{http.StatusForbidden, "host", fmt.Sprintf("%s %s: this server is not called %q", r.Method, r.URL.Path, r.Host),
			"use localhost, or add the name to http.hosts", nil}
	}
	if origin := r.Header.Get("Origin"); origin != "" && !g.originKnown(origin, r.Host) {
		return caller{}, &failure{http.StatusForbidden, "origin", fmt.Sprintf("%s %s: pages of %q may not call this server", r.Method, r.URL.Path, origin),
			"add the origin to http.origins", nil}
	}
	token, bearer := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !bearer {
		return caller{}, &failure{http.StatusUnauthorized, "token", fmt.Sprintf("%s %s: no token was sent", r.Method, r.URL.Path),
			"send Authorization: Bearer TOKEN; the engine's own is in the file `token` of its store", nil}
	}
	who := g.Tokens.find(token)
	if who.scope == NoScope {
		return caller{}, &failure{http.StatusUnauthorized, "token", fmt.Sprintf("%s %s: the token is not one of this engine's", r.Method, r.URL.Path),
			"the engine's own is in the file `token` of its store", nil}
	}
	return who, nil
}

// hostKnown keeps pages of other sites from reaching a server through a name of theirs (DNS rebinding): known are loopback, the
// very address that the connection came to, and configured names.
func (g *Gate) hostKnown(r *http.Request) bool {
	name := r.Host
	if h, _, err := net.SplitHostPort(name); err == nil {
		name = h
	}
	name = strings.ToLower(strings.Trim(name, "[]"))
	if name == "localhost" {
		return true
	}
	if ip := net.ParseIP(name); ip != nil {
		own, _ := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
		if ip.IsLoopback() || own != nil && own.IP.Equal(ip) {
			return true
		}
	}
	return slices.ContainsFunc(g.Hosts, func(h string) bool { return strings.EqualFold(h, name) })
}

func (g *Gate) originKnown(origin, host string) bool {
	if slices.Contains(g.Origins, origin) {
		return true
	}
	u, err := url.Parse(origin)
	return err == nil && (u.Scheme == "http" || u.Scheme == "https") && u.Host == host
}
