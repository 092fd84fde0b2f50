package ring

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// The dumps were written by a C program from abi/ring.h; expected.json says what went in, by field name.
const golden = "../abi/golden"

type expectation map[string]map[string]any

func readExpected(t *testing.T) expectation {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(golden, "expected.json"))
	if err != nil {
		t.Fatal(err)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber() // some values exceed a float's 53 bits
	var e expectation
	if err := d.Decode(&e); err != nil {
		t.Fatal(err)
	}
	return e
}

func readDump(t *testing.T, name string, size int) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(golden, name+".bin"))
	if err != nil {
		t.Fatal(err)
	}
	if len(b) != size {
		t.Fatalf("%s.bin has %d bytes, the generated view %d", name, len(b), size)
	}
	return b
}

type view interface {
	Decode([]byte)
	Encode([]byte)
}

var views = map[string]struct {
	size  int
	fresh func() view
}{
	"header":  {HeaderSize, func() view { return new(Header) }},
	"site":    {SiteSize, func() view { return new(Site) }},
	"gate":    {GateSize, func() view { return new(Gate) }},
	"clause":  {ClauseSize, func() view { return new(Clause) }},
	"watch":   {WatchSize, func() view { return new(Watch) }},
	"keep":    {KeepSize, func() view { return new(Keep) }},
	"run":     {RunSize, func() view { return new(Run) }},
	"record":  {RecordSize, func() view { return new(Record) }},
	"open":    {OpenRecordSize, func() view { return new(OpenRecord) }},
	"close":   {CloseRecordSize, func() view { return new(CloseRecord) }},
	"gap":     {GapRecordSize, func() view { return new(GapRecord) }},
	"table":   {TableSize, func() view { return new(Table) }},
	"span":    {SpanSize, func() view { return new(Span) }},
	"command": {CommandSize, func() view { return new(Command) }},
}

// fields flattens a view to the form of expected.json.
func fields(t *testing.T, v view) map[string]any {
	t.Helper()
	b, err := json.Marshal(reflect.ValueOf(v).Elem().Interface())
	if err != nil {
		t.Fatal(err)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	var named map[string]any
	if err := d.Decode(&named); err != nil {
		t.Fatal(err)
	}
	out := map[string]any{}
	for name, value := range named {
		out[strings.ToLower(name)] = value
	}
	return out
}

func TestGoldenDumps(t *testing.T) {
	expected := readExpected(t)
	for name, kind := range views {
		t.Run(name, func(t *testing.T) {
			dump := readDump(t, name, kind.size)
			v := kind.fresh()
			v.Decode(dump)
			want := map[string]any{}
			for field, value := range expected[name] {
				want[strings.ReplaceAll(field, "_", "")] = value
			}
			if site, ok := v.(*Site); ok {
				if got := string(site.Name[:site.NameBytes]); got != want["name"] {
					t.Errorf("name is %q, want %q", got, want["name"])
				}
				delete(want, "name")
			}
			got := fields(t, v)
			if name == "site" {
				delete(got, "name")
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("decoded (-want +got):\n%s", diff)
			}
			again := bytes.Repeat([]byte{0xee}, kind.size)
			v.Encode(again)
			if !bytes.Equal(again, dump) {
				t.Errorf("encoded again:\n%x\nwant:\n%x", again, dump)
			}
		})
	}
}

// The control block is words that two processes share: it has offsets, not a struct.
func TestGoldenControl(t *testing.T) {
	dump := readDump(t, "control", ControlSize)
	word := func(offset int) json.Number {
		b, _ := json.Marshal(binary.LittleEndian.Uint64(dump[offset:]))
		return json.Number(b)
	}
	got := map[string]any{
		"state": word(ControlStateOffset), "sites_count": word(ControlSitesCountOffset), "payload_tail": word(ControlPayloadTailOffset),
		"spill_tail": word(ControlSpillTailOffset), "commands_head": word(ControlCommandsHeadOffset),
		"commands_done": word(ControlCommandsDoneOffset), "engine_waiting": word(ControlEngineWaitingOffset),
		"pump_waiting": word(ControlPumpWaitingOffset), "policy": word(ControlPolicyOffset), "engine_pid": word(ControlEnginePIDOffset),
	}
	var lanes []any
	for i := range MaxLanes {
		at := ControlLaneOffset + i*LaneSize
		counter := func(offset int) json.Number { return word(at + LaneCountersOffset + offset) }
		lane := map[string]any{
			"record_tail": word(at + LaneRecordTailOffset), "table_tail": word(at + LaneTableTailOffset),
			"steps": counter(CountersStepsOffset), "records": counter(CountersRecordsOffset),
			"captured_rows": counter(CountersCapturedRowsOffset), "captured_bytes": counter(CountersCapturedBytesOffset),
			"waits": counter(CountersWaitsOffset), "wait_ns": counter(CountersWaitNSOffset),
			"op_calls": counter(CountersOpCallsOffset), "op_ns": counter(CountersOpNSOffset),
			"outside": counter(CountersOutsideOffset), "spilled_bytes": counter(CountersSpilledBytesOffset),
			"kept_rows": counter(CountersKeptRowsOffset), "offered_bytes": counter(CountersOfferedBytesOffset),
		}
		var other []any
		for r := range Reasons {
			other = append(other, counter(CountersOtherRowsOffset+8*r))
		}
		lane["other_rows"] = other
		lanes = append(lanes, lane)
	}
	got["lane"] = lanes
	if diff := cmp.Diff(readExpected(t)["control"], got); diff != "" {
		t.Errorf("control block (-want +got):\n%s", diff)
	}
}
