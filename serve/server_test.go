package serve

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"dmi/internal/samplestore"
	"dmi/store"
	"dmi/tensor"
)

func inProcessClient(w *served) *http.Client {
	return &http.Client{Transport: InProcess(w.server.Local())}
}

func fetch(t *testing.T, client *http.Client, path string) (http.Header, []byte) {
	t.Helper()
	answer, err := client.Get("http://engine/v1" + path)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err != nil || answer.StatusCode != 200 {
		t.Fatalf("GET %s: %d %s %v", path, answer.StatusCode, body, err)
	}
	return answer.Header, body
}

// The bytes are those that went in, with the reader's shape.
func TestTensorBytes(t *testing.T) {
	w := newWorld(t)
	client := inProcessClient(w)
	header, body := fetch(t, client, "/tensor?site=resid_post&tokens=2:5&request="+w.requests[0].ID)
	if got := []string{header.Get("Dmi-Dtype"), header.Get("Dmi-Shape"), header.Get("Dmi-Axes"), header.Get("Dmi-Positions"), header.Get("Dmi-Complete"), header.Get("Dmi-Missing"), header.Get("Dmi-Site")}; strings.Join(got, " ") !=
		"F32 3,4 token,dim 2:5 true 0 blocks.0.hook_resid_post" {
		t.Errorf("headers %q", got)
	}
	for i := range 12 {
		if got, want := math.Float32frombits(binary.LittleEndian.Uint32(body[4*i:])), samplestore.Resid(0, 2+i/4, i%4); got != want {
			t.Errorf("element %d: %v, want %v", i, got, want)
		}
	}
	header, body = fetch(t, client, "/tensor?site=pattern&heads=1,0&tokens=1:3&request="+w.requests[0].ID)
	if shape := header.Get("Dmi-Shape"); shape != "2,2,3" || len(body) != 48 {
		t.Fatalf("shape %s, %d bytes", shape, len(body))
	}
	for i := range 12 {
		head, query, key := 1-i/6, 1+i/3%2, i%3
		want := float32(0)
		if key <= query {
			want = samplestore.Pattern(head, query, key)
		}
		if got := math.Float32frombits(binary.LittleEndian.Uint32(body[4*i:])); got != want {
			t.Errorf("head %d query %d key %d: %v, want %v", head, query, key, got, want)
		}
	}
	header, body = fetch(t, client, "/tensor?site=resid_post&partial=true&request="+w.requests[1].ID)
	if len(body) != 32 || header.Get("Dmi-Positions") != "0:1,2:3" || header.Get("Dmi-Complete") != "false" || header.Get("Dmi-Missing") != "1" {
		t.Errorf("partial: %d bytes, %v", len(body), header)
	}
}

func TestRowsPageByPage(t *testing.T) {
	w := newWorld(t)
	client := inProcessClient(w)
	var all []byte
	var whose []string
	after := ""
	for {
		header, body := fetch(t, client, "/rows?site=tokens&limit=4&run="+w.Run.ID+"&after="+url.QueryEscape(after))
		all = append(all, body...)
		whose = append(whose, header.Get("Dmi-Requests"))
		if after = header.Get("Dmi-Next"); after == "" {
			break
		}
	}
	a, b := w.requests[0].ID, w.requests[1].ID
	if got, want := strings.Join(whose, ";"), a+":0:4;"+a+":4:2,"+b+":0:2;"+b+":2:1"; got != want {
		t.Errorf("pages %s, want %s", got, want)
	}
	for i := range 9 {
		request, position := i/6, i%6
		if got := int64(binary.LittleEndian.Uint64(all[8*i:])); got != samplestore.Token(request, position) {
			t.Errorf("row %d: %d", i, got)
		}
	}
}

func TestHeaderSafeIsUndoneByUnescaping(t *testing.T) {
	for _, id := range []string{"r1.0", "a,b:c%d", "chatcmpl-ünï", "x y\x00\n"} {
		safe := headerSafe(id)
		if back, err := url.PathUnescape(safe); err != nil || back != id || strings.ContainsAny(safe, ",: \n") {
			t.Errorf("%q -> %q -> %q %v", id, safe, back, err)
		}
	}
}

