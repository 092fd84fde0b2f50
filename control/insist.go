package control

import (
	"slices"
	"time"

	"dmi/store"
	"dmi/tensor"
)

// insistent is the store of a session that is attached. Names and books are small, were accepted, and come only once: while the disk refuses them they are tried again, until it takes
// them or the engine stops. Who waits for that is this session: its ring fills, which is on the books.
type insistent struct {
	Store
	x *session
}

const insistEvery = 50 * time.Millisecond

func (i insistent) until(write func() error) error {
	for told := false; ; told = true {
		err := write()
		if err == nil || !store.Passing(err) {
			return err
		}
		if !told {
			i.x.event("error", "store", err.Error()+"; it is tried again")
		}
		select {
		case <-i.x.stopping:
			return err
		case <-time.After(insistEvery):
		}
	}
}

// Book gives the store no more at once than it takes whole or not at all: rows must not be booked twice.
func (i insistent) Book(entries []tensor.Entry) error {
	for part := range slices.Chunk(entries, store.EntriesAtOnce) {
		if err := i.until(func() error { return i.Store.Book(part) }); err != nil {
			return err
		}
	}
	return nil
}

func (i insistent) AddSites(session uint32, sites []tensor.Site) error {
	return i.until(func() error { return i.Store.AddSites(session, sites) })
}

func (i insistent) PutRun(r tensor.Run) error {
	return i.until(func() error { return i.Store.PutRun(r) })
}

func (i insistent) PutRequests(requests []tensor.Request) error {
	return i.until(func() error { return i.Store.PutRequests(requests) })
}

func (i insistent) EndSession(number uint32, at time.Time) error {
	return i.until(func() error { return i.Store.EndSession(number, at) })
}
