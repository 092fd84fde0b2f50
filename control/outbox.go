package control

import (
	"errors"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

const (
	outboxMessages = 256
	writeTimeout   = 5 * time.Second
)

// outbox sends messages from a goroutine of its own, so that a producer that does not read holds up nobody. What does not fit is not sent
// (events), ends the connection (answers), or has a place of its own (what stands until it is said anew).
type outbox struct {
	conn   *net.UnixConn
	mu     sync.Mutex
	queue  chan []byte
	stands chan []byte // the newest of a kind, of which none but that counts
	closed bool
	done   chan struct{}
}

func newOutbox(conn *net.UnixConn) *outbox {
	o := &outbox{conn: conn, queue: make(chan []byte, outboxMessages), stands: make(chan []byte, 1), done: make(chan struct{})}
	go o.run()
	return o
}

func (o *outbox) run() {
	defer close(o.done)
	broken := false
	for open := true; open; {
		var m []byte
		select {
		case m = <-o.stands:
		case m, open = <-o.queue:
		}
		if broken || m == nil {
			continue
		}
		_ = o.conn.SetWriteDeadline(time.Now().Add(writeTimeout))
		if _, err := o.conn.Write(m); err != nil {
			broken = true
			o.conn.SetReadDeadline(time.Unix(1, 0)) // the reader ends the session
		}
	}
}

// send queues a message. False where it was not.
func (o *outbox) send(m any) bool {
	b, err := encodeMessage(m)
	if err != nil {
		return false
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		return false
	}
	select {
	case o.queue <- b:
		return true
	default:
		return false
	}
}

// replace sends a message in place of the one before that came by here, where that is not sent yet. There is always room. False where it cannot be sent.
func (o *outbox) replace(m any) bool {
	b, err := encodeMessage(m)
	if err != nil {
		return false
	}
	o.mu.Lock() // two at once would find no room
	defer o.mu.Unlock()
	if o.closed {
		return false
	}
	select {
	case <-o.stands:
	default:
	}
	o.stands <- b
	return true
}

// answer sends a message that the producer waits for.
func (o *outbox) answer(m any) {
	if !o.send(m) {
		o.conn.SetReadDeadline(time.Unix(1, 0))
	}
}

// refuse tells the producer why, where it is still there to hear it.
func (o *outbox) refuse(err error) {
	var r *Refusal
	switch {
	case errors.As(err, &r):
		o.send(errorMessage{"error", r.Code, r.Message})
	case gone(err):
	default:
		o.send(errorMessage{"error", "protocol", err.Error()})
	}
}

// close sends what is queued and closes the connection.
func (o *outbox) close() {
	o.mu.Lock()
	if !o.closed {
		o.closed = true
		close(o.queue)
	}
	o.mu.Unlock()
	<-o.done
	o.conn.Close()
}

// temporary errors of accept go away by themselves.
func temporary(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) || errors.Is(err, syscall.ENOBUFS) || errors.Is(err, syscall.ENOMEM) ||
		errors.Is(err, syscall.ECONNABORTED) || errors.Is(err, os.ErrDeadlineExceeded)
}
