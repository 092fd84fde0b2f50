package serve

import (
	"sync"
	"time"

	"dmi/store"
	"dmi/tensor"
)

// Occupancy is how full something bounded is. Unit: bytes, or slots, as its name says.
type Occupancy struct {
	Used     uint64 `json:"used"`
	Capacity uint64 `json:"capacity"`
}

// Troubles are what an engine counts of those that are nobody's who is attached now.
type Troubles struct {
	Stopped  time.Duration // in which its process did not run
	Refused  uint64        // producers that were not admitted
	Expelled uint64        // and that were thrown out later
}

// Attached is a producer that is connected now, in its own counters' words (abi/ring.h, dmi_counters).
type Attached struct {
	Session      string               `json:"session"`
	Number       uint32               `json:"number"`
	Mode         string               `json:"mode"`
	Model        string               `json:"model"`
	AttachedAt   time.Time            `json:"attached"`
	Occupancies  map[string]Occupancy `json:"occupancy"` // records, payload_bytes, staging_bytes, spill_bytes; batches between drain and pipeline
	Steps        uint64               `json:"steps"`
	Records      uint64               `json:"records"`
	CapturedRows uint64               `json:"captured_rows"`
	Captured     uint64               `json:"captured_bytes"`
	OtherRows    map[string]uint64    `json:"other_rows"` // by reason
	Waits        uint64               `json:"waits"`
	WaitNs       uint64               `json:"wait_ns"`
	OpCalls      uint64               `json:"op_calls"`
	OpNs         uint64               `json:"op_ns"`
	Outside      uint64               `json:"outside"`
	SpilledBytes uint64               `json:"spilled_bytes"`
	KeptRows     uint64               `json:"kept_rows"`     // of captured rows: in full because a trigger's condition was met
	Copied       uint64               `json:"copied_bytes"`  // by copy commands: what crosses PCIe, where there is one
	Offered      uint64               `json:"offered_bytes"` // that lay in the payload ring to be fetched or not
	Fetched      uint64               `json:"fetched_bytes"` // of them, by copy commands
	ExpiredRows  uint64               `json:"expired_rows"`  // of offers that were let go before their step had ended
	LagNs        int64                `json:"lag_ns"`        // age of the oldest published record that is not yet drained
}

// rateMeter turns totals into rates between calls that are at least a second apart.
type rateMeter struct {
	mu            sync.Mutex
	before, after rateSample
}

type rateSample struct {
	at          time.Time
	rows, bytes uint64
}

// Rates are averages over Seconds.
type Rates struct {
	Rows    float64 `json:"rows_per_second"`
	Bytes   float64 `json:"bytes_per_second"`
	Seconds float64 `json:"seconds"`
}

func (m *rateMeter) rates(now rateSample) Rates {
	m.mu.Lock()
	defer m.mu.Unlock()
	if now.at.Sub(m.after.at) >= time.Second {
		m.before, m.after = m.after, now
	}
	since := m.before
	seconds := now.at.Sub(since.at).Seconds()
	if since.at.IsZero() || seconds <= 0 || now.rows < since.rows || now.bytes < since.bytes {
		return Rates{}
	}
	return Rates{float64(now.rows-since.rows) / seconds, float64(now.bytes-since.bytes) / seconds, seconds}
}

func rowsOf(books store.Totals, outcome tensor.Outcome) (rows uint64) {
	for _, line := range books.Lines {
		if line.Outcome == outcome {
			rows += line.Rows
		}
	}
	return rows
}
