package steer

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"dmi/control"
	"dmi/internal/samplestore"
	"dmi/internal/vfs"
	"dmi/policy"
	"dmi/store"
	"dmi/tensor"
	"dmi/trigger"
)

// world is a helm over a real store and ledger, whose producers' server nobody is attached to.
type world struct {
	*Helm
	sample *samplestore.Sample
	store  *store.Store
	ledger *policy.Ledger
	mu     sync.Mutex
	events []string
}

type named struct{ *samplestore.Sample }

func (n named) SessionID(uint32) (string, bool)              { return n.Session.ID, true }
func (n named) Sites(uint32) ([]tensor.Site, error)          { return n.Sample.Sites, nil }
func (n named) RequestID(k tensor.RequestKey) (string, bool) { return n.Requests[k.Request].ID, true }
func (n named) PolicyRequest(k tensor.RequestKey) (policy.Request, bool) {
	return policy.Request{ID: n.Requests[k.Request].ID}, true
}

func newWorld(t *testing.T, files vfs.FS) *world {
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
	if files == nil {
		files = vfs.OS{}
	}
	w := &world{sample: sample, store: s}
	if w.ledger, err = policy.OpenLedger(files, s.Dir(), true); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.ledger.Close() })
	watch := trigger.New(trigger.Options{Names: named{sample}})
	t.Cleanup(watch.Close)
	w.Helm, err = New(Options{Ledger: w.ledger, Store: s, Watch: watch, Requests: named{sample}, Dir: s.Dir(), Event: func(level, code, message string) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.events = append(w.events, level+" "+code+": "+message)
	}})
	if err != nil {
		t.Fatal(err)
	}
	w.Steer(control.New(control.Options{Store: s}))
	return w
}

func (w *world) told() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	defer func() { w.events = nil }()
	return strings.Join(w.events, "\n")
}

func (w *world) set(t *testing.T, document string) policy.Revision {
	t.Helper()
	s, err := w.Set([]byte(document), "test")
	if err != nil {
		t.Fatal(err)
	}
	return s.Revision
}

// kept says of the residual's rows of request 0 which a revision keeps, of positions 0 to 5.
func kept(p *policy.Plan, request uint64) string {
	if p == nil {
		return "all"
	}
	var b strings.Builder
	for position := range uint32(6) {
		mark := byte('-')
		if said, _ := p.Row(samplestore.SiteResid, policy.Request{Number: request, ID: fmt.Sprint(request), Prompt: 2}, policy.Token{Position: position, Phase: policy.Phase(min(position/2, 1))}); said.Kept {
			mark = 'x'
		}
		b.WriteByte(mark)
	}
	return b.String()
}

// Steps that are still on their way are cut by the revision that they were under, however many came since.
func TestPlansOfEarlierRevisions(t *testing.T) {
	w := newWorld(t, nil)
	rules := w.Rules(w.sample.Session.Number, "best-effort")
	first := w.set(t, "default: off\nrules: [{tokens: 'generated[:2]', level: full}]").Number
	second := w.set(t, "rules: [{phase: decode, level: sampled/3}]").Number
	if err := w.Lower(second, map[int]policy.Level{0: {Level: tensor.Off}, -1: {Level: tensor.Sampled, Stride: 2}}, "a test presses"); err != nil {
		t.Fatal(err)
	}
	third := w.Status().Revision.Number
	if _, err := w.Brake(true, "test"); err != nil {
		t.Fatal(err)
	}
	fourth := w.Status().Revision.Number
	check := func() {
		t.Helper()
		for revision, want := range map[uint64]string{0: "xxxxxx", first: "--xx--", second: "xx-x--", third: "x-----", fourth: "------"} {
			if got := kept(rules.Plan(revision, len(w.sample.Sites)), 0); got != want {
				t.Errorf("revision %d: %s, want %s", revision, got, want)
			}
		}
		// What waits gives nothing up.
		if got := kept(w.Rules(w.sample.Session.Number, complete).Plan(third, len(w.sample.Sites)), 0); got != "xx-x--" {
			t.Errorf("lowered in complete mode: %s", got)
		}
	}
	check()
	for range keptForces + 1 { // from now on they come from the ledger
		if _, err := w.Brake(!w.Status().Revision.Off, "test"); err != nil {
			t.Fatal(err)
		}
	}
	if _, at := w.past[0].document, w.past[0].revision.Number; at <= fourth {
		t.Fatalf("revision %d is still at hand", at)
	}
	check()
	w.told()
	if p := rules.Plan(99999, 1); p != nil || !strings.Contains(w.told(), "99999") {
		t.Errorf("a revision that never was: %v", p)
	}
}

