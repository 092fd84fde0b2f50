package control

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
	"time"

	"dmi/ring"
	"dmi/tensor"
)

// What producers say.

type helloMessage struct {
	Type     string              `json:"type"`
	Protocol int                 `json:"protocol"`
	ABI      int                 `json:"abi"`
	Token    string              `json:"token"`
	Session  string              `json:"session"`
	Producer string              `json:"producer"`
	Resume   bool                `json:"resume"`
	Mode     string              `json:"mode"`
	Text     string              `json:"text"`
	Process  json.RawMessage     `json:"process"`
	Versions json.RawMessage     `json:"versions"`
	Model    json.RawMessage     `json:"model"`
	Aliases  map[string][]string `json:"aliases"`
	Hooks    []string            `json:"hooks"`
	Skipped  []string            `json:"skipped"`
	Run      runBody             `json:"run"`
}

type sitesMessage struct {
	Type    string              `json:"type"`
	Aliases map[string][]string `json:"aliases"`
}

type runBody struct {
	ID     string            `json:"id"`
	Labels map[string]string `json:"labels"`
	Tags   []string          `json:"tags"`
	Begun  int64             `json:"begun_unix_ns"`
}

type runMessage struct {
	Type string `json:"type"`
	runBody
}

type runEndMessage struct {
	Type  string `json:"type"`
	ID    string `json:"id"`
	Ended int64  `json:"ended_unix_ns"`
}

type requestsMessage struct {
	Type     string        `json:"type"`
	Requests []requestBody `json:"requests"`
}

type requestBody struct {
	Request uint64            `json:"request"`
	ID      string            `json:"id"`
	Run     string            `json:"run"`
	Begun   int64             `json:"begun_unix_ns"`
	Labels  map[string]string `json:"labels"`
	Tags    []string          `json:"tags"`
	Tokens  []int64           `json:"tokens"`
	Text    string            `json:"text"`
	Pieces  []string          `json:"pieces"`
	Path    [][3]uint64       `json:"path"`
	Hidden  bool              `json:"hidden"`
}

type requestEndMessage struct {
	Type    string `json:"type"`
	Request uint64 `json:"request"`
	Reason  string `json:"reason"`
	Step    uint64 `json:"step"`
	Ended   int64  `json:"ended_unix_ns"`
}

type barrierMessage struct {
	Type  string            `json:"type"`
	ID    json.RawMessage   `json:"id"` // ours to repeat, whatever it is
	Steps map[string]uint64 `json:"steps"`
}

type byeMessage struct {
	Type string `json:"type"`
}

// What the engine says.

type welcomeMessage struct {
	Type     string   `json:"type"`
	Engine   string   `json:"engine"`
	Version  string   `json:"version"`
	Protocol int      `json:"protocol"`
	Store    string   `json:"store"`
	HTTP     httpDoor `json:"http"`
	Number   uint32   `json:"session_number"`
}

type httpDoor struct {
	URL  string `json:"url"`
	Unix string `json:"unix"`
}

type durableMessage struct {
	Type  string          `json:"type"`
	ID    json.RawMessage `json:"id"`
	Error string          `json:"error"`
}

type eventMessage struct {
	Type    string `json:"type"`
	Level   string `json:"level"`
	Code    string `json:"code"`
	Message string `json:"message"`
}

type groupsMessage struct {
	Type   string         `json:"type"`
	Groups uint64         `json:"groups"`
	Sets   []tensor.Group `json:"sets"`
}

type errorMessage struct {
	Type    string `json:"type"`
	Code    string `json:"code"`
	Message string `json:"message"`
}

const (
	maxLabels    = 64   // of a run or request, and as many tags
	maxLabel     = 4096 // bytes of one
	maxHooks     = 4096
	maxSkipped   = 1 << 16
	toldSkipped  = 4 // of those, in the event; a line of each, of at most maxLine bytes
	maxLine      = 512
	maxRequestID = 256 // bytes
)

var (
	sessionID = regexp.MustCompile(`^s[0-9a-f]{8}$`)
	runID     = regexp.MustCompile(`^r[0-9a-f]{8}$`)
)

// check holds a hello against what this engine speaks, before anything is mapped.
func (h *helloMessage) check() error {
	switch {
	case h.Type != "hello":
		return refuse("protocol", "the first message is %q; it must be hello", h.Type)
	case h.Protocol != ProtocolVersion:
		return refuse("protocol", "the producer speaks version %d of the control protocol, this engine %d; install dmi and the engine from the same release, and restart the engine", h.Protocol, ProtocolVersion)
	case h.ABI != ring.ABIVersion:
		return refuse("abi", "the producer's rings have version %d, this engine reads %d; install dmi and the engine from the same release, and restart the engine", h.ABI, ring.ABIVersion)
	case !sessionID.MatchString(h.Session):
		return refuse("protocol", "hello.session is %.64q: s and 8 hex digits are needed", h.Session)
	case h.Mode != "complete" && h.Mode != "best-effort":
		return refuse("protocol", "hello.mode is %.64q: complete or best-effort", h.Mode)
	case h.Text != "none" && h.Text != "ids" && h.Text != "text":
		return refuse("protocol", "hello.text is %.64q: none, ids or text", h.Text)
	case len(h.Hooks) > maxHooks:
		return refuse("limit", "hello.hooks has %d patterns: at most %d", len(h.Hooks), maxHooks)
	case len(h.Skipped) > maxSkipped:
		return refuse("limit", "hello.skipped has %d sites: at most %d", len(h.Skipped), maxSkipped)
	}
	if b, err := hex.DecodeString(h.Producer); err != nil || len(b) != 16 {
		return refuse("protocol", "hello.producer is %.64q: 32 hex digits are needed", h.Producer)
	}
	return h.Run.check("hello.run")
}

