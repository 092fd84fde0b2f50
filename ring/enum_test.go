package ring

import (
	"testing"

	"dmi/tensor"
)

// The vocabulary of tensor/ and the generated view of ring.h say the same.
func TestTensorEnumsEqualTheABI(t *testing.T) {
	for name, pair := range map[string][2]int{
		"space tokens": {int(tensor.Tokens), SpaceTokens}, "space logits": {int(tensor.Logits), SpaceLogits}, "space cache": {int(tensor.Cache), SpaceCache},
		"spaces": {tensor.Spaces, Spaces}, "reasons": {int(tensor.Repeated), Reasons}, // the first that is the engine's own
		"level full": {int(tensor.Full), LevelFull}, "level fp8": {int(tensor.FP8), LevelFP8}, "level int8": {int(tensor.Int8), LevelInt8},
		"level sampled": {int(tensor.Sampled), LevelSampled}, "level stats": {int(tensor.Stats), LevelStats}, "level off": {int(tensor.Off), LevelOff},
		"none": {int(tensor.OutcomeNone), OutcomeNone}, "captured": {int(tensor.Captured), OutcomeCaptured}, "skipped": {int(tensor.Skipped), OutcomeSkipped},
		"cached": {int(tensor.Cached), OutcomeCached}, "not_computed": {int(tensor.NotComputed), OutcomeNotComputed},
		"rejected": {int(tensor.Rejected), OutcomeRejected}, "dropped": {int(tensor.Dropped), OutcomeDropped}, "lost": {int(tensor.Lost), OutcomeLost},
		"reason none": {int(tensor.ReasonNone), ReasonNone}, "policy": {int(tensor.Policy), ReasonPolicy}, "prefix": {int(tensor.Prefix), ReasonPrefix},
		"engine": {int(tensor.Engine), ReasonEngine}, "speculation": {int(tensor.Speculation), ReasonSpeculation}, "ring_full": {int(tensor.RingFull), ReasonRingFull},
		"records_full": {int(tensor.RecordsFull), ReasonRecordsFull}, "timeout": {int(tensor.Timeout), ReasonTimeout}, "mismatch": {int(tensor.Mismatch), ReasonMismatch},
		"aborted": {int(tensor.Aborted), ReasonAborted}, "producer_exit": {int(tensor.ProducerExit), ReasonProducerExit},
		"engine_exit": {int(tensor.EngineExit), ReasonEngineExit}, "not_fired": {int(tensor.NotFired), ReasonNotFired}, "corrupt": {int(tensor.Corrupt), ReasonCorrupt},
		"io": {int(tensor.IO), ReasonIO}, "budget": {int(tensor.Budget), ReasonBudget},
		"NONE": {int(tensor.DTypeNone), DTypeNone}, "BOOL": {int(tensor.Bool), DTypeBool}, "U8": {int(tensor.U8), DTypeU8}, "I8": {int(tensor.I8), DTypeI8},
		"U16": {int(tensor.U16), DTypeU16}, "I16": {int(tensor.I16), DTypeI16}, "U32": {int(tensor.U32), DTypeU32}, "I32": {int(tensor.I32), DTypeI32},
		"U64": {int(tensor.U64), DTypeU64}, "I64": {int(tensor.I64), DTypeI64}, "F16": {int(tensor.F16), DTypeF16}, "BF16": {int(tensor.BF16), DTypeBF16},
		"F32": {int(tensor.F32), DTypeF32}, "F64": {int(tensor.F64), DTypeF64}, "F8_E4M3": {int(tensor.F8E4M3), DTypeF8E4M3},
		"F8_E5M2": {int(tensor.F8E5M2), DTypeF8E5M2}, "F8_E4M3FNUZ": {int(tensor.F8E4M3FNUZ), DTypeF8E4M3FNUZ},
		"F8_E5M2FNUZ": {int(tensor.F8E5M2FNUZ), DTypeF8E5M2FNUZ}, "F8_E8M0": {int(tensor.F8E8M0), DTypeF8E8M0}, "C64": {int(tensor.C64), DTypeC64},
		"C128": {int(tensor.C128), DTypeC128}, "fill": {int(tensor.FillNegInf), 1},
	} {
		if pair[0] != pair[1] {
			t.Errorf("%s is %d in tensor and %d in ring.h", name, pair[0], pair[1])
		}
	}
	for d := tensor.DType(0); d.Valid() || d == 0; d++ {
		if d > DTypeC128 {
			t.Errorf("tensor has a dtype %v that ring.h has not", d)
		}
	}
}
