// Package web is the page that people look at: its source (TypeScript, built by `make page` into dist/) and the handler that serves what was built from
// this binary. The page asks for everything else through the HTTP API, with a token that never reaches a path, a query or a log.
package web

import (
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"io/fs"
	"mime"
	"net/http"
	"path"
	"strings"
)

// What Vite made; only .gitignore in a tree where nobody built the page yet.
//
//go:embed all:dist
var dist embed.FS

// unbuilt is served where dist is empty, so that the rest of the engine can be built and tested without Node.
const unbuilt = `<!doctype html><html lang="en"><meta charset="utf-8"><title>DMI: the page was not built</title>
<main><h1>The page was not built into this engine</h1><p>Run <code>make setup</code> in the checkout (it needs Node 20.19 or newer and npm), and start the engine again.
The HTTP API, the command line and Python work without it.</p></main></html>
`

// policy keeps the page to this server: no script, style, font, image or connection from elsewhere, nothing inline, no form target.
const policy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors "

// Built says whether the page is in this binary.
func Built() bool {
	_, err := fs.Stat(dist, "dist/index.html")
	return err == nil
}

type asset struct {
	body []byte
	kind string
	tag  string
}

// Handler serves the page at / and what belongs to it under /assets/. embedders are origins whose pages may show it in a frame.
func Handler(embedders []string) http.Handler {
	assets := map[string]asset{}
	_ = fs.WalkDir(dist, "dist", func(name string, d fs.DirEntry, err error) error { // an embedded tree cannot fail to be read
		if err != nil || d.IsDir() || d.Name() == ".gitignore" {
			return err
		}
		body, err := dist.ReadFile(name)
		assets["/"+strings.TrimPrefix(name, "dist/")] = newAsset(body, path.Ext(name))
		return err
	})
	index, built := assets["/index.html"]
	delete(assets, "/index.html")
	if !built {
		index = newAsset([]byte(unbuilt), ".html")
	}
	assets["/"] = index
	security := policy + strings.Join(append([]string{"'self'"}, embedders...), " ")
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", security)
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			h.Set("Allow", "GET, HEAD")
			http.Error(w, "the page is only read", http.StatusMethodNotAllowed)
			return
		}
		found, is := assets[r.URL.Path]
		if !is {
			http.Error(w, "the page has no such file", http.StatusNotFound)
			return
		}
		h.Set("Content-Type", found.kind)
		h.Set("ETag", found.tag)
		h.Set("Cache-Control", "no-cache") // asked for again, and answered with 304 while it is the same binary
		if strings.HasPrefix(r.URL.Path, "/assets/") {
			h.Set("Cache-Control", "max-age=31536000, immutable") // their names have a hash of what they hold
		}
		if r.Header.Get("If-None-Match") == found.tag {
			w.WriteHeader(http.StatusNotModified)
			return
		}
		if r.Method == http.MethodGet {
			_, _ = w.Write(found.body)
		}
	})
}

func newAsset(body []byte, extension string) asset {
	kind := mime.TypeByExtension(extension)
	if extension == ".js" { // whatever the machine's own table says
		kind = "text/javascript; charset=utf-8"
	}
	sum := sha256.Sum256(body)
	return asset{body, kind, `"` + hex.EncodeToString(sum[:8]) + `"`}
}
