package serve

import (
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"slices"
	"strconv"
	"time"

	"dmi/query"
	"dmi/store"
	"dmi/tensor"
)

func writeJSON(w *writer, answer any) error {
	text, err := json.Marshal(answer)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(text)+1))
	_, err = w.Write(append(text, '\n'))
	return err
}

// list is the form of every list.
type list[T any] struct {
	Items []T     `json:"items"`
	Next  *string `json:"next"`
}

func writeList[T any](w *writer, items []T, next string) error {
	if items == nil {
		items = []T{}
	}
	l := list[T]{Items: items}
	if next != "" {
		l.Next = &next
	}
	return writeJSON(w, l)
}

type statusAnswer struct {
	Engine   engineStatus      `json:"engine"`
	Store    storeStatus       `json:"store"`
	Books    *query.Coverage   `json:"books"`
	Produced uint64            `json:"produced"` // rows owed, counted apart from the books; those beyond books.rows are being decided
	Rates    Rates             `json:"rates"`
	Bytes    map[string]uint64 `json:"bytes"` // by outcome, since the engine started
	Attached []Attached        `json:"attached"`
	Live     *liveStatus       `json:"live"`
}

type engineStatus struct {
	ID       string    `json:"id"`
	Version  string    `json:"version"`
	Revision string    `json:"revision"`
	Started  time.Time `json:"started"`
	Uptime   float64   `json:"uptime_seconds"`
	ReadOnly bool      `json:"read_only"`
}

type storeStatus struct {
	Path            string    `json:"path"`
	Segments        int       `json:"segments"`
	SegmentBytes    uint64    `json:"segment_bytes"`
	ManifestBytes   uint64    `json:"manifest_bytes"`
	Chunks          uint64    `json:"chunks"`
	Streams         int       `json:"streams"`
	Buffer          Occupancy `json:"buffer_bytes"`
	WrittenBytes    uint64    `json:"written_bytes"`
	Syncs           uint64    `json:"syncs"`
	DurableLag      float64   `json:"durable_lag_seconds"`
	LastSync        float64   `json:"last_sync_seconds"`
	DiskFree        uint64    `json:"disk_free_bytes"`
	Failure         string    `json:"failure"`
	RecoveredLost   uint64    `json:"recovered_lost_rows"`
	CatalogueBehind uint64    `json:"catalogue_behind"`
	ExpiredRows     uint64    `json:"expired_rows"`
	RetiredSegments uint64    `json:"retired_segments"`
}

type liveStatus struct {
	Subscribers      int    `json:"subscribers"`
	EventSubscribers int    `json:"event_subscribers"`
	DroppedRows      uint64 `json:"dropped_rows"`
	DroppedEvents    uint64 `json:"dropped_events"`
}

func storeStatusOf(path string, m store.Metrics) storeStatus {
	return storeStatus{path, m.Segments, m.SegmentBytes, m.ManifestBytes, m.Chunks, m.Streams, Occupancy{m.BufferBytes, m.BufferBound}, m.WrittenBytes,
		m.Syncs, m.DurableLag.Seconds(), m.LastSync.Seconds(), m.DiskFree, m.Failure, m.RecoveredLost, m.CatalogueBehind, m.ExpiredRows, m.RetiredSegments}
}

func (s *Server) attached() []Attached {
	if s.options.Attached == nil {
		return []Attached{}
	}
	if list := s.options.Attached(); list != nil {
		return list
	}
	return []Attached{}
}

func (s *Server) status(w *writer, c *call) error {
	id := s.options.Identity
	books := s.options.Store.Books()
	coverage, err := c.query.Coverage(c.Context(), query.CoverageQuery{})
	if err != nil {
		return err
	}
	metrics := s.options.Store.Stats()
	answer := statusAnswer{
		Engine:   engineStatus{id.ID, id.Version, id.Revision, id.Started, time.Since(id.Started).Seconds(), id.ReadOnly},
		Store:    storeStatusOf(id.Store, metrics),
		Books:    coverage,
		Produced: books.Produced,
		Attached: s.attached(),
	}
	now := rateSample{at: time.Now(), rows: rowsOf(books, tensor.Captured), bytes: metrics.WrittenBytes + metrics.BufferBytes}
	answer.Rates = s.rates.rates(now)
	answer.Bytes = map[string]uint64{tensor.Captured.String(): now.bytes}
	for outcome, bytes := range metrics.OtherBytes {
		if bytes > 0 {
			answer.Bytes[tensor.Outcome(outcome).String()] = bytes
		}
	}
	if s.options.Live != nil {
		m := s.options.Live.Metrics()
		answer.Live = &liveStatus{m.Subscribers, m.EventSubscribers, m.DroppedRows, m.DroppedEvents}
	}
	return writeJSON(w, answer)
}