// A reader that stops reading is cut off, does not hold others up, and what it lost is counted.
func TestStalledReaderIsCutOff(t *testing.T) {
	w := newWorld(t)
	w.server.options.StallTimeout = 300 * time.Millisecond
	server := httptest.NewServer(w.server.Local())
	defer server.Close()
	connection, err := net.Dial("tcp", server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer connection.Close()
	if _, err := io.WriteString(connection, "GET /v1/live/tensors HTTP/1.1\r\nHost: localhost\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	wide := tensor.Chunk{Key: w.requests[0].Key, Site: 1, Rows: 1, DType: tensor.F32, Shape: []int{1 << 18}, Data: make([]byte, 1<<20)}
	deadline := time.Now().Add(time.Minute)
	for w.hub.Metrics().Subscribers == 0 && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond)
	}
	var slowest time.Duration
	for w.hub.Metrics().Subscribers > 0 && time.Now().Before(deadline) {
		at := time.Now()
		w.hub.Publish(w.Session.Number, []tensor.Chunk{wide})
		slowest = max(slowest, time.Since(at))
		time.Sleep(time.Millisecond)
	}
	m := w.hub.Metrics()
	if m.Subscribers != 0 {
		t.Error("the reader was never cut off")
	}
	if m.DroppedRows == 0 {
		t.Error("nothing was counted as dropped")
	}
	if slowest > 20*time.Second {
		t.Errorf("publishing once took %v", slowest)
	}
}

