package query

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"dmi/tensor"

	"github.com/google/go-cmp/cmp"
)

func write(t *testing.T, x *Export) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), x.Filename)
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := x.WriteTo(context.Background(), file); err != nil {
		t.Fatal(err)
	}
	if info, _ := file.Stat(); x.Size >= 0 && info.Size() != x.Size {
		t.Fatalf("%s: %d bytes written, %d promised", x.Filename, info.Size(), x.Size)
	}
	return path
}

// The reference reader sees every tensor of one request, and of several, with the bytes that a read gives.
func TestSafetensorsOpensInTheReferenceReader(t *testing.T) {
	m := example(t)
	e := New(m)
	var ids, paths []string
	for _, r := range m.requests {
		ids = append(ids, r.ID)
	}
	scopes := []Scope{{Requests: ids[:1]}, {Requests: ids}}
	wants := make([]map[string]string, len(scopes))
	for i, scope := range scopes {
		export, err := e.Export(context.Background(), ExportQuery{Scope: scope, Format: "safetensors"})
		if err != nil {
			t.Fatal(err)
		}
		paths = append(paths, write(t, export))
		wants[i] = map[string]string{}
		for _, r := range m.requests[:len(scope.Requests)] {
			for _, s := range m.sites {
				a, err := e.Tensor(context.Background(), TensorQuery{Request: r.ID, Site: SiteName{Name: s.Name}})
				if errors.Is(err, ErrIncomplete) {
					continue // the engine computed none of it
				}
				if err != nil {
					t.Fatal(err)
				}
				var b bytes.Buffer
				if _, err := a.Open(context.Background()).WriteTo(&b); err != nil {
					t.Fatal(err)
				}
				name := s.Name
				if len(scope.Requests) > 1 {
					name = r.ID + "/" + name
				}
				wants[i][name] = fmt.Sprintf("%s %v %x", a.DType, a.Shape, sha256.Sum256(b.Bytes()))
			}
		}
	}
	out := python(t, "safetensors, torch", `import hashlib, json, sys, torch
from safetensors import safe_open
names = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16", torch.int64: "I64", torch.uint8: "U8"}
files = []
for path in sys.argv[1:]:
    with safe_open(path, "pt") as f:
        seen = {}
        for k in f.keys():
            t = f.get_tensor(k)
            raw = bytes(t.contiguous().flatten().view(torch.uint8).numpy())
            seen[k] = f"{names[t.dtype]} [{' '.join(map(str, t.shape))}] {hashlib.sha256(raw).hexdigest()}"
        files.append({"tensors": seen, "metadata": f.metadata()})
print(json.dumps(files))`, paths...)
	var files []struct{ Tensors, Metadata map[string]string }
	if err := json.Unmarshal([]byte(out), &files); err != nil || len(files) != len(scopes) {
		t.Fatalf("%v in %s", err, out)
	}
	for i, got := range files {
		if d := cmp.Diff(wants[i], got.Tensors); d != "" {
			t.Fatalf("tensors (-want +got):\n%s", d)
		}
		var positions map[string]string
		var requests []struct {
			ID, Run, Session string
			Model            map[string]string
			Tokens           []int64
		}
		if err := errors.Join(json.Unmarshal([]byte(got.Metadata["positions"]), &positions), json.Unmarshal([]byte(got.Metadata["requests"]), &requests)); err != nil {
			t.Fatal(err)
		}
		if len(positions) != len(wants[i]) || len(requests) != len(scopes[i].Requests) || requests[0].Model["name"] != "toy" ||
			len(requests[0].Tokens) != len(m.requests[0].Tokens) || got.Metadata["complete"] != "true" {
			t.Fatalf("metadata %v", got.Metadata)
		}
	}
}

func TestNPYOpensInNumPy(t *testing.T) {
	m := example(t)
	e := New(m)
	var paths, wants []string
	for _, test := range []struct {
		site, as string
	}{{"tokens", ""}, {"blocks.0.attn.hook_q", ""}, {"hook_moved", ""}, {"resid_post", "F32"}, {"resid_post", ""}} {
		q := ExportQuery{Scope: Scope{Requests: []string{m.requests[0].ID}}, Site: test.site, Format: "npy", Partial: true}
		if test.as != "" {
			q.As, _ = tensor.ParseDType(test.as)
		}
		export, err := e.Export(context.Background(), q)
		if test.site == "resid_post" && test.as == "" { // NumPy has no bfloat16
			var failure *Error
			if !errors.As(err, &failure) || failure.Code != BadArgument || !strings.Contains(failure.Hint, "safetensors") || !strings.Contains(failure.Hint, "f32") {
				t.Fatalf("bfloat16 as npy: %v", err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		a, err := e.Tensor(context.Background(), TensorQuery{Request: m.requests[0].ID, Site: SiteName{Name: test.site}, Partial: true, As: q.As})
		if err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		if _, err := a.Open(context.Background()).WriteTo(&b); err != nil {
			t.Fatal(err)
		}
		paths = append(paths, write(t, export))
		dtype := map[tensor.DType]string{tensor.I64: "int64", tensor.F32: "float32", tensor.U8: "uint8"}[a.DType]
		wants = append(wants, fmt.Sprintf("%v %x %s", a.Shape, sha256.Sum256(b.Bytes()), dtype))
	}
	got := python(t, "numpy", `import hashlib, numpy, sys
for path in sys.argv[1:]:
    a = numpy.load(path)
    print(f"[{' '.join(map(str, a.shape))}] {hashlib.sha256(a.tobytes()).hexdigest()} {a.dtype}")`, paths...)
	if d := cmp.Diff(wants, strings.Split(got, "\n")); d != "" {
		t.Fatalf("arrays (-want +got):\n%s", d)
	}
	if _, err := e.Export(context.Background(), ExportQuery{Scope: Scope{Requests: []string{m.requests[0].ID}}, Format: "npy", Partial: true}); !errors.Is(err, ErrBadArgument) {
		t.Fatalf("many tensors as npy: %v", err)
	}
	if _, err := e.Export(context.Background(), ExportQuery{Scope: Scope{Run: m.run.ID}, Format: "pickle"}); !errors.Is(err, ErrBadArgument) {
		t.Fatalf("pickle: %v", err)
	}
}
