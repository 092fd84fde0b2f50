package segment

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"dmi/internal/leaks"
	"dmi/internal/vfs"
	"dmi/tensor"
)

func TestMain(m *testing.M) { leaks.Main(m) }

type written struct {
	Chunk
	data          []byte
	request, site string
}

// draw makes a chunk of any dtype and shape.
func draw(t *rapid.T, i int) written {
	w := written{Chunk: Chunk{Key: tensor.RequestKey{Session: rapid.Uint32Range(1, 2).Draw(t, "session"), Request: rapid.Uint64Range(0, 3).Draw(t, "request")},
		Site: rapid.Uint32Range(0, 3).Draw(t, "site"), Attempt: rapid.Uint16Range(0, 1).Draw(t, "attempt"), First: rapid.Uint32Range(0, 5).Draw(t, "first"),
		Rows: rapid.Uint32Range(1, 40).Draw(t, "rows"), Step: rapid.Uint64().Draw(t, "step"), DType: tensor.DType(rapid.IntRange(1, int(tensor.C128)).Draw(t, "dtype")),
		Policy: rapid.Uint64().Draw(t, "policy"), Shape: rapid.SliceOfN(rapid.IntRange(0, 9), 0, 3).Draw(t, "shape")}}
	w.LastStep = w.Step
	size := int(w.Rows) * w.DType.Size()
	for _, d := range w.Shape {
		size *= d
	}
	w.data = make([]byte, size)
	random := rand.New(rand.NewPCG(uint64(i), 7))
	for j := range w.data {
		w.data[j] = byte(random.Uint32())
	}
	w.request, w.site = fmt.Sprintf("r<%d>\"%d", w.Key.Session, w.Key.Request), fmt.Sprintf("blocks.%d.hook", w.Site)
	return w
}

var limits = Limits{Bytes: 1 << 20, Tensors: 1000, Header: 256 << 10}

// TestSegmentHoldsWhatWasWritten writes any chunks in any batches, and reads them from the open file, after a resumption, and sealed.
func TestSegmentHoldsWhatWasWritten(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		mem := vfs.NewMem()
		w, err := Create(mem, "s/1.open", Identity{Store: "a store", Number: 1, Created: 5}, limits, true)
		if err != nil {
			t.Fatal(err)
		}
		var all []written
		for batch := range rapid.IntRange(0, 5).Draw(t, "batches") {
			for i := range rapid.IntRange(0, 8).Draw(t, "chunks") {
				c := draw(t, batch*100+i)
				half := len(c.data) / 2
				fits, err := w.Append(c.Chunk, c.request, c.site, c.data[:half], c.data[half:])
				if err != nil || !fits {
					t.Fatalf("append: %v, %v", fits, err)
				}
				all = append(all, c)
			}
			if err := w.EndBatch(nil); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Drain(); err != nil {
			t.Fatal(err)
		}
		end := w.End()
		open, _ := mem.Open("s/1.open", false)
		same(t, open, all)
		if rapid.Bool().Draw(t, "resumed") {
			w.Close()
			f, _ := mem.Open("s/1.open", true)
			f.WriteAt([]byte("torn"), end)
			if w, _, err = Resume(mem, "s/1.open", f, end, limits); err != nil {
				t.Fatal(err)
			}
		}
		groups, err := w.Seal("s/1.safetensors")
		if err != nil {
			t.Fatal(err)
		}
		sealed, _ := mem.Open("s/1.safetensors", false)
		contents := same(t, sealed, all)
		listed := 0
		for _, g := range groups {
			b := make([]byte, g.Length)
			sealed.ReadAt(b, g.Offset)
			key, chunks, err := ParseGroup(b)
			if err != nil || key != g.Key || len(chunks) != g.Chunks {
				t.Fatalf("directory of %v: %v, %d chunks of %d", g.Key, err, len(chunks), g.Chunks)
			}
			listed += len(chunks)
		}
		if listed != len(all) || contents.Identity.Store != "a store" || contents.Identity.Number != 1 {
			t.Fatalf("directory lists %d of %d; identity %+v", listed, len(all), contents.Identity)
		}
		holesFree(t, sealed, len(all))
		if _, err := Check(sealed, true, func(int64) {}, func(offset int64, what string) { t.Fatalf("check: at %d: %s", offset, what) }); err != nil {
			t.Fatal(err)
		}
	})
}

