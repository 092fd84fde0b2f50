package ring

import (
	"fmt"
	"sync/atomic"
)

// Lane reads the records and row tables of one capturing thread, in order.
type Lane struct {
	ring    *Ring
	Index   int
	next    uint64 // record to be read
	table   uint64 // end of the last row table read
	records uint64 // offset of the lane's ring in the mapping
	tables  uint64
	tail    *uint64 // record_tail
	tableT  *uint64 // table_tail
}

func newLane(r *Ring, index int) *Lane {
	at := uint64(ControlLaneOffset + index*LaneSize)
	l := &Lane{ring: r, Index: index,
		records: r.header.RecordsOffset + uint64(index)*uint64(r.header.RecordCapacity)*RecordSize,
		tables:  r.header.TablesOffset + uint64(index)*r.header.TableBytes,
		tail:    r.control(at + LaneRecordTailOffset), tableT: r.control(at + LaneTableTailOffset)}
	l.next, l.table = atomic.LoadUint64(l.tail), atomic.LoadUint64(l.tableT)
	return l
}

// Next is the index of the record that Read would give.
func (l *Lane) Next() uint64 { return l.next }

func (l *Lane) seq(i uint64) uint64 {
	return atomic.LoadUint64(l.ring.word(l.records + i%uint64(l.ring.header.RecordCapacity)*RecordSize))
}

// Ready reports whether a record is published.
func (l *Lane) Ready() bool { return l.seq(l.next) == l.next+1 }

// Read copies the next record to b, if it is published. skipped counts records that an overrun has made unreadable: the lane wrote on
// without waiting for us, and reading goes on at what its slot holds now. An error says that the slot cannot be any record's.
func (l *Lane) Read(b *[RecordSize]byte) (ok bool, skipped uint64, err error) {
	capacity := uint64(l.ring.header.RecordCapacity)
	seq := l.seq(l.next) // pairs with the lane's release: the rest of the record is there
	if seq != l.next+1 {
		if seq == 0 || seq+capacity == l.next+1 || seq < l.next+1 && (l.next+1-seq)%capacity == 0 {
			return false, 0, nil
		}
		if seq < l.next+1 || (seq-l.next-1)%capacity != 0 {
			return false, 0, fmt.Errorf("ring: lane %d: record.seq is %d where %d is due", l.Index, seq, l.next+1)
		}
		skipped = seq - l.next - 1
		l.next = seq - 1
	}
	at := l.records + l.next%capacity*RecordSize
	copy(b[:], l.ring.mem[at:at+RecordSize])
	l.next++
	return true, skipped, nil
}

// Published counts the records from Next on that are published.
func (l *Lane) Published() uint64 {
	n := uint64(0)
	for n < uint64(l.ring.header.RecordCapacity) && l.seq(l.next+n) == l.next+n+1 {
		n++
	}
	return n
}

// Used counts the records that were published and not released. Any goroutine may ask, a statistic is what it gets.
func (l *Lane) Used(released uint64) uint64 {
	n := uint64(0)
	for n < uint64(l.ring.header.RecordCapacity) && l.seq(released+n) == released+n+1 {
		n++
	}
	return n
}

// ReadTable copies the row table of an OPEN record, which must be read in order.
func (l *Lane) ReadTable(o *OpenRecord) ([]byte, error) {
	if err := l.PassTable(o); err != nil {
		return nil, err
	}
	at := l.tables + o.Table%l.ring.header.TableBytes
	return append([]byte(nil), l.ring.mem[at:at+o.TableBytes]...), nil
}

// PassTable goes over a row table without reading it.
func (l *Lane) PassTable(o *OpenRecord) error {
	capacity := l.ring.header.TableBytes
	switch {
	case o.TableBytes < TableSize || o.TableBytes > capacity:
		return fmt.Errorf("ring: lane %d: open.table_bytes is %d: %d to %d are possible", l.Index, o.TableBytes, TableSize, capacity)
	case o.Table < l.table || o.Table-l.table > capacity:
		return fmt.Errorf("ring: lane %d: open.table is %d, and the last one ended at %d", l.Index, o.Table, l.table)
	case o.Table%8 != 0 || o.Table%capacity+o.TableBytes > capacity:
		return fmt.Errorf("ring: lane %d: open.table is %d: its %d bytes would wrap", l.Index, o.Table, o.TableBytes)
	}
	l.table = o.Table + o.TableBytes
	return nil
}

// TableEnd is the end of the last row table read: what Release takes once its record may go.
func (l *Lane) TableEnd() uint64 { return l.table }

// Release gives back the slots of records below a number, and row tables below an offset. Pairs with the lane's acquire on shortage. Tables go first: an
// engine that ends in between leaves records whose tables the next one goes over, not tables of which no record tells.
func (l *Lane) Release(records, table uint64) {
	atomic.StoreUint64(l.tableT, table)
	atomic.StoreUint64(l.tail, records)
}

// Counters are what the producer has counted. A statistic; exact once the lane's step is closed. Any goroutine may ask until Close.
func (l *Lane) Counters() Counters {
	var b [CountersSize]byte
	base := l.ring.header.ControlOffset + uint64(ControlLaneOffset+l.Index*LaneSize+LaneCountersOffset)
	for i := 0; i < CountersSize; i += 8 {
		v := atomic.LoadUint64(l.ring.word(base + uint64(i)))
		for k := range 8 {
			b[i+k] = byte(v >> (8 * k))
		}
	}
	var c Counters
	c.Decode(b[:])
	return c
}
