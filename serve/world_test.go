package serve

import (
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"dmi/internal/leaks"
	"dmi/internal/samplestore"
	"dmi/internal/vfs"
	"dmi/live"
	"dmi/policy"
	"dmi/serve/audit"
	"dmi/steer"
	"dmi/store"
	"dmi/tensor"
	"dmi/trigger"
)

func TestMain(m *testing.M) {
	leaks.Main(m)
}

// served is a server over a real store with the sample in it, and a live hub.
type served struct {
	*samplestore.Sample
	requests []tensor.Request
	store    *store.Store
	hub      *live.Hub
	server   *Server
	auditDir string
}

type sampleNames struct{ *samplestore.Sample }

func (n sampleNames) SessionID(number uint32) (string, bool) {
	return n.Session.ID, number == n.Session.Number
}
func (n sampleNames) Sites(uint32) ([]tensor.Site, error) { return n.Sample.Sites, nil }
func (n sampleNames) RequestID(k tensor.RequestKey) (string, bool) {
	if k.Request >= uint64(len(n.Requests)) {
		return "", false
	}
	return n.Requests[k.Request].ID, true
}
func (n sampleNames) Introduced(k tensor.RequestKey, _ time.Time) (string, bool) {
	return n.RequestID(k)
}

func newWorld(t *testing.T) *served {
	t.Helper()
	s, err := store.Open(t.TempDir(), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	sample, err := samplestore.Fill(s, "s0000beef")
	if err != nil {
		t.Fatal(err)
	}
	w := &served{Sample: sample, requests: sample.Requests, store: s, auditDir: filepath.Join(t.TempDir(), "audit"), hub: live.NewHub(sampleNames{sample}, live.Options{QueueFrames: 8})}
	t.Cleanup(w.hub.Close)
	log, err := audit.Open(vfs.OS{}, w.auditDir, audit.Options{Engine: "e00000001", Wait: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { log.Close() })
	ledger, err := policy.OpenLedger(vfs.OS{}, s.Dir(), true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ledger.Close() })
	watch := trigger.New(trigger.Options{Names: sampleNames{sample}})
	t.Cleanup(watch.Close)
	helm, err := steer.New(steer.Options{Ledger: ledger, Store: s, Watch: watch, Dir: s.Dir()})
	if err != nil {
		t.Fatal(err)
	}
	w.server = New(Options{Policy: helm, Formats: map[string]int{"store": 1}, Identity: Identity{ID: "e00000001", Version: "test", Store: s.Dir(), Started: time.Now()}, Store: s, Live: w.hub,
		Troubles: func() Troubles { return Troubles{Stopped: 5 * time.Second, Refused: 2, Expelled: 1} },
		Attached: func() []Attached {
			return []Attached{{Session: sample.Session.ID, Number: sample.Session.Number, Mode: "complete", Model: "sample", AttachedAt: time.Now(),
				Occupancies: map[string]Occupancy{"staging_bytes": {Used: 1, Capacity: 4096}}, Steps: 2, OtherRows: map[string]uint64{"ring_full": 1}}}
		},
		Flush: s.Barrier, Config: []map[string]any{{"key": "store.path", "value": s.Dir(), "origin": "default", "help": ""}}, Log: slog.New(slog.DiscardHandler),
		Heartbeat: 50 * time.Millisecond, StallTimeout: 5 * time.Second, Audit: log})
	t.Cleanup(w.server.Stop)
	return w
}
