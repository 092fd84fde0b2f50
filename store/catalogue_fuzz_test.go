package store

import (
	"encoding/binary"
	"errors"
	"os"
	"testing"
)

// FuzzCatalogue damages the catalogue of a store, a few bytes at a time, or cuts it short. Whatever is in it, nobody crashes, and no reader is given a row that was
// not written.
func FuzzCatalogue(f *testing.F) {
	mem, l, o := closedStore(f, 24)
	whole, err := os.ReadFile(o.Catalogue)
	if err != nil {
		f.Fatal(err)
	}
	edit := func(at uint32, with ...byte) []byte {
		return append(binary.LittleEndian.AppendUint32(nil, at), with...)
	}
	f.Add([]byte{})
	f.Add(edit(0, 'x'))
	f.Add(edit(18, 9))
	f.Add(edit(28, 255))
	f.Add(edit(60, 1))
	f.Add(edit(4096+3, 255))
	for at := uint32(100); at < uint32(len(whole)); at += uint32(len(whole)) / 16 {
		f.Add(edit(at, 0xff, 0x80))
	}
	f.Fuzz(func(t *testing.T, edits []byte) {
		damaged := append([]byte(nil), whole...)
		for len(edits) >= 5 { // where, and what is to be exclusive-ored with what is there; 0: the file ends there
			at := int(binary.LittleEndian.Uint32(edits) % uint32(len(whole)))
			if edits[4] == 0 {
				damaged = damaged[:min(at, len(damaged))]
			} else if at < len(damaged) {
				damaged[at] ^= edits[4]
			}
			edits = edits[5:]
		}
		l := l.of(t)
		for _, open := range []func(string, Options) (*Store, error){openReadOnly, Open} {
			p := o
			p.FS, p.Catalogue = mem.AfterKill(), catalogueFile(t)
			if err := os.WriteFile(p.Catalogue, damaged, 0o600); err != nil {
				t.Fatal(err)
			}
			s, err := open("store", p)
			if err != nil {
				continue // it says so
			}
			l.readable(s)
			if _, err := s.Verify(t.Context(), nil); err != nil {
				t.Fatal(err)
			}
			s.Close()
		}
	})
}

// readable expects what can be read to be what was written; some of it may be missing, or in the way.
func (l *load) readable(s *Store) {
	l.t.Helper()
	for request, end := range l.next {
		s.Entries(l.key(request))
		for site := range l.sites {
			refs, err := s.Chunks(l.key(request), uint32(site), 0, end)
			if err != nil {
				continue
			}
			for _, ref := range refs {
				data := make([]byte, ref.RowBytes()*int(ref.Rows))
				if err := s.ReadRows(ref, 0, ref.Rows, data); errors.Is(err, ErrCorrupt) || errors.Is(err, ErrGone) {
					continue
				} else if err != nil {
					l.t.Fatal(err)
				}
				for i := range ref.Rows {
					l.equal(rowKey{request, uint32(site), ref.Attempt, ref.First + i}, data[int(i)*ref.RowBytes():int(i+1)*ref.RowBytes()], ref)
				}
			}
		}
	}
}
