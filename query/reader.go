package query

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"sort"

	"dmi/store"
	"dmi/tensor"

	"golang.org/x/sync/errgroup"
)

// piece is a run of rows of an answer that lie together in a chunk.
type piece struct {
	ref   store.ChunkRef
	from  uint32 // first of them, within the chunk
	count uint32
	at    int // its row in the answer
}

// plan is an answer that can be read, any number of times.
type plan struct {
	source Source
	pieces []piece // in order, without gaps
	rows   int
	layout *layout
	memory int // most bytes that a reader holds, one row excepted
}

const (
	rowTile   = 4 << 20  // bytes: rows that need no transposing are read in tiles of this, so that the first come early
	readAhead = 16 << 20 // bytes that the disk is asked for before they are read
)

// Size is the bytes of the answer.
func (t *Tensor) Size() int64 { return t.plan.layout.size(t.plan.rows) }

// Open starts a reader over the answer's bytes. Readers are independent; each is for one goroutine and holds no more memory than the
// engine's bound. A read fails with ctx's error once ctx ends.
func (t *Tensor) Open(ctx context.Context) *Reader {
	return &Reader{ctx: ctx, plan: &t.plan, size: t.Size()}
}

// Reader streams an answer: io.Reader, io.Seeker, io.ReaderAt and io.WriterTo. It works a tile at a time, a tile being
// contiguous in the answer: some outer indices with all their rows, or some rows at one.
type Reader struct {
	ctx  context.Context
	plan *plan
	size int64
	off  int64

	tile    []byte // answer's bytes from start
	start   int64
	stored  []byte // the tile before conversion, where there is one
	scratch []byte // stored rows on their way
	row     []byte // one of them, decoded
	hinted  int    // pieces that the disk has been asked for
}

func (r *Reader) Read(p []byte) (int, error) {
	if r.off >= r.size {
		return 0, io.EOF
	}
	if len(p) == 0 {
		return 0, nil
	}
	if r.off < r.start || r.off >= r.start+int64(len(r.tile)) {
		if err := r.load(r.off); err != nil {
			return 0, err
		}
	}
	n := copy(p, r.tile[r.off-r.start:])
	r.off += int64(n)
	return n, nil
}

// ReadAt reads at an offset without moving the reader's own; unlike other ReaderAts it is not for concurrent use.
func (r *Reader) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("query: read at %d: before the start", off)
	}
	own := r.off
	r.off = off
	n, err := io.ReadFull(r, p)
	r.off = own
	if err == io.ErrUnexpectedEOF {
		err = io.EOF
	}
	return n, err
}

func (r *Reader) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		offset += r.off
	case io.SeekEnd:
		offset += r.size
	}
	if offset < 0 {
		return 0, fmt.Errorf("query: seek to %d: before the start", offset)
	}
	r.off = offset
	return offset, nil
}

// WriteTo writes the rest of the answer.
func (r *Reader) WriteTo(w io.Writer) (written int64, err error) {
	for r.off < r.size {
		if r.off < r.start || r.off >= r.start+int64(len(r.tile)) {
			if err := r.load(r.off); err != nil {
				return written, err
			}
		}
		n, err := w.Write(r.tile[r.off-r.start:])
		written += int64(n)
		r.off += int64(n)
		if err != nil {
			return written, err
		}
	}
	return written, nil
}

// load makes the tile that holds offset off of the answer.
func (r *Reader) load(off int64) error {
	p, l := r.plan, r.plan.layout
	r.tile = r.tile[:0] // until it is whole, there is none
	cell := l.cell()
	answered := cell / l.dtype.Size() * l.as.Size()
	at := int(off / int64(answered))
	outer, row := at/p.rows, at%p.rows
	outerTo, rowTo := outer+1, p.rows

	// A quarter of the memory is for stored rows on their way, the rest for the tile, before and after conversion.
	budget := p.memory * 3 / 4
	if l.as != l.dtype {
		budget = int(int64(budget) * int64(l.dtype.Size()) / int64(l.dtype.Size()+l.as.Size()))
	}
	if l.outer == 1 {
		budget = min(budget, rowTile)
	}
	cells := max(1, budget/cell)
	if row == 0 && p.rows <= cells {
		outerTo = min(l.outer, outer+cells/p.rows)
	} else {
		rowTo = min(p.rows, row+cells)
	}
	defer r.hint(row, rowTo)()
	stored := (outerTo - outer) * (rowTo - row) * cell
	if l.as == l.dtype {
		r.tile = resize(r.tile, stored)
		if err := r.gather(r.tile, outer, outerTo, row, rowTo); err != nil {
			r.tile = r.tile[:0]
			return err
		}
	} else {
		r.stored = resize(r.stored, stored)
		if err := r.gather(r.stored, outer, outerTo, row, rowTo); err != nil {
			return err
		}
		r.tile = resize(r.tile, stored/l.dtype.Size()*l.as.Size())
		l.dtype.Float32s(r.tile, r.stored)
	}
	r.start = int64(at) * int64(answered)
	return nil
}

