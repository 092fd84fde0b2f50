package query

import (
	"container/list"
	"sync"

	"dmi/tensor"
)

// maxSummedRows bounds what is remembered of rows' statistics: 48 bytes each.
const maxSummedRows = 1 << 20

// chunkKey names a chunk whose rows do not change any more.
type chunkKey struct {
	request     tensor.RequestKey
	site        uint32
	attempt     uint16
	level       tensor.Level
	first, rows uint32
	lastStep    uint64
}

// summedRows remembers the statistics of chunks' rows: those asked for last, to a bound on rows. The zero value is ready.
type summedRows struct {
	mu    sync.Mutex
	rows  int
	byKey map[chunkKey]*list.Element
	order list.List // of summedChunk, the one used last in front
}

type summedChunk struct {
	key  chunkKey
	rows []tensor.Statistics // not to be modified
}

func (s *summedRows) get(key chunkKey) ([]tensor.Statistics, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	at, known := s.byKey[key]
	if !known {
		return nil, false
	}
	s.order.MoveToFront(at)
	return at.Value.(summedChunk).rows, true
}

func (s *summedRows) put(key chunkKey, rows []tensor.Statistics) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, known := s.byKey[key]; known || len(rows) > maxSummedRows {
		return
	}
	if s.byKey == nil {
		s.byKey = map[chunkKey]*list.Element{}
	}
	s.byKey[key] = s.order.PushFront(summedChunk{key, rows})
	for s.rows += len(rows); s.rows > maxSummedRows; {
		oldest := s.order.Remove(s.order.Back()).(summedChunk)
		delete(s.byKey, oldest.key)
		s.rows -= len(oldest.rows)
	}
}