func same(t *rapid.T, f vfs.File, all []written) *Contents {
	t.Helper()
	contents, err := Scan(f)
	if err != nil {
		t.Fatal(err)
	}
	if len(contents.Chunks) != len(all) {
		t.Fatalf("%d chunks of %d", len(contents.Chunks), len(all))
	}
	for i := range all {
		got := contents.Chunks[i]
		data, err := Read(f, &got, nil)
		if err != nil || !bytes.Equal(data, all[i].data) {
			t.Fatalf("chunk %d: %v, or bytes differ", i, err)
		}
		got.Copy, got.Offset, got.Length, got.CRC = 0, 0, 0, 0
		want := all[i].Chunk
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Fatalf("chunk %d is %+v, want %+v", i, got, want)
		}
		if contents.Request(want.Key) != all[i].request {
			t.Fatalf("request is called %q", contents.Request(want.Key))
		}
	}
	return contents
}

// holesFree holds the header to the rules of the safetensors format: every byte of the buffer belongs to one tensor.
func holesFree(t *rapid.T, f vfs.File, chunks int) {
	t.Helper()
	size, _ := f.Size()
	b := make([]byte, size)
	f.ReadAt(b, 0)
	n := binary.LittleEndian.Uint64(b)
	var header map[string]json.RawMessage
	if err := json.Unmarshal(b[8:8+n], &header); err != nil {
		t.Fatal(err)
	}
	if b[8] != '{' {
		t.Fatal("the header does not begin with {")
	}
	at, tensors := map[int64]int64{}, 0
	for name, raw := range header {
		if name == "__metadata__" {
			var meta map[string]string
			if err := json.Unmarshal(raw, &meta); err != nil || meta["dmi.version"] != "1" {
				t.Fatalf("metadata: %v, %v", meta, err)
			}
			continue
		}
		var info struct {
			Dtype   string   `json:"dtype"`
			Shape   []int64  `json:"shape"`
			Offsets [2]int64 `json:"data_offsets"`
		}
		if err := json.Unmarshal(raw, &info); err != nil {
			t.Fatal(err)
		}
		d, err := tensor.ParseDType(info.Dtype)
		if err != nil {
			t.Fatal(err)
		}
		bytes := int64(d.Size())
		for _, dim := range info.Shape {
			bytes *= dim
		}
		if info.Offsets[1]-info.Offsets[0] != bytes {
			t.Fatalf("%s: %v of %s in %v", name, info.Shape, info.Dtype, info.Offsets)
		}
		if bytes > 0 {
			at[info.Offsets[0]] = info.Offsets[1]
		}
		if !strings.HasPrefix(name, "dmi.") {
			tensors++
		}
	}
	end := int64(0)
	for len(at) > 0 {
		next, ok := at[end]
		if !ok {
			t.Fatalf("a hole at %d", end)
		}
		delete(at, end)
		end = next
	}
	if end != size-8-int64(n) || tensors != chunks {
		t.Fatalf("tensors end at %d of %d; %d of %d named", end, size-8-int64(n), tensors, chunks)
	}
}

func TestFullHeaderIsRefusedAndNothingAdded(t *testing.T) {
	mem := vfs.NewMem()
	w, err := Create(mem, "s/1.open", Identity{Store: "a", Number: 1}, Limits{Bytes: 1 << 30, Tensors: 1 << 20, Header: 16 << 10}, false)
	if err != nil {
		t.Fatal(err)
	}
	n := uint32(0)
	for ; ; n++ {
		fits, err := w.Append(Chunk{Key: tensor.RequestKey{Session: 1}, First: n, Rows: 1, DType: tensor.U8, Shape: []int{1}}, "r", "site", []byte{1})
		if err != nil {
			t.Fatal(err)
		}
		if !fits {
			break
		}
	}
	if n < 50 || w.Pending() != int(n) {
		t.Fatalf("%d fitted, %d pending", n, w.Pending())
	}
	if err := w.EndBatch(nil); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Seal("s/1.safetensors"); err != nil {
		t.Fatal(err)
	}
}

