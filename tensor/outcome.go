package tensor

// Level is the fidelity at which a row left the device. Values equal enum dmi_level.
type Level uint8

const (
	Full Level = iota
	FP8
	Int8
	Sampled
	Stats
	Off
)

// Outcome is what became of a row; each row of each site of each step has exactly one. Values equal enum dmi_outcome.
type Outcome uint8

const (
	OutcomeNone Outcome = iota
	Captured
	Skipped
	Cached
	NotComputed
	Rejected
	Dropped
	Lost
	Outcomes = 8
)

// Reason is why. Values equal enum dmi_reason, but for the last, which is the engine's own: no producer writes it.
type Reason uint8

const (
	ReasonNone Reason = iota
	Policy
	Prefix
	Engine
	Speculation
	RingFull
	RecordsFull
	Timeout
	Mismatch
	Aborted
	ProducerExit
	EngineExit
	NotFired
	Corrupt
	IO
	Budget
	Repeated // captured: the site gave the row again in the same step, which is not kept
	Reasons  = 17
)

var (
	levelNames   = [...]string{"full", "fp8", "int8", "sampled", "stats", "off"}
	outcomeNames = [...]string{"none", "captured", "skipped", "cached", "not_computed", "rejected", "dropped", "lost"}
	reasonNames  = [...]string{"", "policy", "prefix", "engine", "speculation", "ring_full", "records_full", "timeout", "mismatch",
		"aborted", "producer_exit", "engine_exit", "not_fired", "corrupt", "io", "budget", "repeated"}
)

func name(names []string, i uint8) string {
	if int(i) < len(names) {
		return names[i]
	}
	return "invalid"
}

func (l Level) Valid() bool   { return int(l) < len(levelNames) }
func (o Outcome) Valid() bool { return o > OutcomeNone && int(o) < len(outcomeNames) }
func (r Reason) Valid() bool  { return int(r) < len(reasonNames) }

func (l Level) String() string   { return name(levelNames[:], uint8(l)) }
func (o Outcome) String() string { return name(outcomeNames[:], uint8(o)) }
func (r Reason) String() string  { return name(reasonNames[:], uint8(r)) }
