package serve

import (
	"encoding/json"
	"fmt"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"dmi/store"
)

// deletions deletes a request, and says what is wrong where too little or too much is named.
func (c *conformance) deletions(w *served) {
	c.Helper()
	id := w.requests[0].ID
	for query, want := range map[string]int{"": 400, "?before=0": 400, "?before=x": 400, "?tag=demo&request=" + id: 400, "?request=none": 404, "?request=" + id + "&request=none": 404} {
		c.ask("POST", "/v1/delete"+query, nil, want, query == "" || want == 404 || strings.HasPrefix(query, "?tag="))
	}
	c.get("/v1/tensor?site=resid_post&request="+id, 200) // nothing is deleted yet
	reader := httptest.NewServer(New(Options{Store: w.store, Identity: Identity{ReadOnly: true}}).Local())
	c.Cleanup(reader.Close)
	there := c.base
	c.base = reader.URL
	c.ask("POST", "/v1/delete?request="+id, nil, 409, true)
	c.base = there

	rows := func() (n int) {
		_, text := c.get("/v1/coverage?request="+id, 200)
		var coverage struct {
			Rows     int
			Expired  int
			Outcomes map[string]map[string]int
		}
		if err := json.Unmarshal(text, &coverage); err != nil {
			c.Fatal(err)
		}
		for _, count := range coverage.Outcomes["captured"] {
			n += count
		}
		return n - coverage.Expired
	}
	delete := func(query string) (d store.Deletion) {
		c.Helper()
		_, text := c.ask("POST", "/v1/delete?"+query, nil, 200, true)
		events := sse(c.T, text)
		for _, e := range events[:len(events)-1] {
			c.matches("DeletionProgress", e.data)
		}
		last := events[len(events)-1]
		if last.name != "result" {
			c.Fatalf("delete ended with %s %s", last.name, last.data)
		}
		c.matches("Deletion", last.data)
		if err := json.Unmarshal(last.data, &d); err != nil {
			c.Fatal(err)
		}
		return d
	}
	had := rows()
	if none := delete("before=1"); none.Requests != 0 || rows() != had {
		c.Errorf("of 1970: %+v, %d rows are left of %d", none, rows(), had)
	}
	if d := delete("request=" + id); d.Requests != 1 || int(d.Rows) != had || had == 0 || rows() != 0 {
		c.Errorf("%+v, %d rows are left of %d", d, rows(), had)
	}
	c.get("/v1/requests/"+id, 200)
	if c.get("/v1/tensor?site=resid_post&request="+id, 409); c.Failed() {
		return
	}
	if rest := delete(fmt.Sprintf("before=%d", time.Now().UnixNano())); rest.Requests != len(w.requests) || rest.Rows == 0 {
		c.Errorf("all that began: %+v", rest)
	}
	_, verified := c.ask("POST", "/v1/verify", nil, 200, true)
	events := sse(c.T, verified)
	var result struct {
		OK       bool
		Produced uint64
	}
	if json.Unmarshal(events[len(events)-1].data, &result); !result.OK || result.Produced != w.Rows {
		c.Errorf("verify: %s", events[len(events)-1].data)
	}
}

// TestDeleteByTag: a tag names the requests that have it, and no others.
func TestDeleteByTag(t *testing.T) {
	w := newWorld(t)
	for i := range w.requests {
		w.requests[i].Tags = []string{fmt.Sprint("tag-", i)}
	}
	if err := w.store.PutRequests(w.requests); err != nil {
		t.Fatal(err)
	}
	keys, err := w.server.named(nil, "tag-1", 0)
	if err != nil || len(keys) != 1 || keys[0] != w.requests[1].Key {
		t.Errorf("%v, %v", keys, err)
	}
	if keys, err = w.server.named(nil, "tag-1", 1); err != nil || len(keys) != 0 {
		t.Errorf("none began before 1970: %v, %v", keys, err)
	}
}
