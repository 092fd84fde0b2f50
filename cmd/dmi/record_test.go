//go:build linux

package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"dmi/internal/ringtape"
)

// A tape replays through a whole engine that records, up to those who watch it and those who ask it: they get what plain hooks saw when the tape was made. The tape
// that this makes replays into the same books as its original.
func TestRecordedSessionsReplay(t *testing.T) {
	tapes, err := filepath.Glob(filepath.Join("..", "..", "internal", "ringtape", "testdata", "*.tape"))
	if err != nil || len(tapes) == 0 {
		t.Fatal("no tapes in internal/ringtape/testdata", err)
	}
	for _, tape := range tapes {
		t.Run(filepath.Base(tape), func(t *testing.T) { replays(t, tape) })
	}
}

func replays(t *testing.T, tape string) {
	const seenLive = 20
	var books [2]string
	for i := range books {
		dir, tapes := storeDir(t), filepath.Join(t.TempDir(), "tapes")
		e := mustStart(t, dir, "control.record_dir", tapes)
		watched := make(chan string, 1)
		go func() {
			out, complaints, _ := dmi(t, "tail", "--count", strconv.Itoa(seenLive), "--json", "--store", dir)
			watched <- out + complaints
		}()
		waitFor(t, func() bool { return strings.Contains(mustDMI(t, "top", "--once", "--store", dir), "1 subscribers") })
		f, err := os.Open(tape)
		if err != nil {
			t.Fatal(err)
		}
		err = ringtape.Play(context.Background(), f, e.Control, "")
		f.Close()
		if err != nil {
			t.Fatalf("play %s: %v", tape, err)
		}
		kept := map[figures]bool{}
		for _, row := range statistics(t, mustDMI(t, "stats", "--per", "row", "--json", "--session", onlySession(t, dir), "--store", dir)) {
			kept[row] = true
		}
		live := statistics(t, <-watched)
		if len(live) < seenLive {
			t.Errorf("%d rows are told live, want %d", len(live), seenLive)
		}
		for _, row := range live {
			if !kept[row] {
				t.Errorf("told live, and not kept: %+v", row)
			}
		}
		if i == 0 {
			answersWhatHooksSaw(t, dir, strings.TrimSuffix(tape, ".tape")+".rows.safetensors")
		}
		e.end(t)
		mustDMI(t, "verify", "--store", dir)
		books[i] = mustDMI(t, "coverage", "--json", "--store", dir)
		made, err := filepath.Glob(filepath.Join(tapes, "*.tape"))
		if err != nil || len(made) != 1 {
			t.Fatalf("%d tapes were made: %v", len(made), err)
		}
		tape = made[0]
	}
	if books[0] != books[1] {
		t.Errorf("the second recording gives other books:\n%s\n%s", books[0], books[1])
	}
}

func onlySession(t *testing.T, dir string) string {
	t.Helper()
	runs := jsonOf[[]struct{ Session string }](t, mustDMI(t, "runs", "--json", "--store", dir))
	if len(runs) == 0 {
		t.Fatal("no runs")
	}
	return runs[0].Session
}

type figures struct {
	Request, Site string
	Position      uint32
	Mean, L2, Max float64
}

// statistics are rows' figures, out of a list or lines of JSON.
func statistics(t *testing.T, text string) []figures {
	t.Helper()
	if strings.HasPrefix(text, "[") {
		return jsonOf[[]figures](t, text)
	}
	return jsonOf[[]figures](t, "["+strings.ReplaceAll(strings.TrimSpace(text), "\n", ",")+"]")
}

// answersWhatHooksSaw asks for every tensor in a file of internal/ringtape/testdata/record.py.
func answersWhatHooksSaw(t *testing.T, dir, file string) {
	t.Helper()
	b, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) { // a tape from before there was one: the recorded books and summary hold it
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	size := binary.LittleEndian.Uint64(b)
	all, data := jsonOf[map[string]json.RawMessage](t, string(b[8:8+size])), b[8+size:]
	facts := jsonOf[map[string]string](t, string(all["__metadata__"]))
	delete(all, "__metadata__")
	requests, positions := jsonOf[[]string](t, facts["requests"]), jsonOf[map[string][]uint32](t, facts["positions"])
	for name, raw := range all {
		number, site, _ := strings.Cut(name, "/")
		index, err := strconv.Atoi(number)
		if err != nil {
			t.Fatal(err)
		}
		seen := jsonOf[struct {
			Shape  []int
			Offset [2]int `json:"data_offsets"`
		}](t, string(raw))
		rows := data[seen.Offset[0]:seen.Offset[1]]
		each := len(rows) / seen.Shape[0]
		ask := []string{"get", "-r", requests[index], "-s", site, "--partial", "--store", dir}
		got := jsonOf[described](t, mustDMI(t, append(ask, "--json")...))
		answer := mustDMI(t, append(ask, "--format", "raw", "-o", "-")...)
		var want []byte
		for _, span := range strings.Split(got.Positions, ",") {
			var from, to uint32
			if _, err := fmt.Sscanf(span, "%d:%d", &from, &to); err != nil {
				t.Fatal(got.Positions, err)
			}
			for ; from < to; from++ {
				at := slices.Index(positions[name], from)
				if at < 0 {
					t.Fatalf("%s: an answer of position %d, which no hook saw", name, from)
				}
				want = append(want, rows[at*each:(at+1)*each]...)
			}
		}
		if len(got.Shape) == 3 && got.Axes[0] == "head" { // they saw [query, head, key]
			want = byHead(want, seen.Shape[1], got.Shape[1], each/seen.Shape[1])
		}
		if answer != string(want) {
			t.Errorf("%s: %d bytes are answered, and are not the %d that hooks saw", name, len(answer), len(want))
		}
	}
}

// byHead turns [query, head, row] into [head, query, row].
func byHead(b []byte, heads, queries, row int) []byte {
	out := make([]byte, 0, len(b))
	for h := range heads {
		for q := range queries {
			at := (q*heads + h) * row
			out = append(out, b[at:at+row]...)
		}
	}
	return out
}