// hint has the disk fetch what rows [row, rowTo) are in, and some of what comes after them: beside whoever reads them, since asking takes the system about as long as
// handing over what it has.
func (r *Reader) hint(row, rowTo int) (asked func()) {
	var refs []store.ChunkRef
	ahead := 0
	for i := r.plan.piece(row); i < len(r.plan.pieces); i++ {
		piece := &r.plan.pieces[i]
		if piece.at >= rowTo {
			if ahead += int(piece.count) * rowBytes(piece.ref); ahead > readAhead {
				break
			}
		}
		if i >= r.hinted {
			refs = append(refs, piece.ref)
			r.hinted = i + 1
		}
	}
	return willRead(r.plan.source, refs)
}

// willRead has the disk fetch chunks while the caller does something else; what it returns waits until they are asked for.
func willRead(source Source, refs []store.ChunkRef) (asked func()) {
	if len(refs) == 0 {
		return func() {}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		source.WillRead(refs)
	}()
	return func() { <-done }
}

// piece is the first that has rows from a row on.
func (p *plan) piece(row int) int {
	return sort.Search(len(p.pieces), func(i int) bool { return p.pieces[i].at+int(p.pieces[i].count) > row })
}

// readsAtOnce is how many chunks of a tile are read at a time, so that a disk has more than one to look for.
const readsAtOnce = 8

// gather fills dst with the cells of rows [row, rowTo) at outer indices [outer, outerTo), as stored.
func (r *Reader) gather(dst []byte, outer, outerTo, row, rowTo int) error {
	var reads errgroup.Group
	reads.SetLimit(readsAtOnce)
	err := r.pieces(&reads, dst, outer, outerTo, row, rowTo)
	return cmp.Or(err, reads.Wait()) // dst is nobody else's once it returns
}

// pieces does so piece by piece; those whose rows are copied as they are it leaves to reads.
func (r *Reader) pieces(reads *errgroup.Group, dst []byte, outer, outerTo, row, rowTo int) error {
	p, l := r.plan, r.plan.layout
	cell := l.cell()
	stride := (rowTo - row) * cell
	for _, piece := range p.pieces[p.piece(row):] {
		if piece.at >= rowTo {
			break
		}
		from, to := max(row, piece.at), min(rowTo, piece.at+int(piece.count))
		bytes := rowBytes(piece.ref)
		sourceLength := l.length
		if l.keyed {
			sourceLength = piece.ref.Shape[len(piece.ref.Shape)-1]
		}
		direct := l.dense && bytes == cell && !l.decode
		block := to - from
		if !direct && bytes > 0 {
			block = max(1, p.memory/4/bytes)
		}
		for ; from < to; from += block {
			if err := r.ctx.Err(); err != nil {
				return err
			}
			n := min(block, to-from)
			chunkRow := piece.from + uint32(from-piece.at)
			target := dst[(from-row)*cell:]
			read := func(target []byte) error {
				if err := p.source.ReadRows(piece.ref, chunkRow, chunkRow+uint32(n), target); err != nil {
					return fmt.Errorf("query: read rows %d..%d of a chunk: %w", chunkRow, chunkRow+uint32(n), err)
				}
				return nil
			}
			if direct {
				reads.Go(func() error { return read(target[:n*cell]) })
				continue
			}
			r.scratch = resize(r.scratch, n*bytes)
			if err := read(r.scratch); err != nil {
				return err
			}
			for i := range n {
				one := r.scratch[i*bytes : (i+1)*bytes]
				if l.decode {
					one = r.decoded(piece.ref, one)
				}
				l.place(dst[(from-row+i)*cell:], stride, one, sourceLength, outer, outerTo)
			}
		}
	}
	return nil
}

// decoded gives a stored row as F32.
func (r *Reader) decoded(ref store.ChunkRef, row []byte) []byte {
	r.row = resize(r.row, product(ref.Shape)*tensor.F32.Size())
	if ref.Level.Quantised() {
		ref.Level.Dequantise(r.row, row)
	} else {
		ref.DType.Float32s(r.row, row)
	}
	return r.row
}

func resize(b []byte, n int) []byte {
	if cap(b) < n {
		return make([]byte, n)
	}
	return b[:n]
}
