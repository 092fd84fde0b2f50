package control_test

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"dmi/internal/ringtape"
	"dmi/store"
	"dmi/tensor"
)

// end has a session say bye and waits for the answer: everything sent before is in the store then. Events on the way are returned, by code.
func end(t *testing.T, p *ringtape.Producer, c *ringtape.Client) (codes []string) {
	t.Helper()
	p.Finish()
	c.Send(map[string]any{"type": "bye"})
	for {
		m, err := c.Receive(patience)
		if err != nil {
			t.Fatal(err)
		}
		switch m["type"] {
		case "event":
			codes = append(codes, fmt.Sprint(m["code"]))
		case "bye":
			return codes
		default:
			t.Fatalf("%v", m)
		}
	}
}

func requests(list ...map[string]any) map[string]any {
	return map[string]any{"type": "requests", "requests": list}
}

// A session that knows another's ids, as every reader does, cannot change what is kept under them, nor answer to them.
func TestNamesBelongToWhoeverBeganThem(t *testing.T) {
	r := newRig(t, nil)
	victim, hostile := r.producer(small), r.producer(small)
	vc := r.attach(victim, "s000000aa", nil)
	vc.Send(map[string]any{"type": "run", "id": "r00000001", "labels": map[string]string{"who": "victim"}, "tags": []string{"a"}, "begun_unix_ns": 5})
	vc.Send(requests(map[string]any{"request": 1, "id": "r00000001.0", "run": "r00000001", "tags": []string{"mine"}, "tokens": []int{7}},
		map[string]any{"request": 2, "id": "chatcmpl-9", "run": "r00000001"}))
	vc.Send(map[string]any{"type": "barrier", "id": "b", "steps": map[string]any{}})
	if _, err := vc.Expect("durable", patience); err != nil {
		t.Fatal(err)
	}

	hc := r.attach(hostile, "s000000bb", nil)
	hc.Send(map[string]any{"type": "run", "id": "r00000001", "labels": map[string]string{"who": "hostile"}, "tags": []string{}})
	hc.Send(requests(
		map[string]any{"request": 1, "id": "r00000001.0", "run": "r00000001"},  // another's name, another's run
		map[string]any{"request": 2, "id": "r000000aa.0", "run": "r000000bb"},  // the run that the victim's hello began
		map[string]any{"request": 3, "id": "s000000aa.1", "run": "r000000bb"},  // the victim's session
		map[string]any{"request": 4, "id": "r000000bb.3", "run": "r000000bb"},  // its own
		map[string]any{"request": 5, "id": "r0000beef.0", "run": "r0000beef"})) // nobody's, which makes it its own
	codes := end(t, hostile, hc)
	if n := len(slices.DeleteFunc(slices.Clone(codes), func(c string) bool { return c != "foreign" })); n < 4 {
		t.Errorf("events %v", codes)
	}

	// Nobody's run became the hostile session's, so now it is the victim that may not have it.
	vc.Send(map[string]any{"type": "run", "id": "r0000beef", "labels": map[string]string{"who": "victim"}, "tags": []string{}})
	if codes := end(t, victim, vc); !slices.Contains(codes, "foreign") {
		t.Errorf("events %v", codes)
	}

	runs, err := r.store.Runs()
	if err != nil {
		t.Fatal(err)
	}
	owners := map[string]uint32{}
	for _, run := range runs {
		owners[run.ID] = run.Session
		if run.ID == "r00000001" && (run.Labels["who"] != "victim" || !slices.Equal(run.Tags, []string{"a"}) || run.Begun.UnixNano() != 5) {
			t.Errorf("the victim's run was changed: %+v", run)
		}
		if run.ID == "r0000beef" && run.Labels["who"] != "" {
			t.Errorf("the hostile session's run was changed: %+v", run)
		}
	}
	if owners["r00000001"] != 1 || owners["r000000aa"] != 1 || owners["r000000bb"] != 2 || owners["r0000beef"] != 2 {
		t.Errorf("runs belong to sessions %v", owners)
	}
	got, found, err := r.store.RequestByID("r00000001.0")
	if err != nil || !found || got.Key.Session != 1 || !slices.Equal(got.Tokens, []int64{7}) {
		t.Errorf("the victim's request is %+v %v", got, err)
	}
	list, err := r.store.Requests(store.RequestFilter{Session: 2})
	if err != nil {
		t.Fatal(err)
	}
	var kept []string
	for _, q := range list {
		kept = append(kept, q.ID+" in "+q.Run)
	}
	if want := []string{"s000000bb.1 in ", "s000000bb.2 in r000000bb", "s000000bb.3 in r000000bb", "r000000bb.3 in r000000bb", "r0000beef.0 in r0000beef"}; !slices.Equal(kept, want) {
		t.Errorf("the hostile session's requests %q, want %q", kept, want)
	}
	if list, _ := r.store.Requests(store.RequestFilter{Run: "r00000001"}); len(list) != 2 {
		t.Errorf("the victim's run has %d requests", len(list))
	}
}

// A session id belongs to the producer that began it, attached or not, before and after a restart of the engine.
func TestASessionBelongsToItsProducer(t *testing.T) {
	r := newRig(t, nil)
	victim := r.producer(small)
	c := r.attach(victim, "s000000aa", nil)
	refused := func(when string) {
		t.Helper()
		for _, resume := range []bool{false, true} {
			p := r.producer(small)
			h := hello(p, "s000000aa")
			h["resume"] = resume
			body, _ := json.Marshal(h)
			conn := r.dial()
			if err := conn.Hello(body, p.FDs[:]...); err != nil {
				t.Fatal(err)
			}
			if m, err := conn.Expect("welcome", patience); err == nil || !strings.Contains(fmt.Sprint(m["message"]), "s000000aa") {
				t.Errorf("%s, resume %v: %v %v", when, resume, m, err)
			}
		}
	}
	refused("while it is attached")
	end(t, victim, c)
	r.waitNoSessions()
	refused("after it ended")
	r.stop()
	r.open(nil)
	refused("after a restart")
	if err := r.store.PutRun(tensor.Run{ID: "r000000aa", Session: 7, Tags: []string{"x"}}); err == nil || !strings.Contains(err.Error(), "another session began it") {
		t.Errorf("a run that only the catalogue knows: %v", err)
	}
}