// TestReferenceReader opens a sealed segment with the safetensors library, in numpy and in torch.
func TestReferenceReader(t *testing.T) {
	python := os.Getenv("DMI_PYTHON")
	if python == "" {
		python = filepath.Join("..", "..", ".venv", "bin", "python")
	}
	if _, err := os.Stat(python); err != nil {
		t.Skipf("no Python with safetensors: %v; set DMI_PYTHON, or run make setup", err)
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	dir := t.TempDir()
	w, err := Create(vfs.OS{}, filepath.Join(dir, "1.open"), Identity{Store: "a", Number: 1}, limits, true)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for d := tensor.Bool; d.Valid(); d++ {
		data := make([]byte, 3*5*d.Size())
		for i := range data {
			data[i] = byte(random.Uint32())
			if d == tensor.Bool {
				data[i] &= 1
			}
		}
		if _, err := w.Append(Chunk{Key: tensor.RequestKey{Session: 1, Request: uint64(d)}, Rows: 3, DType: d, Shape: []int{5}}, d.String(), "site", data); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, d.String()+".bin"), data, 0o600); err != nil {
			t.Fatal(err)
		}
		names = append(names, d.String())
		if err := w.EndBatch(nil); err != nil {
			t.Fatal(err)
		}
	}
	sealed := filepath.Join(dir, "1.safetensors")
	if _, err := w.Seal(sealed); err != nil {
		t.Fatal(err)
	}
	const script = `
import json, pathlib, sys
from safetensors import safe_open
from safetensors.torch import load_file
import torch
path, names = pathlib.Path(sys.argv[1]), sys.argv[2].split(",")
whole = load_file(path)
with safe_open(path, "pt") as f:
    meta = f.metadata()
    odd = json.loads(meta["dmi.dtypes"])
    for name in names:
        key = f"{name}/site/0000000:0000003"
        want = (path.parent / f"{name}.bin").read_bytes()
        for t in (f.get_tensor(key), whole[key]):
            assert t.contiguous().view(torch.uint8).numpy().tobytes() == want, name
            assert (odd.get(key) == name) == (t.dtype == torch.uint8 and name != "U8"), (name, t.dtype)
            assert t.shape[0] == 3 and (key in odd or t.shape[1] == 5), t.shape
print(len(names))
`
	out, err := exec.Command(python, "-c", script, sealed, strings.Join(names, ",")).CombinedOutput()
	if err != nil || strings.TrimSpace(string(out)) != fmt.Sprint(len(names)) {
		t.Fatalf("reference reader: %v\n%s", err, out)
	}
}

func FuzzScan(f *testing.F) {
	mem := vfs.NewMem()
	w, err := Create(mem, "s/1.open", Identity{Store: "a", Number: 1, Nonce: 1}, Limits{Bytes: 1 << 20, Tensors: 10, Header: 4096}, false)
	if err != nil {
		f.Fatal(err)
	}
	w.Append(Chunk{Rows: 1, DType: tensor.U8, Shape: []int{3}}, "r", "site", []byte{1, 2, 3})
	w.EndBatch(nil)
	w.Seal("s/1.safetensors")
	file, _ := mem.Open("s/1.safetensors", false)
	size, _ := file.Size()
	b := make([]byte, size)
	file.ReadAt(b, 0)
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		mem := vfs.NewMem()
		file, _ := mem.Create("f", false)
		file.WriteAt(b, 0)
		Check(file, true, func(int64) {}, func(int64, string) {})
	})
}

func FuzzIndexBlock(f *testing.F) {
	b := appendRequest(nil, tensor.RequestKey{Session: 1, Request: 2}, "r")
	b = appendSite(b, siteKey{1, 2}, "site")
	f.Add(appendChunk(b, &Chunk{Rows: 1, DType: tensor.U8, Shape: []int{3}, Length: 3}, 0))
	f.Fuzz(func(t *testing.T, b []byte) {
		decoded, err := decodeItems(b, 0)
		if err != nil {
			return
		}
		for i := range decoded.chunks { // what is accepted is well formed, and encodes to what decodes the same
			c := &decoded.chunks[i]
			if err := c.Check(); err != nil {
				t.Fatal(err)
			}
			again, err := decodeItems(appendChunk(nil, c, 0), 0)
			if err != nil || fmt.Sprint(again.chunks[0]) != fmt.Sprint(*c) {
				t.Fatalf("%+v became %+v: %v", *c, again, err)
			}
		}
	})
}

func FuzzGroup(f *testing.F) {
	f.Add(appendGroup(nil, "r", []*Chunk{{Rows: 1, DType: tensor.U8, Shape: []int{3}, Length: 3}}))
	f.Fuzz(func(t *testing.T, b []byte) { ParseGroup(b) })
}
