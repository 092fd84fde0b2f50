package control

import (
	"fmt"

	"dmi/ring"
)

// Memory is what producers' rings have: their payload, which lies on the device where there is one, and what they share with the engine, which is page-locked there. As a bound, 0 is none.
type Memory struct{ Device, Pinned uint64 }

// left is what a bound leaves; nil: there is none.
func left(bound, used uint64) *uint64 {
	if bound == 0 {
		return nil
	}
	n := bound - min(bound, used)
	return &n
}

// used is what all have that are attached. Called with s.mu.
func (s *Server) used() (m Memory) {
	for _, t := range s.taken {
		m.Device += t.Device
		m.Pinned += t.Pinned
	}
	return m
}

func (s *Server) bound() Memory {
	if s.options.Memory == nil {
		return Memory{}
	}
	return s.options.Memory()
}

// take has a session's ring count, or says why it cannot be had. One that comes back has its memory already: it is told of, and stays.
func (s *Server) take(x *session, h ring.Header) error {
	own, bound := Memory{h.PayloadBytes, h.TotalBytes}, s.bound()
	s.mu.Lock()
	defer s.mu.Unlock()
	used := s.used()
	for _, m := range []struct {
		key, what, size, hint string
		bound, used, own      uint64
	}{
		{"device_bytes", "ring", "payload", "ring_mib", bound.Device, used.Device, own.Device},
		{"pinned_bytes", "shared memory", "staging, spill, records and row tables", "staging_mib", bound.Pinned, used.Pinned, own.Pinned},
	} {
		if m.bound == 0 || m.used+m.own <= m.bound {
			continue
		}
		why := fmt.Sprintf("the policy's budget %s is %d, of which sessions that are attached have %d, and the %s of this one (%s) has %d", m.key, m.bound, m.used, m.what, m.size, m.own)
		if !x.hello.Resume {
			return refuse("memory", "%s; attach with a smaller %s, or with none, which takes what is left; or raise the budget, or detach others", why, m.hint)
		}
		x.event("warning", "memory", why+"; it was attached before, and keeps it")
	}
	s.taken[x] = own
	return nil
}

// memoryMessage asks what memory a ring may have that is yet to be made.
type memoryMessage struct {
	Type     string `json:"type"`
	Protocol int    `json:"protocol"`
	Token    string `json:"token"`
}

// memoryLeft is the answer. null: as much as there is.
type memoryLeft struct {
	Type   string  `json:"type"`
	Device *uint64 `json:"device_bytes"`
	Pinned *uint64 `json:"pinned_bytes"`
}

func (s *Server) tellMemory(body []byte, out *outbox) error {
	var m memoryMessage
	if err := decodeStrict(body, &m); err != nil {
		return err
	}
	if m.Protocol != ProtocolVersion {
		return refuse("protocol", "the producer speaks version %d of the control protocol, this engine %d; install dmi and the engine from the same release, and restart the engine", m.Protocol, ProtocolVersion)
	}
	if err := s.admits(m.Token); err != nil {
		return err
	}
	bound := s.bound()
	s.mu.Lock()
	used := s.used()
	s.mu.Unlock()
	out.answer(memoryLeft{"memory", left(bound.Device, used.Device), left(bound.Pinned, used.Pinned)})
	return nil
}