// lacking says what the hooks match and the model cannot give; "" where it gives all of it.
func (h *helloMessage) lacking() string {
	if len(h.Skipped) == 0 {
		return ""
	}
	var b strings.Builder
	fmt.Fprintf(&b, "session %s: its hooks match %d sites that the model cannot give", h.Session, len(h.Skipped))
	before := ":"
	for _, line := range h.Skipped[:min(toldSkipped, len(h.Skipped))] {
		fmt.Fprintf(&b, "%s %.*s", before, maxLine, line)
		before = ";"
	}
	if more := len(h.Skipped) - toldSkipped; more > 0 {
		fmt.Fprintf(&b, "; and %d more: session.skipped", more)
	}
	return b.String()
}

func (r *runBody) check(where string) error {
	if !runID.MatchString(r.ID) {
		return refuse("protocol", "%s.id is %.64q: r and 8 hex digits are needed", where, r.ID)
	}
	return checkLabels(where, r.Labels, r.Tags)
}

func checkLabels(where string, labels map[string]string, tags []string) error {
	if len(labels) > maxLabels || len(tags) > maxLabels {
		return refuse("limit", "%s has %d labels and %d tags: at most %d of each", where, len(labels), len(tags), maxLabels)
	}
	for k, v := range labels {
		if k == "" || len(k) > maxLabel || len(v) > maxLabel {
			return refuse("limit", "%s: label %.64q: 1 to %d bytes are possible", where, k, maxLabel)
		}
	}
	for _, t := range tags {
		if t == "" || len(t) > maxLabel {
			return refuse("limit", "%s: tag %.64q: 1 to %d bytes are possible", where, t, maxLabel)
		}
	}
	return nil
}

// unixTime takes a producer's time; 0 is none.
func unixTime(ns int64) time.Time {
	if ns <= 0 {
		return time.Time{}
	}
	return time.Unix(0, ns)
}

func (r *runBody) run(session uint32) tensor.Run {
	return tensor.Run{ID: r.ID, Session: session, Labels: r.Labels, Tags: r.Tags, Begun: unixTime(r.Begun)}
}

// request makes what the store keeps of a request. text is the session's: what is more than that is not kept.
func (b *requestBody) request(session uint32, text string) (tensor.Request, error) {
	r := tensor.Request{Key: tensor.RequestKey{Session: session, Request: b.Request}, ID: b.ID, Run: b.Run, Labels: b.Labels, Tags: b.Tags,
		Hidden: b.Hidden, Begun: unixTime(b.Begun)}
	switch {
	case b.Request == tensor.NoRequest:
		return r, refuse("protocol", "requests.request is %d: no request has this number", b.Request)
	case len(b.ID) > maxRequestID:
		return r, refuse("limit", "requests.id of request %d has %d bytes: at most %d", b.Request, len(b.ID), maxRequestID)
	case b.Run != "" && !runID.MatchString(b.Run):
		return r, refuse("protocol", "requests.run of request %d is %.64q: r and 8 hex digits are needed", b.Request, b.Run)
	}
	for _, c := range b.ID {
		if c < ' ' || c == 0x7f || c == 0xfffd {
			return r, refuse("protocol", "requests.id of request %d is %q: control characters are not possible", b.Request, b.ID)
		}
	}
	if text != "none" {
		r.Tokens = b.Tokens
	}
	if text == "text" {
		r.Text, r.Pieces = b.Text, b.Pieces
		if len(b.Pieces) > 0 && len(b.Pieces) != len(b.Tokens) {
			return r, refuse("protocol", "requests.pieces of request %d are %d for %d tokens: one for each is needed", b.Request, len(b.Pieces), len(b.Tokens))
		}
	}
	for _, p := range b.Path {
		if p[0] == tensor.NoRequest || p[1] > 1<<32-1 || p[2] > 1<<32-1-p[1] {
			return r, refuse("protocol", "requests.path of request %d has %v: [request, first, count] with positions below 2^32 are needed", b.Request, p)
		}
		r.Path = append(r.Path, tensor.PathPart{Request: p[0], First: uint32(p[1]), Count: uint32(p[2])})
	}
	return r, checkLabels("requests", b.Labels, b.Tags)
}
