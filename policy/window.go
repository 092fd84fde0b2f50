package policy

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// Window is positions of a request, counted from the start of a region: `prompt[-1]`, `generated[:32]`, `all[::16]`. Brackets mean what
// they mean in Python.
type Window struct {
	Region Region
	Start  int64 // negative: from the prompt's end
	Stop   int64 // not included; MaxInt64: none
	Step   uint32
}

// Region of a request.
type Region uint8

const (
	All       Region = iota
	Prompt           // positions below the prompt's length
	Generated        // those from there on
)

var regionNames = []string{"all", "prompt", "generated"}

func (r Region) String() string { return regionNames[r] }

const (
	unbounded    = math.MaxInt64
	maxPosition  = math.MaxUint32
	windowsHints = "write all, prompt or generated and then [start:stop:step] as in Python: prompt[-1], generated[:32], all[::16]"
)

func (w Window) String() string {
	if w == (Window{w.Region, 0, unbounded, 1}) {
		return w.Region.String()
	}
	part := func(v, omitted int64) string {
		if v == omitted {
			return ""
		}
		return strconv.FormatInt(v, 10)
	}
	s := part(w.Start, 0) + ":" + part(w.Stop, unbounded)
	if w.Step > 1 {
		s += ":" + strconv.FormatUint(uint64(w.Step), 10)
	}
	return w.Region.String() + "[" + s + "]"
}

// ParseWindow reads one.
func ParseWindow(text string) (Window, error) {
	bad := func(why string) (Window, error) {
		return Window{}, fmt.Errorf("window %q: %s; %s", text[:min(len(text), 80)], why, windowsHints)
	}
	name, slice, indexed := strings.Cut(strings.TrimSpace(text), "[")
	w := Window{Stop: unbounded, Step: 1}
	switch name {
	case "all":
	case "prompt":
		w.Region = Prompt
	case "generated":
		w.Region = Generated
	default:
		return bad("no such region")
	}
	if !indexed {
		return w, nil
	}
	slice, closed := strings.CutSuffix(slice, "]")
	parts := strings.Split(slice, ":")
	if !closed || len(parts) > 3 || slice == "" {
		return bad("the brackets hold no slice")
	}
	number := func(s string, omitted int64) (int64, error) {
		if s = strings.TrimSpace(s); s == "" {
			return omitted, nil
		}
		v, err := strconv.ParseInt(s, 10, 64)
		if err == nil && (v > maxPosition || v < -maxPosition) {
			err = strconv.ErrRange
		}
		return v, err
	}
	var err error
	if w.Start, err = number(parts[0], 0); err != nil {
		return bad("the start is no position")
	}
	switch len(parts) {
	case 1: // one index
		if w.Stop = w.Start + 1; w.Start == -1 {
			w.Stop = unbounded
		}
	default:
		if w.Stop, err = number(parts[1], unbounded); err != nil {
			return bad("the stop is no position")
		}
	}
	if len(parts) == 3 {
		step, err := number(parts[2], 1)
		if err != nil || step < 1 {
			return bad("the step is a number from 1")
		}
		w.Step = uint32(step)
	}
	if (w.Start < 0 || w.Stop < 0) && w.Region != Prompt {
		return bad("only a prompt has an end to count from")
	}
	if w.Start >= 0 == (w.Stop >= 0) && w.Start >= w.Stop {
		return bad("it holds no position")
	}
	return w, nil
}

// bounds are the positions from which and to which the window reaches in a request whose prompt has so many tokens, and those at which the
// region begins. ok is false where that takes the prompt's length, and it is not known.
func (w Window) bounds(prompt uint32) (from, to uint64, ok bool) {
	if prompt == 0 && (w.Region == Generated || w.Start < 0 || w.Stop < 0) {
		return 0, 0, false
	}
	begin, end := int64(0), int64(unbounded)
	switch w.Region {
	case Prompt:
		if prompt != 0 {
			end = int64(prompt)
		}
	case Generated:
		begin = int64(prompt)
	}
	place := func(v int64) int64 {
		switch {
		case v == unbounded:
			return end
		case v < 0:
			return max(v+end, begin)
		}
		return min(begin+v, end)
	}
	return uint64(place(w.Start)), uint64(place(w.Stop)), true
}

// Holds reports whether a position of a request is in the window. With a prompt of unknown length, phase says what is prompt.
func (w Window) Holds(r Request, t Token) bool {
	if w.Region == Prompt && r.Prompt == 0 && t.Phase != Prefill {
		return false
	}
	from, to, ok := w.bounds(r.Prompt)
	p := uint64(t.Position)
	return ok && p >= from && p < to && (p-from)%uint64(w.Step) == 0
}
