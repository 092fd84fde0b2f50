package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"dmi/store"
)

// dmi repair gives back what a damaged catalogue told, says which segment it cannot use, and leaves a store alone that an engine has open.
func TestRepair(t *testing.T) {
	dir, _ := sampleStore(t)
	list := func() string {
		return mustDMI(t, "requests", "--json", "--store", dir) + mustDMI(t, "ls", "--json", "--store", dir) + mustDMI(t, "coverage", "--store", dir)
	}
	before := list()
	catalogue := filepath.Join(dir, "catalogue.sqlite")
	if err := os.WriteFile(catalogue, []byte("not a database at all"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out := mustDMI(t, "repair", dir); !strings.Contains(out, "36 rows produced, 36 on the books") {
		t.Errorf("%s", out)
	}
	if after := list(); after != before {
		t.Errorf("after:\n%s\nbefore:\n%s", after, before)
	}
	report := jsonOf[store.Report](t, mustDMI(t, "repair", "--json", "--store", dir))
	if report.Segments == 0 || report.Produced != 36 || len(report.Problems) != 0 {
		t.Errorf("%+v", report)
	}
	segments, err := filepath.Glob(filepath.Join(dir, "segments", "*.safetensors"))
	if err != nil || len(segments) == 0 {
		t.Fatalf("no sealed segment: %v %v", segments, err)
	}
	if err := os.WriteFile(segments[0], []byte("not a segment"), 0o600); err != nil {
		t.Fatal(err)
	}
	out, _, code := dmi(t, "repair", dir)
	if code != exitFailure || !strings.Contains(out, "PROBLEM") || !strings.Contains(out, filepath.Base(segments[0])) || !strings.Contains(out, "36 on the books") {
		t.Errorf("exit code %d\n%s", code, out)
	}
	if _, complaints, code := dmi(t, "repair", dir, "--store", dir+"2"); code != exitUsage || !strings.Contains(complaints, "named twice") {
		t.Errorf("exit code %d\n%s", code, complaints)
	}
	if _, complaints, code := dmi(t, "repair", filepath.Join(t.TempDir(), "nothing")); code != exitStore || !strings.Contains(complaints, "not a DMI store") {
		t.Errorf("exit code %d\n%s", code, complaints)
	}
	s, err := store.Open(dir, store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, complaints, code := dmi(t, "repair", dir); code != exitStore || !strings.Contains(complaints, "another engine has it open") {
		t.Errorf("in use: exit code %d\n%s", code, complaints)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}
