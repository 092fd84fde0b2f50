package trigger

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"
)

// Bounds of deliveries.
const (
	waiting   = 64 // firings, for one address; more are not delivered
	tries     = 5
	patience  = 5 * time.Second // for an answer
	firstWait = 500 * time.Millisecond
	addresses = 64          // at once
	parting   = time.Second // in which what waits at the end may still go
)

// Deliveries counts webhooks.
type Deliveries struct {
	Delivered, Failed, Dropped uint64 // failed: after all tries; dropped: too many waited
}

// post delivers firings, an address at a time in order, apart from one another.
type post struct {
	tell   func(message string)
	client *http.Client
	ctx    context.Context
	cancel context.CancelFunc
	work   sync.WaitGroup

	mu     sync.Mutex
	closed bool
	queues map[string]chan Firing
	counts Deliveries
}

func newPost(tell func(string)) *post {
	p := &post{tell: tell, queues: map[string]chan Firing{}}
	// Redirects lead where nobody allowed it to go, and connections are not kept: firings are rare.
	p.client = &http.Client{Timeout: patience, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{Proxy: http.ProxyFromEnvironment, DisableKeepAlives: true}}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	return p
}

// send never waits.
func (p *post) send(address string, f Firing) {
	p.mu.Lock()
	defer p.mu.Unlock()
	queue := p.queues[address]
	if queue == nil && len(p.queues) < addresses && !p.closed {
		queue = make(chan Firing, waiting)
		p.queues[address] = queue
		p.work.Add(1)
		go p.deliver(address, queue)
	}
	select {
	case queue <- f: // a nil channel takes nothing
	default:
		if p.counts.Dropped++; p.counts.Dropped == 1 || p.counts.Dropped%1000 == 0 {
			p.tell(fmt.Sprintf("webhook %s: %d firings wait already; %d were not delivered so far", address, waiting, p.counts.Dropped))
		}
	}
}

// deliver is an address's goroutine. It ends when its queue is empty, so that documents may come and go.
func (p *post) deliver(address string, queue chan Firing) {
	defer p.work.Done()
	failing := false
	for {
		p.mu.Lock()
		if len(queue) == 0 {
			delete(p.queues, address)
			p.mu.Unlock()
			return
		}
		f := <-queue
		p.mu.Unlock()
		err := p.persist(address, f)
		p.mu.Lock()
		if err == nil {
			p.counts.Delivered++
		} else {
			p.counts.Failed++
		}
		p.mu.Unlock()
		if err != nil && !failing && p.ctx.Err() == nil {
			p.tell(fmt.Sprintf("webhook %s: not delivered after %d tries: %v", address, tries, err))
		}
		failing = err != nil
	}
}

// persist tries, and tries again after twice as long each time.
func (p *post) persist(address string, f Firing) error {
	body, err := json.Marshal(f)
	if err != nil {
		return err
	}
	wait := firstWait
	for n := 1; ; n++ {
		again, err := p.once(address, body)
		if err == nil || !again || n == tries {
			return err
		}
		select {
		case <-p.ctx.Done():
			return errors.Join(err, p.ctx.Err())
		case <-time.After(wait):
		}
		wait *= 2
	}
}

// once tries; again: another time may go better.
func (p *post) once(address string, body []byte) (again bool, err error) {
	r, err := http.NewRequestWithContext(p.ctx, http.MethodPost, address, bytes.NewReader(body))
	if err != nil {
		return false, err
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("User-Agent", "dmi")
	answer, err := p.client.Do(r)
	if err != nil {
		return true, err
	}
	defer answer.Body.Close()
	_, _ = io.CopyN(io.Discard, answer.Body, 1<<16)
	if answer.StatusCode/100 == 2 {
		return false, nil
	}
	busy := answer.StatusCode == http.StatusTooManyRequests || answer.StatusCode == http.StatusRequestTimeout || answer.StatusCode >= 500
	return busy, fmt.Errorf("the answer was %s", answer.Status)
}

func (p *post) status() Deliveries {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.counts
}

func (p *post) close() {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	stop := time.AfterFunc(parting, p.cancel)
	p.work.Wait()
	stop.Stop()
	p.cancel()
	p.client.CloseIdleConnections()
}
