package serve

import (
	"context"
	_ "embed"
	"encoding/json"
	"fmt"
	"net/http"
	"sync"
	"time"

	"dmi/query"
	"dmi/store"

	"go.yaml.in/yaml/v3"
)

//go:embed openapi.yaml
var openapiYAML []byte

// openapiJSON is the same document for those who want JSON.
var openapiJSON = sync.OnceValues(func() ([]byte, error) {
	var document any
	if err := yaml.Unmarshal(openapiYAML, &document); err != nil {
		return nil, fmt.Errorf("openapi.yaml: %w", err)
	}
	return json.Marshal(document)
})

func (s *Server) openapi(w *writer, c *call) error {
	text, err := openapiJSON()
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	_, err = w.Write(text)
	return err
}

func (s *Server) config(w *writer, c *call) error { return writeJSON(w, s.options.Config) }

func (s *Server) flush(w *writer, c *call) error {
	if s.options.Flush == nil {
		return writeJSON(w, map[string]bool{"durable": true}) // what only reads holds nothing back
	}
	ctx, cancel := context.WithCancel(c.Context())
	defer cancel()
	defer context.AfterFunc(s.stop, cancel)()
	if err := s.options.Flush(ctx); err != nil {
		if s.stop.Err() != nil {
			return &failure{http.StatusServiceUnavailable, "stopping", "flush: the engine is stopping, which flushes too", "wait for it to end", nil}
		}
		return &failure{http.StatusInternalServerError, "io", fmt.Sprintf("flush: %v", err), "see the engine's log and the disk", nil}
	}
	return writeJSON(w, map[string]bool{"durable": true})
}

type progressAnswer struct {
	File  string `json:"file"`
	Done  uint64 `json:"bytes_done"`
	Total uint64 `json:"bytes_total"`
}

type verifyAnswer struct {
	OK bool `json:"ok"`
	store.Report
	Books *query.Coverage `json:"books"`
}

func (s *Server) verify(w *writer, c *call) error {
	stream, err := openEventStream(w)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(c.Context())
	defer cancel()
	defer context.AfterFunc(s.stop, cancel)()
	var last time.Time
	report, err := s.options.Store.Verify(ctx, func(p store.Progress) {
		if time.Since(last) < progressEvery {
			return
		}
		last = time.Now()
		if stream.send("progress", "", progressAnswer{p.File, p.Done, p.Total}) != nil || w.flush() != nil {
			cancel()
		}
	})
	var answer verifyAnswer
	if err == nil {
		report.Problems = orNone(report.Problems)
		answer = verifyAnswer{OK: len(report.Problems) == 0, Report: report}
		answer.Books, err = c.query.Coverage(ctx, query.CoverageQuery{})
	}
	return endStream(w, c, stream, answer, err)
}

// healthz says that the process answers; readyz that it can do its work.
func (s *Server) healthz(w *writer, c *call) error {
	return writeJSON(w, map[string]string{"status": "ok"})
}

func (s *Server) readyz(w *writer, c *call) error {
	if s.stop.Err() != nil {
		return &failure{http.StatusServiceUnavailable, "stopping", "the engine is stopping", "", nil}
	}
	if why := s.options.Store.Stats().Failure; why != "" {
		return &failure{http.StatusServiceUnavailable, "store", "the store cannot be written: " + why, "see the disk and the engine's log", nil}
	}
	return writeJSON(w, map[string]string{"status": "ready"})
}
