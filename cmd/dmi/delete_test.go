//go:build linux

package main

import (
	"strings"
	"testing"
	"time"

	"dmi/store"
)

// dmi delete, of a store that nobody has open and of one whose engine lives.
func TestDelete(t *testing.T) {
	for _, alive := range []bool{false, true} {
		dir, sample := sampleStore(t)
		if alive {
			mustStart(t, dir)
		}
		first, second := sample.Requests[0].ID, sample.Requests[1].ID
		for _, c := range []struct {
			arguments []string
			code      int
			says      string
		}{
			{nil, exitUsage, "--request"}, {[]string{"--tag", "x", "--request", first}, exitUsage, "--request"}, {[]string{"--before", "tomorrow"}, exitUsage, "tomorrow"},
			{[]string{"--request", first, "--request", "none"}, exitNotFound, "nothing is deleted"},
		} {
			if _, complaints, code := dmi(t, append(c.arguments, "delete", "--store", dir)...); code != c.code || !strings.Contains(complaints, c.says) {
				t.Errorf("delete %v: exit code %d\n%s", c.arguments, code, complaints)
			}
		}
		mustDMI(t, "get", "-r", first, "-s", "resid_post", "--store", dir)
		if d := jsonOf[store.Deletion](t, mustDMI(t, "delete", "--tag", "nobody's", "--json", "--store", dir)); d != (store.Deletion{}) {
			t.Errorf("nobody's: %+v", d)
		}
		// 24 rows are on its books, 4 of them not computed.
		if out := mustDMI(t, "delete", "--request", first, "--store", dir); !strings.Contains(out, "1 requests: 20 rows") || !strings.Contains(out, "ids or text of 1 ") {
			t.Errorf("alive: %v: %s", alive, out)
		}
		if _, complaints, code := dmi(t, "get", "-r", first, "-s", "resid_post", "--store", dir); code != exitIncomplete || !strings.Contains(complaints, "expired") {
			t.Errorf("get: exit code %d\n%s", code, complaints)
		}
		if out := mustDMI(t, "requests", first, "--store", dir); strings.Contains(out, "capital of France") || strings.Contains(out, "70001") {
			t.Errorf("its prompt is still there:\n%s", out)
		}
		if d := jsonOf[store.Deletion](t, mustDMI(t, "delete", "--before", "0h", "--json", "--store", dir)); d.Requests != 2 || d.Rows == 0 {
			t.Errorf("all: %+v", d)
		}
		if _, _, code := dmi(t, "get", "-r", second, "-s", "tokens", "--store", dir); code != exitIncomplete {
			t.Errorf("get %s: exit code %d", second, code)
		}
		if out := mustDMI(t, "verify", "--store", dir); !strings.Contains(out, "36 rows produced, 36 on the books\nok") {
			t.Errorf("verify: %s", out)
		}
	}
}

func TestParseBefore(t *testing.T) {
	now := time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)
	for text, want := range map[string]time.Time{"36h": now.Add(-36 * time.Hour), "30d": time.Date(2026, 5, 2, 12, 0, 0, 0, time.UTC),
		"2026-05-01T12:00:00Z": time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC), "2026-05-01": time.Date(2026, 5, 1, 0, 0, 0, 0, time.Local)} {
		if got, err := parseBefore(text, now); err != nil || !got.Equal(want) {
			t.Errorf("%s: %v, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "x", "-1h", "2027-01-01", "-3d", "99999999d", "1960-01-01"} {
		if got, err := parseBefore(text, now); err == nil {
			t.Errorf("%s is taken as %v", text, got)
		}
	}
}
