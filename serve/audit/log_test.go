package audit

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"dmi/internal/leaks"
	"dmi/internal/vfs"
)

func TestMain(m *testing.M) { leaks.Main(m) }

// told collects what a Log tells the operator.
type told struct {
	mu   sync.Mutex
	list []string
}

func (t *told) tell(level, code, message string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.list = append(t.list, level+" "+code+" "+message)
}

func (t *told) all() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.list)
}

// lines reads every file of a folder, oldest first. A line that is no JSON becomes an entry whose event is "torn".
func lines(t *testing.T, fs vfs.FS, dir string) (all []Entry) {
	t.Helper()
	names, err := fs.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(names)
	for _, name := range names {
		f, err := fs.Open(path.Join(dir, name), false)
		if err != nil {
			t.Fatal(err)
		}
		size, _ := f.Size()
		text := make([]byte, size)
		if _, err := f.ReadAt(text, 0); err != nil && size > 0 {
			t.Fatal(err)
		}
		f.Close()
		for _, line := range bytes.Split(bytes.TrimSuffix(text, []byte("\n")), []byte("\n")) {
			var e Entry
			if json.Unmarshal(line, &e) != nil {
				e.Event = "torn"
			}
			all = append(all, e)
		}
	}
	return all
}

func events(all []Entry) string {
	var names []string
	for _, e := range all {
		names = append(names, e.Event)
	}
	return strings.Join(names, " ")
}

func TestLinesAreInFilesThatOthersCannotRead(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	for _, engine := range []string{"e1", "e2"} { // the second goes on where the first ended
		l, err := Open(vfs.OS{}, dir, Options{Engine: engine})
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Append(Entry{Event: "begin", Read: engine + "-1", Args: map[string][]string{"request": {"a\nb", "\"}"}}}); err != nil {
			t.Fatal(err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if err := l.Append(Entry{Event: "late"}); err == nil {
			t.Error("a closed log takes lines")
		}
	}
	all := lines(t, vfs.OS{}, dir)
	if got := events(all); got != "open begin close open begin close" || all[4].Read != "e2-1" || all[3].Engine != "e2" {
		t.Errorf("%s: %+v", got, all)
	}
	if got := all[1].Args["request"]; !slices.Equal(got, []string{"a\nb", "\"}"}) {
		t.Errorf("arguments came back as %q", got)
	}
	for name, want := range map[string]os.FileMode{dir: 0o700, filepath.Join(dir, "audit-00000001.jsonl"): 0o600} {
		if info, err := os.Stat(name); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v %v", name, info.Mode(), err)
		}
	}
}

func TestSizeIsBounded(t *testing.T) {
	fs := vfs.NewMem()
	l, err := Open(fs, "a", Options{FileBytes: 1000, Files: 3})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 200 {
		if err := l.Append(Entry{Event: "begin", Read: fmt.Sprint(i), Path: strings.Repeat("x", i)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	names, _ := fs.ReadDir("a")
	if len(names) != 3 {
		t.Errorf("files %v", names)
	}
	for _, name := range names {
		if size, err := fs.Stat(path.Join("a", name)); err != nil || size > 1000 {
			t.Errorf("%s has %d bytes %v", name, size, err)
		}
	}
	all := lines(t, fs, "a")
	if all[0].Event != "open" || all[0].Gone == "" {
		t.Errorf("the oldest file does not say which one made room: %+v", all[0])
	}
	last := -1
	for _, e := range all {
		if e.Event != "begin" {
			continue
		}
		var n int
		fmt.Sscan(e.Read, &n)
		if last >= 0 && n != last+1 {
			t.Errorf("line %d follows %d", n, last)
		}
		last = n
	}
	if last != 199 {
		t.Errorf("the last line kept is %d", last)
	}
}

// A full disk loses lines, says so once, and the record says how many as soon as it goes on. No half line stays.
func TestGapsAreOnTheRecord(t *testing.T) {
	fs := vfs.NewMem()
	var full, stuck bool
	fs.Fault = func(op, name string) error {
		if full && op == "write" || stuck && op == "truncate" {
			return syscall.ENOSPC
		}
		return nil
	}
	var operator told
	l, err := Open(fs, "a", Options{Tell: operator.tell})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	put := func(read string) error { return l.Append(Entry{Event: "begin", Read: read}) }
	if err := put("1"); err != nil {
		t.Fatal(err)
	}
	full, stuck = true, true
	for _, read := range []string{"2", "3", "4"} {
		if err := put(read); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("line %s on a full disk: %v", read, err)
		}
	}
	if s := l.Stats(); s.Lost != 3 || !strings.Contains(s.Failure, "no space") {
		t.Errorf("%+v", s)
	}
	full, stuck = false, false
	if err := put("5"); err != nil {
		t.Fatal(err)
	}
	all := lines(t, fs, "a")
	if got := events(all); got != "open begin lost begin" || all[2].Lines != 3 || !strings.Contains(all[2].Why, "no space") || all[3].Read != "5" {
		t.Errorf("%s: %+v", got, all)
	}
	if s := l.Stats(); s.Failure != "" || s.Lost != 3 {
		t.Errorf("%+v", s)
	}
	if list := operator.all(); len(list) != 2 || !strings.HasPrefix(list[0], "error audit") || !strings.Contains(list[0], "look at the disk") || !strings.HasPrefix(list[1], "info audit") {
		t.Errorf("the operator was told %q", list)
	}
}

// A disk that hangs holds no reader up for longer than the bound.
func TestHangingDisk(t *testing.T) {
	fs := vfs.NewMem()
	release := make(chan struct{})
	var mu sync.Mutex
	hang := false
	fs.Fault = func(op, name string) error {
		mu.Lock()
		wait := hang
		mu.Unlock()
		if wait && op == "write" {
			<-release
		}
		return nil
	}
	var operator told
	l, err := Open(fs, "a", Options{Tell: operator.tell, Wait: 50 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	hang = true
	mu.Unlock()
	began := time.Now()
	if err := l.Append(Entry{Event: "begin", Read: "1"}); !errors.Is(err, errHangs) {
		t.Errorf("a line on a hanging disk: %v", err)
	}
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("it held its writer for %v", took)
	}
	if err := l.Close(); err == nil || !strings.Contains(err.Error(), "may be missing") {
		t.Errorf("closing a log that hangs: %v", err)
	}
	if s := l.Stats(); s.Failure == "" || len(operator.all()) != 1 {
		t.Errorf("%+v, told %q", s, operator.all())
	}
	close(release)
	<-l.done
	if got := events(lines(t, fs, "a")); got != "open begin close" {
		t.Errorf("once it moves again: %s", got)
	}
}

// A kill in the middle of a line leaves that line, and the next begins on one of its own.
func TestKilledMidLine(t *testing.T) {
	fs := vfs.NewMem()
	l, err := Open(fs, "a", Options{})
	if err != nil {
		t.Fatal(err)
	}
	l.Append(Entry{Event: "begin", Read: "1"})
	killed := fs.AfterKill()
	l.Close()
	f, err := killed.Open("a/audit-00000001.jsonl", true)
	if err != nil {
		t.Fatal(err)
	}
	size, _ := f.Size()
	if err := f.Truncate(size - 5); err != nil {
		t.Fatal(err)
	}
	again, err := Open(killed, "a", Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}
	if got := events(lines(t, killed, "a")); got != "open torn open close" {
		t.Errorf("%s", got)
	}
}

func TestFolderThatCannotBeMade(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(vfs.OS{}, filepath.Join(path, "audit"), Options{}); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("%v", err)
	}
}