func TestPromotions(t *testing.T) {
	w := newWorld(t, nil)
	session := w.sample.Session.Number
	document := "default: off\ntriggers:\n- {name: one, when: {nonfinite: true}, promote: resid_post}\n- {name: two, when: {nonfinite: true}}\n"
	revision := w.set(t, document).Number
	fire := func(trigger_ string, request uint64, id string, revision uint64) {
		w.promote(trigger.Firing{Trigger: trigger_, Request: id, Revision: revision, Key: tensor.RequestKey{Session: session, Request: request}})
	}
	fire("one", 7, "seven", revision)
	now := w.Status().Revision
	if len(now.Promoted) != 1 || now.Number != revision+1 || !strings.Contains(now.Why, "promoted: one: request seven") {
		t.Fatalf("%+v", now)
	}
	plan := w.Rules(session, "best-effort").Plan(now.Number, len(w.sample.Sites))
	if a, b := kept(plan, 7), kept(plan, 8); a != "xxxxxx" || b != "------" {
		t.Errorf("promoted %s, not %s", a, b)
	}
	gates, _ := w.Gates().Of(session, "best-effort", w.sample.Sites)
	if resid := gates[samplestore.SiteResid]; resid.Level != tensor.Off || len(resid.Clauses) != 1 || !resid.Clauses[0].One || resid.Clauses[0].Request != 7 || !gates[samplestore.SiteTokens].Off() {
		t.Errorf("gates %v: those of request 7 alone are wanted", gates)
	}
	if gates, _ := w.Gates().Of(session+1, "best-effort", w.sample.Sites); !gates[samplestore.SiteResid].Off() {
		t.Errorf("gates of another session %v", gates)
	}
	fire("one", 7, "seven", revision) // again
	fire("one", 9, "nine", revision+5)
	if again := w.Status().Revision.Number; again != now.Number {
		t.Errorf("revision %d: nothing new, and a document that is not in force, change nothing", again)
	}
	for n := range uint64(MaxPromoted) { // one too many
		fire("one", 100+n, fmt.Sprint(100+n), revision)
	}
	if list := w.Status().Revision.Promoted; len(list) != MaxPromoted || list[0].Request != 100 {
		t.Errorf("%d are promoted, the first %+v", len(list), list[0])
	}
	// A request that has ended is let go; those that the store does not know stay.
	own := w.sample.Requests[1]
	fire("one", own.Key.Request, own.ID, revision)
	if n := len(w.Status().Revision.Promoted); n != MaxPromoted {
		t.Errorf("%d are promoted", n)
	}
	w.release()
	after := w.Status().Revision
	if len(after.Promoted) != MaxPromoted-1 || !strings.Contains(after.Why, own.ID) {
		t.Errorf("%d are promoted: %s", len(after.Promoted), after.Why)
	}
	if w.release(); w.Status().Revision.Number != after.Number {
		t.Error("a second look changes something")
	}
	if after := w.set(t, document); len(after.Promoted) != 0 {
		t.Errorf("%+v", after)
	}
	// An engine that starts anew has seen nothing fire.
	fire("one", 7, "seven", w.Status().Revision.Number)
	again, err := New(Options{Ledger: w.ledger, Store: w.store})
	if err != nil || len(again.Status().Revision.Promoted) != 0 {
		t.Errorf("%v, %+v", err, again.Status().Revision)
	}
}

var errDisk = errors.New("the disk is broken")

type breakable struct {
	vfs.FS
	broken bool
}

func (b *breakable) Open(name string, write bool) (vfs.File, error) {
	if b.broken {
		return nil, errDisk
	}
	f, err := b.FS.Open(name, write)
	return breakableFile{f, b}, err
}

