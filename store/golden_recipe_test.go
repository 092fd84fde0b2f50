package store

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"dmi/ring"
	"dmi/tensor"
)

// How the stores in testdata were written; testdata/golden.py says the same in its own words, and what they answer.

// goldenKey is the first session's only request.
var goldenKey = tensor.RequestKey{Session: 1, Request: 1}

// goldenRow is the bytes of a row.
func goldenRow(key tensor.RequestKey, site uint32, attempt uint16, position uint32, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(uint32(i)*7 + uint32(key.Request)*31 + site*5 + position*3 + uint32(attempt)*11 + (key.Session-1)*17)
	}
	return b
}

// writeGolden makes a small store with everything in it that manifest and catalogue of format 1 have.
func writeGolden(t testing.TB, dir string) {
	s := mustOpen(t, dir, Options{HeaderKiB: 16})
	session, err := s.BeginSession(tensor.Session{ID: "s00000001", Producer: strings.Repeat("ab", 16), Mode: "complete", Text: "text", Model: []byte(`{"name":"golden"}`),
		Hooks: []string{"**"}, Begun: time.Unix(100, 0).UTC()})
	must(t, err)
	must(t, s.AddSites(session, []tensor.Site{{ID: 0, Name: "blocks.0.hook_resid_post", Aliases: []string{"resid"}}, {ID: 1, Name: "blocks.0.attn.hook_pattern",
		RowAxis: 1, Keyed: true}, {ID: 2, Name: "expert", Layer: tensor.NoLayer, Optional: true}}))
	must(t, s.PutRun(tensor.Run{ID: "r00000001", Session: session, Labels: map[string]string{"topic": "capitals"}, Tags: []string{"demo"}, Begun: time.Unix(101, 0).UTC()}))
	must(t, s.PutRequests([]tensor.Request{{Key: goldenKey, ID: "r00000001.0", Run: "r00000001", Tokens: []int64{5, 6, 7, 8}, Text: "hello",
		Begun: time.Unix(102, 0).UTC()}}))
	records, table := stepRecords(1, 3, []ring.Span{{Request: 1, Count: 4}})
	must(t, s.AppendStep(Step{Session: session, Count: 2, Records: records, Tables: [][]byte{table}}))
	key := goldenKey
	var resid, pattern []byte
	for p := range uint32(3) {
		resid = append(resid, goldenRow(key, 0, 0, p, 16)...)
		pattern = append(pattern, goldenRow(key, 1, 0, p, 2*4*4)...)
	}
	must(t, s.AppendChunk(tensor.Chunk{Key: key, Rows: 3, Step: 1, LastStep: 1, DType: tensor.BF16, Shape: []int{8}, Data: resid}))
	must(t, s.AppendChunk(tensor.Chunk{Key: key, Site: 1, Rows: 3, Step: 1, LastStep: 1, DType: tensor.F32, Shape: []int{2, 4}, Data: pattern}))
	must(t, s.AppendChunk(tensor.Chunk{Key: key, Site: 2, First: 1, Rows: 1, Step: 1, LastStep: 1, DType: tensor.C128, Shape: []int{1}, Data: goldenRow(key, 2, 0, 1, 16)}))
	must(t, s.Book([]tensor.Entry{{Key: key, Sites: []uint32{0, 1}, Count: 3, Stride: 1, Step: 1, Outcome: tensor.Captured},
		{Key: key, Sites: []uint32{0, 1}, First: 3, Count: 1, Stride: 1, Step: 1, Outcome: tensor.Dropped, Reason: tensor.RingFull},
		{Key: key, Sites: []uint32{2}, First: 1, Count: 1, Stride: 1, Step: 1, Outcome: tensor.Captured}}))
	must(t, s.PutRequests([]tensor.Request{{Key: key, Ended: time.Unix(103, 0).UTC(), Reason: "finished"}}))
	must(t, s.EndSession(session, time.Unix(104, 0).UTC()))
	must(t, s.Close())
	must(t, os.Remove(filepath.Join(dir, "lock")))
}

// goldenSites are those of the second session, and at what level they are kept.
var goldenSites = []struct {
	name  string
	dtype tensor.DType
	level tensor.Level
	shape []int
}{{"blocks.0.hook_resid_post", tensor.BF16, tensor.Full, []int{8}}, {"blocks.0.hook_mlp_out", tensor.F32, tensor.Int8, []int{8}},
	{"blocks.0.hook_attn_out", tensor.F32, tensor.Stats, []int{tensor.Figures}}, {"tokens", tensor.I64, tensor.Full, []int{}}}

// goldenSession plays the second session.
type goldenSession struct {
	t       testing.TB
	s       *Store
	session uint32
	step    uint64
}

func (g *goldenSession) key(request uint64) tensor.RequestKey {
	return tensor.RequestKey{Session: g.session, Request: request}
}

// forward is a step with rows of some requests at every site.
func (g *goldenSession) forward(spans ...ring.Span) {
	g.step++
	records, table := stepRecords(g.step, len(goldenSites), spans)
	must(g.t, g.s.AppendStep(Step{Session: g.session, First: 2 * (g.step - 1), Count: 2, Records: records, Tables: [][]byte{table}}))
}

