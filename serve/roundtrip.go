package serve

import (
	"io"
	"net/http"
	"sync"
)

// InProcess lets a client talk to a handler without a socket or a port. Answers stream: the handler waits for the reader.
func InProcess(h http.Handler) http.RoundTripper { return inProcess{h} }

type inProcess struct{ handler http.Handler }

func (t inProcess) RoundTrip(r *http.Request) (*http.Response, error) {
	body, sink := io.Pipe()
	answer := &pipedAnswer{header: http.Header{}, sink: sink, began: make(chan struct{})}
	in := r.Clone(r.Context())
	in.RequestURI = r.URL.RequestURI()
	in.RemoteAddr = "in-process"
	if in.Host == "" {
		in.Host = r.URL.Host
	}
	if in.Body == nil {
		in.Body = http.NoBody
	}
	go func() {
		defer func() {
			if p := recover(); p != nil { // as a server does it: whoever reads sees a broken answer
				answer.start(http.StatusInternalServerError)
				sink.CloseWithError(io.ErrUnexpectedEOF)
				return
			}
			answer.start(http.StatusOK)
			sink.Close()
		}()
		t.handler.ServeHTTP(answer, in)
	}()
	select {
	case <-answer.began:
	case <-r.Context().Done():
		body.CloseWithError(r.Context().Err()) // the handler's next write fails
		return nil, r.Context().Err()
	}
	stop := make(chan struct{})
	go func() { // a reader who leaves must end the handler's writes
		select {
		case <-r.Context().Done():
			body.CloseWithError(r.Context().Err())
		case <-stop:
		}
	}()
	return &http.Response{
		Status: http.StatusText(answer.status), StatusCode: answer.status, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: answer.sent, Body: &pipedBody{PipeReader: body, stop: stop}, ContentLength: -1, Request: r,
	}, nil
}

type pipedBody struct {
	*io.PipeReader
	stop chan struct{}
	once sync.Once
}

func (b *pipedBody) Close() error {
	b.once.Do(func() { close(b.stop) })
	return b.PipeReader.Close()
}

type pipedAnswer struct {
	header http.Header
	sent   http.Header // as it was when the answer began
	status int
	sink   *io.PipeWriter
	once   sync.Once
	began  chan struct{}
}

func (a *pipedAnswer) start(status int) {
	a.once.Do(func() {
		a.status, a.sent = status, a.header.Clone()
		close(a.began)
	})
}

func (a *pipedAnswer) Header() http.Header    { return a.header }
func (a *pipedAnswer) WriteHeader(status int) { a.start(status) }
func (a *pipedAnswer) Flush()                 { a.start(http.StatusOK) }

func (a *pipedAnswer) Write(p []byte) (int, error) {
	a.start(http.StatusOK)
	return a.sink.Write(p)
}
