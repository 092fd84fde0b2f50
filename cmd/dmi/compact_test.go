package main

import (
	"path/filepath"
	"strings"
	"testing"

	"dmi/store"
)

func TestCompact(t *testing.T) {
	dir, _ := sampleStore(t)
	before := mustDMI(t, "requests", "--json", "--store", dir) + mustDMI(t, "ls", "--json", "--store", dir)
	done := jsonOf[store.Compaction](t, mustDMI(t, "compact", "--json", dir))
	if done.Merged > done.Chunks {
		t.Errorf("%+v", done)
	}
	if out := mustDMI(t, "compact", dir); !strings.Contains(out, "nothing to do") {
		t.Errorf("again: %s", out)
	}
	if after := mustDMI(t, "requests", "--json", "--store", dir) + mustDMI(t, "ls", "--json", "--store", dir); after != before {
		t.Errorf("after:\n%s\nbefore:\n%s", after, before)
	}
	if out := mustDMI(t, "verify", "--store", dir); !strings.Contains(out, "36 rows produced, 36 on the books\nok") {
		t.Errorf("verify: %s", out)
	}
	if _, complaints, code := dmi(t, "compact", filepath.Join(t.TempDir(), "nothing")); code != exitStore || !strings.Contains(complaints, "no such file") {
		t.Errorf("exit code %d\n%s", code, complaints)
	}
	s, err := store.Open(dir, store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, complaints, code := dmi(t, "compact", dir); code != exitStore || !strings.Contains(complaints, "compact_after_s") {
		t.Errorf("in use: exit code %d\n%s", code, complaints)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}