func (b *breakable) Create(name string, direct bool) (vfs.File, error) {
	if b.broken {
		return nil, errDisk
	}
	f, err := b.FS.Create(name, direct)
	return breakableFile{f, b}, err
}

type breakableFile struct {
	vfs.File
	disk *breakable
}

func (f breakableFile) WriteAt(p []byte, off int64) (int, error) {
	if f.disk.broken {
		return 0, errDisk
	}
	return f.File.WriteAt(p, off)
}

// The brake acts even where nothing can be written down; no other change does.
func TestTheBrakeActsOnABrokenDisk(t *testing.T) {
	disk := &breakable{FS: vfs.OS{}}
	w := newWorld(t, disk)
	w.set(t, "rules: [{name: all, level: full}]")
	disk.broken = true
	if _, err := w.Set([]byte("default: off"), "test"); !errors.Is(err, errDisk) {
		t.Errorf("%v", err)
	}
	if s := w.Status(); s.Default != "full" || s.Rules[0].InForce != "full" {
		t.Errorf("%+v", s)
	}
	s, err := w.Brake(true, "test")
	if err != nil || !s.Revision.Off || !strings.Contains(w.told(), "the brake acts, but could not be written down") {
		t.Errorf("%v %+v", err, s)
	}
	if gates, _ := w.Gates().Of(w.sample.Session.Number, "complete", w.sample.Sites); !gates[samplestore.SiteResid].Off() {
		t.Errorf("%v", gates)
	}
}

// A governor's step that was decided under another document changes nothing.
func TestStepsOfAnotherDocumentAreLate(t *testing.T) {
	w := newWorld(t, nil)
	old := w.set(t, "rules: [{level: full}]").Number
	now := w.set(t, "rules: [{level: full}, {level: off}]").Number
	if err := w.Lower(old, map[int]policy.Level{0: {Level: tensor.Off}}, "late"); err != nil {
		t.Fatal(err)
	}
	if s := w.Status(); s.Revision.Number != now || len(s.Revision.Lowered) != 0 {
		t.Errorf("%+v", s.Revision)
	}
}

// A probe that is gone when an engine starts stops no capturing.
func TestLostProbes(t *testing.T) {
	w := newWorld(t, nil)
	if _, err := w.ledger.Add(policy.Revision{Text: "triggers: [{name: lies, when: {probe: gone, above: 0}}]", Why: "test"}); err != nil {
		t.Fatal(err)
	}
	var told string
	watch := trigger.New(trigger.Options{Names: named{w.sample}})
	t.Cleanup(watch.Close)
	h, err := New(Options{Ledger: w.ledger, Store: w.store, Watch: watch, Dir: w.store.Dir(), Event: func(_, _, message string) { told += message }})
	if err != nil || !strings.Contains(told, "no trigger of revision 1") || len(h.Status().Triggers) != 1 {
		t.Errorf("%v, %s", err, told)
	}
}

// What triggers keep of a step is kept whatever overload has pushed the rules to: a request that is looked for is not what there is too much of.
func TestLoweredRulesDoNotLowerWhatTriggersKeep(t *testing.T) {
	w := newWorld(t, nil)
	document := w.set(t, "rules: [{hooks: resid_post, level: full}]\ntriggers: [{hooks: resid_post, when: {nonfinite: true}, keep: [logits]}]").Number
	gates := func() (list []tensor.Gate) {
		list, watches := w.Gates().Of(w.sample.Session.Number, "best-effort", w.sample.Sites)
		if len(watches) != 1 || !watches[0].NonFinite {
			t.Fatal(watches)
		}
		return list
	}
	before := gates()
	if err := w.Lower(document, map[int]policy.Level{0: {Level: tensor.Off}, -1: {Level: tensor.Off}}, "a test presses"); err != nil {
		t.Fatal(err)
	}
	kept := 0
	for i, now := range gates() {
		if now.Level != tensor.Off {
			t.Errorf("site %d is at %v", i, now.Level)
		}
		if now.Watch != before[i].Watch || now.Keep != before[i].Keep || now.Offer != before[i].Offer {
			t.Errorf("site %d: %+v, before %+v", i, now, before[i])
		}
		if now.Keep != 0 {
			kept++
		}
	}
	if kept == 0 {
		t.Error("nothing is kept")
	}
}