type sessionAnswer struct {
	ID       string          `json:"id"`
	Number   uint32          `json:"number"`
	Mode     string          `json:"mode"`
	Text     string          `json:"text"`
	State    string          `json:"state"` // attached, ended, or detached: not ended, and no producer connected
	Model    json.RawMessage `json:"model"`
	Versions json.RawMessage `json:"versions"`
	Process  json.RawMessage `json:"process"`
	Hooks    []string        `json:"hooks"`
	Sites    int             `json:"sites"`
	Begun    int64           `json:"begun_unix_ns"`
	Ended    int64           `json:"ended_unix_ns"`
}

func (s *Server) sessionAnswers(c *call) ([]sessionAnswer, error) {
	sessions, err := s.options.Store.Sessions()
	if err != nil {
		return nil, fmt.Errorf("list sessions: %w", err)
	}
	attached := map[string]bool{}
	for _, a := range s.attached() {
		attached[a.Session] = true
	}
	answers := make([]sessionAnswer, len(sessions))
	for i, session := range sessions {
		sites, err := s.options.Store.Sites(session.Number)
		if err != nil {
			return nil, fmt.Errorf("sites of session %s: %w", session.ID, err)
		}
		a := sessionAnswer{ID: session.ID, Number: session.Number, Mode: session.Mode, Text: session.Text, State: "detached",
			Model: rawObject(session.Model), Versions: rawObject(session.Versions), Process: rawObject(session.Process), Hooks: session.Hooks, Sites: len(sites),
			Begun: unixNano(session.Begun), Ended: unixNano(session.Ended)}
		if a.Hooks == nil {
			a.Hooks = []string{}
		}
		if attached[a.ID] {
			a.State = "attached"
		} else if a.Ended != 0 {
			a.State = "ended"
		}
		answers[i] = a
	}
	return answers, nil
}

// rawObject is what a producer said, or an empty object.
func rawObject(raw json.RawMessage) json.RawMessage {
	if len(raw) == 0 {
		return json.RawMessage("{}")
	}
	return raw
}

func unixNano(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func (s *Server) sessions(w *writer, c *call) error {
	answers, err := s.sessionAnswers(c)
	if err != nil {
		return err
	}
	return writeList(w, answers, "")
}

func (s *Server) session(w *writer, c *call) error {
	answers, err := s.sessionAnswers(c)
	if err != nil {
		return err
	}
	id := c.PathValue("id")
	at := slices.IndexFunc(answers, func(a sessionAnswer) bool { return a.ID == id })
	if at < 0 {
		return &failure{http.StatusNotFound, string(query.NotFound), fmt.Sprintf("session %q: the store has none of that id", id), "GET /v1/sessions lists them", nil}
	}
	return writeJSON(w, answers[at])
}

const mostItems = 10_000

func (s *Server) runs(w *writer, c *call) error {
	q := query.RunsQuery{Session: c.text("session"), Tag: c.text("tag"), Labels: c.labels(), After: c.text("after"), Limit: int(c.number("limit", 1, mostItems))}
	if c.err != nil {
		return c.err
	}
	page, err := c.query.Runs(c.Context(), q)
	if err != nil {
		return err
	}
	for i := range page.Items {
		page.Items[i].Labels, page.Items[i].Tags = orEmpty(page.Items[i].Labels), orNone(page.Items[i].Tags)
	}
	return writeList(w, page.Items, page.Next)
}

func orEmpty(m map[string]string) map[string]string {
	if m == nil {
		return map[string]string{}
	}
	return m
}

func orNone[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}

func (s *Server) requests(w *writer, c *call) error {
	q := query.RequestsQuery{Run: c.text("run"), Session: c.text("session"), Tag: c.text("tag"), Labels: c.labels(), Latest: int(c.number("latest", 1, math.MaxInt32)),
		Hidden: c.flag("hidden"), After: c.text("after"), Limit: int(c.number("limit", 1, mostItems))}
	if c.err != nil {
		return c.err
	}
	page, err := c.query.Requests(c.Context(), q)
	if err != nil {
		return err
	}
	for i := range page.Items {
		page.Items[i].Labels, page.Items[i].Tags = orEmpty(page.Items[i].Labels), orNone(page.Items[i].Tags)
	}
	return writeList(w, page.Items, page.Next)
}

func (s *Server) request(w *writer, c *call) error {
	info, err := c.query.Request(c.Context(), c.PathValue("id"))
	if err != nil {
		return err
	}
	info.Labels, info.Tags = orEmpty(info.Labels), orNone(info.Tags)
	return writeJSON(w, info)
}

func (s *Server) sites(w *writer, c *call) error {
	q := query.SitesQuery{Scope: c.requestsAsked(false), Site: c.text("site"), Layer: c.layer()}
	if c.err != nil {
		return c.err
	}
	sites, err := c.query.Sites(c.Context(), q)
	if err != nil {
		return err
	}
	for i := range sites {
		sites[i].Aliases, sites[i].Axes = orNone(sites[i].Aliases), orNone(sites[i].Axes)
	}
	return writeList(w, sites, "")
}
