// Package archtest holds the code to ARCHITECTURE.md: which package may import which, and that each says what it is for.
package archtest

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// edges lists what each package may import of ours, in the order of the data's path. Tests may import more.
var edges = map[string][]string{
	"tensor":               {},
	"ring":                 {"tensor"},
	"drain":                {"ring", "tensor"},
	"pipeline":             {"drain", "policy", "ring", "tensor"},
	"control":              {"drain", "pipeline", "policy", "ring", "store", "tensor"},
	"web":                  {},
	"internal/vfs":         {},
	"internal/crc32c":      {},
	"store/segment":        {"internal/crc32c", "internal/vfs", "tensor"},
	"store":                {"internal/crc32c", "internal/vfs", "ring", "store/segment", "tensor"},
	"internal/nearest":     {},
	"policy":               {"internal/nearest", "internal/vfs", "tensor"},
	"query":                {"internal/nearest", "store", "tensor"},
	"inspect":              {"query", "tensor"},
	"live":                 {"tensor"},
	"serve/audit":          {"internal/vfs"},
	"governor":             {},
	"trigger":              {"policy", "tensor"},
	"steer":                {"control", "governor", "policy", "store", "tensor", "trigger"},
	"serve":                {"control", "inspect", "live", "policy", "query", "serve/audit", "steer", "store", "tensor"},
	"internal/ringtape":    {"control", "internal/crc32c", "ring", "tensor"},
	"internal/samplestore": {"ring", "store", "tensor"},
	"internal/leaks":       {},
	"internal/archtest":    {},
}

const module = "dmi/"

func TestImportEdgesAndPackageDocs(t *testing.T) {
	root := filepath.Join("..", "..")
	seen := map[string]bool{}
	documented := map[string]bool{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name := d.Name(); path != root && (strings.HasPrefix(name, ".") || name == "node_modules" || name == "testdata") {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(path, ".go") {
			return nil
		}
		dir, _ := filepath.Rel(root, filepath.Dir(path))
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly|parser.ParseComments)
		if err != nil {
			return err
		}
		seen[dir] = true
		documented[dir] = documented[dir] || file.Doc != nil
		if strings.HasSuffix(path, "_test.go") || strings.HasPrefix(dir, "cmd/") || strings.HasPrefix(dir, "bench") || strings.HasPrefix(dir, "test") {
			return nil
		}
		allowed, known := edges[dir]
		if !known {
			t.Errorf("%s: package %s has no line in edges; add one, and its place in ARCHITECTURE.md", path, dir)
			return nil
		}
		for _, spec := range file.Imports {
			name := strings.Trim(spec.Path.Value, `"`)
			if name == "C" {
				t.Errorf("%s imports C: the engine is built without cgo", path)
			}
			if ours, ok := strings.CutPrefix(name, module); ok && !slices.Contains(allowed, ours) {
				t.Errorf("%s: %s may not import %s (allowed: %v)", path, dir, ours, allowed)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for dir := range seen {
		if !documented[dir] {
			t.Errorf("package %s has no doc comment that says what it is for", dir)
		}
	}
	text, err := os.ReadFile(filepath.Join(root, "ARCHITECTURE.md"))
	if err != nil {
		t.Fatal(err)
	}
	for dir := range edges {
		if !strings.Contains(string(text), "`"+dir+"/`") && !strings.Contains(string(text), "`"+dir+"`") {
			t.Errorf("ARCHITECTURE.md does not mention `%s/`", dir)
		}
	}
}