// capture is the rows of a span at some sites, and their books.
func (g *goldenSession) capture(span ring.Span, policy uint64, reason tensor.Reason, sites ...uint32) {
	for _, id := range sites {
		site := goldenSites[id]
		c := tensor.Chunk{Key: g.key(span.Request), Site: id, Attempt: span.Attempt, First: span.Position, Rows: span.Count, Step: g.step, LastStep: g.step, DType: site.dtype,
			Level: site.level, Policy: policy, Shape: site.shape}
		for i := range span.Count {
			c.Data = append(c.Data, goldenRow(c.Key, id, span.Attempt, span.Position+i, tensor.RowBytes(site.level, site.dtype, site.shape))...)
		}
		must(g.t, g.s.AppendChunk(c))
		must(g.t, g.s.Book([]tensor.Entry{{Key: c.Key, Sites: []uint32{id}, Attempt: span.Attempt, First: span.Position, Count: span.Count, Stride: 1, Step: g.step,
			Outcome: tensor.Captured, Reason: reason, Level: site.level, Policy: policy}}))
	}
}

func (g *goldenSession) seal() {
	must(g.t, g.s.barrier(context.Background(), &barrier{done: make(chan error, 1), seal: true}))
}

// goOnGolden adds what later formats of manifest and catalogue have besides: rows at lower levels, under a policy, computed again and given again, a request that was
// deleted, segments that took others' place. The engine is then closed in order; or killed, with a segment open and rows on their way, and dir is what that leaves.
func goOnGolden(t testing.TB, dir string, kill bool) {
	at := dir
	if kill {
		at = filepath.Join(t.TempDir(), "alive")
		must(t, os.Rename(dir, at))
	}
	s := mustOpen(t, at, Options{HeaderKiB: 16, TidyEvery: time.Hour})
	session, err := s.BeginSession(tensor.Session{ID: "s00000002", Producer: strings.Repeat("cd", 16), Mode: "best_effort", Text: "text", Begun: time.Unix(200, 0).UTC()})
	must(t, err)
	g := &goldenSession{t: t, s: s, session: session}
	var sites []tensor.Site
	for i, site := range goldenSites {
		sites = append(sites, tensor.Site{ID: uint32(i), Name: site.name})
	}
	must(t, s.AddSites(session, sites))
	must(t, s.PutRequests([]tensor.Request{
		{Key: g.key(1), ID: "r00000002.0", Tokens: []int64{9, 10}, Text: "kept", Pieces: []string{"ke", "pt"}, Begun: time.Unix(201, 0).UTC()},
		{Key: g.key(2), ID: "r00000002.1", Tokens: []int64{918273645}, Text: "deleted", Tags: []string{"private"}, Begun: time.Unix(201, 0).UTC()},
		{Key: g.key(3), ID: "r00000002.2", Begun: time.Unix(201, 0).UTC()}}))
	for step := range uint32(3) {
		spans := []ring.Span{{Request: 1, Position: 2 * step, Count: 2}, {Request: 2, Position: 2 * step, Count: 2}, {Request: 3, Position: 2 * step, Count: 2}}
		g.forward(spans...)
		for _, span := range spans {
			g.capture(span, 0, tensor.ReasonNone, 0, 1, 2, 3)
		}
		g.seal()
	}
	again, ruled := ring.Span{Request: 3, Position: 4, Count: 2, Attempt: 1}, ring.Span{Request: 1, Position: 6, Count: 2}
	g.forward(again, ruled)
	g.capture(again, 0, tensor.ReasonNone, 0, 1, 2, 3)
	g.capture(ruled, 3, tensor.ReasonNone, 0, 1)
	must(t, s.Book([]tensor.Entry{{Key: g.key(1), Sites: []uint32{2, 3}, First: 6, Count: 2, Stride: 1, Step: g.step, Outcome: tensor.Skipped, Reason: tensor.Policy, Policy: 3}}))
	must(t, s.PutRequests([]tensor.Request{{Key: g.key(1), Ended: time.Unix(203, 0).UTC(), Reason: "finished"}}))
	g.seal()
	_, err = s.Delete(context.Background(), []tensor.RequestKey{g.key(2)}, nil)
	must(t, err)
	_, err = s.Compact(context.Background(), nil)
	must(t, err)
	last, cut := ring.Span{Request: 3, Position: 6, Count: 2}, ring.Span{Request: 3, Position: 8, Count: 1}
	g.forward(last)
	g.capture(last, 0, tensor.Repeated, 0)
	g.capture(last, 0, tensor.ReasonNone, 1, 2, 3)
	must(t, s.Barrier(context.Background()))
	g.forward(cut)
	if kill {
		must(t, os.CopyFS(dir, os.DirFS(at)))
		must(t, os.Remove(filepath.Join(dir, "catalogue.sqlite-shm")))
		must(t, s.Close())
	} else {
		must(t, s.Book([]tensor.Entry{{Key: g.key(3), Sites: []uint32{0, 1, 2, 3}, First: 8, Count: 1, Stride: 1, Step: g.step, Outcome: tensor.Dropped, Reason: tensor.RingFull}}))
		must(t, s.EndSession(session, time.Unix(204, 0).UTC()))
		must(t, s.Close())
	}
	must(t, os.Remove(filepath.Join(dir, "lock")))
}