// A slow reader is told in the stream itself how much it lost.
func TestSlowReaderIsTold(t *testing.T) {
	w := newWorld(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	request, _ := http.NewRequestWithContext(ctx, "GET", "http://engine/v1/live/stats", nil)
	answer, err := inProcessClient(w).Do(request) // its pipe holds nothing: the handler waits in its first write
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	const published = 100
	for i := range uint32(published) {
		w.hub.Publish(w.Session.Number, []tensor.Chunk{{Key: w.requests[0].Key, Site: 1, First: i, Rows: 1, DType: tensor.F32, Shape: []int{1}, Data: make([]byte, 4)}})
	}
	total, dropped := uint64(0), uint64(0)
	text := make([]byte, 0, 1<<16)
	block := make([]byte, 4096)
	for total < published {
		n, err := answer.Body.Read(block)
		if err != nil {
			t.Fatal(err)
		}
		text = append(text, block[:n]...)
		end := bytes.LastIndex(text, []byte("\n\n"))
		if end < 0 {
			continue
		}
		for _, e := range sse(t, text[:end+2]) {
			switch e.name {
			case "stats":
				var lines []json.RawMessage
				if err := json.Unmarshal(e.data, &lines); err != nil {
					t.Fatal(err)
				}
				total += uint64(len(lines))
			case "dropped":
				var d droppedAnswer
				if err := json.Unmarshal(e.data, &d); err != nil {
					t.Fatal(err)
				}
				total, dropped = total+d.Rows, dropped+d.Rows
			}
		}
		text = text[end+2:]
	}
	if total != published || dropped == 0 || dropped != w.hub.Metrics().DroppedRows {
		t.Errorf("delivered and dropped: %d of %d, %d dropped, the hub counts %d", total, published, dropped, w.hub.Metrics().DroppedRows)
	}
}

// brokenStore fails in the middle of reading.
type brokenStore struct {
	*store.Store
	after atomic.Int64 // reads that still succeed
}

var errBroken = errors.New("the disk is on fire")

func (b *brokenStore) ReadRows(ref store.ChunkRef, from, to uint32, dst []byte) error {
	if b.after.Add(-1) < 0 {
		return errBroken
	}
	return b.Store.ReadRows(ref, from, to, dst)
}

// An answer that breaks off never looks whole: over a socket, nor in process.
func TestBrokenAnswersDoNotLookWhole(t *testing.T) {
	w := newWorld(t)
	for after := range 3 {
		broken := &brokenStore{Store: w.store}
		server := New(Options{Store: broken})
		defer server.Stop()
		socket := httptest.NewServer(server.Local())
		defer socket.Close()
		for name, client := range map[string]*http.Client{"socket": socket.Client(), "in process": {Transport: InProcess(server.Local())}} {
			for _, path := range []string{"/export?request=" + w.requests[0].ID, "/stats?request=" + w.requests[0].ID, "/tensor?site=resid_post&request=" + w.requests[0].ID} {
				broken.after.Store(int64(after))
				answer, err := client.Get(socket.URL + "/v1" + path)
				if err != nil {
					continue // it did not even begin
				}
				_, err = io.ReadAll(answer.Body)
				answer.Body.Close()
				if broken.after.Load() < 0 && err == nil && answer.StatusCode == 200 {
					t.Errorf("%s, %s, broken after %d reads: looks whole", name, path, after)
				}
			}
		}
	}
}

// A body is refused, and one that never comes does not hold the connection.
func TestBodiesAreRefused(t *testing.T) {
	w := newWorld(t)
	server := httptest.NewServer(w.server.Remote(gate(t)))
	defer server.Close()
	for token, want := range map[string]string{"": "401", "Authorization: Bearer " + tokenOf(ScopeAdmin) + "\r\n": "400"} {
		connection, err := net.Dial("tcp", server.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer connection.Close()
		connection.SetDeadline(time.Now().Add(time.Minute))
		fmt.Fprintf(connection, "POST /v1/flush HTTP/1.1\r\nHost: localhost\r\n%sContent-Length: 1000\r\n\r\nx", token)
		text, err := io.ReadAll(connection)
		if err != nil || !strings.HasPrefix(string(text), "HTTP/1.1 "+want) {
			t.Errorf("%v %s", err, text)
		}
	}
}

func TestTooManyRequests(t *testing.T) {
	w := newWorld(t)
	w.server.inUse = make(chan struct{}, 1)
	w.server.inUse <- struct{}{}
	for path, want := range map[string]int{"/v1/status": 503, "/healthz": 200, "/readyz": 200} {
		answer := httptest.NewRecorder()
		w.server.Local().ServeHTTP(answer, httptest.NewRequest("GET", path, nil))
		if answer.Code != want {
			t.Errorf("%s: %d, want %d", path, answer.Code, want)
		}
	}
}

func TestStopEndsStreamsInGoodOrder(t *testing.T) {
	w := newWorld(t)
	server := httptest.NewServer(w.server.Local())
	defer server.Close()
	var bodies []io.ReadCloser
	for _, path := range []string{"/v1/live/events", "/v1/live/tensors"} {
		answer, err := server.Client().Get(server.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		bodies = append(bodies, answer.Body)
	}
	time.AfterFunc(50*time.Millisecond, w.server.Stop)
	for i, body := range bodies {
		text, err := io.ReadAll(body)
		if err != nil {
			t.Errorf("the stream broke: %v", err)
		}
		if end := []byte("\x00\x00\x00\x00\xff\xff\xff\xff"); i == 1 && !bytes.HasSuffix(text, end) {
			t.Errorf("a stream of tensors ends with %x", text)
		}
	}
}

func TestRates(t *testing.T) {
	var m rateMeter
	at := time.Unix(100, 0)
	for _, c := range []struct {
		after time.Duration
		rows  uint64
		want  Rates
	}{
		{0, 1000, Rates{}}, {500 * time.Millisecond, 1500, Rates{}}, {time.Second, 3000, Rates{2000, 20000, 1}}, {1500 * time.Millisecond, 3000, Rates{2000 / 1.5, 20000 / 1.5, 1.5}},
		{3 * time.Second, 3000, Rates{0, 0, 2}}, {4 * time.Second, 10, Rates{}},
	} {
		if got := m.rates(rateSample{at.Add(c.after), c.rows, 10 * c.rows}); got != c.want {
			t.Errorf("after %v: %+v, want %+v", c.after, got, c.want)
		}
	}
}

// FuzzArguments: whatever the parameters, an answer comes, and it is never a failure of the engine's own.
func FuzzArguments(f *testing.F) {
	for _, seed := range []string{"request=r0000beef.0&site=resid_post&tokens=1:3", "site=%2A%2A&per=row", "tokens=-1:&heads=0,,1", "layer=-9&steps=:", "a=%zz;b", "label=a=b&label=", "limit=99999999999999999999",
		"request=r0000beef.0&site=pattern&heads=1,0&tokens=0:99999999999&as=F32&level=any&partial=true", "after=%00", "run=r0000beef&site=logits&limit=1"} {
		for route := range uint8(12) {
			f.Add(route, seed)
		}
	}
	s, err := store.Open(f.TempDir(), store.Options{})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { s.Close() })
	if _, err := samplestore.Fill(s, "s0000beef"); err != nil {
		f.Fatal(err)
	}
	server := New(Options{Store: s})
	f.Cleanup(server.Stop)
	handler := server.Local()
	paths := []string{"/runs", "/requests", "/sites", "/coverage", "/tensor", "/rows", "/stats", "/topkeys", "/export", "/live/events", "/live/stats", "/requests/r0000beef.0"}
	f.Fuzz(func(t *testing.T, route uint8, arguments string) {
		request := httptest.NewRequest("GET", "/", nil)
		request.URL = &url.URL{Path: "/v1" + paths[int(route)%len(paths)], RawQuery: arguments}
		answer := httptest.NewRecorder()
		handler.ServeHTTP(answer, request)
		if answer.Code >= 500 {
			t.Errorf("%s?%s: %d %s", request.URL.Path, arguments, answer.Code, answer.Body)
		}
	})
}
