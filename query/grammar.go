package query

import (
	"fmt"
	"strconv"
	"strings"
)

// maxHeads bounds a list of heads; no model comes near it.
const maxHeads = 4096

// ParseRange reads "a:b", "a:", ":b", ":", "a" (one position) and "" (everything); negative numbers count from the end.
func ParseRange(text string) (Range, error) {
	wrong := func(why string) (Range, error) {
		return Range{}, badArgument("write a:b, a:, :b or a; negative numbers count from the end", "range %q: %s", text, why)
	}
	text = strings.TrimSpace(text)
	if text == "" {
		return Range{0, End}, nil
	}
	from, to, colon := strings.Cut(text, ":")
	r := Range{0, End}
	var err error
	if from != "" {
		if r.From, err = parseIndex(from); err != nil {
			return wrong(err.Error())
		}
	}
	switch {
	case !colon && r.From == -1:
	case !colon:
		r.To = r.From + 1
	case to != "":
		if r.To, err = parseIndex(to); err != nil {
			return wrong(err.Error())
		}
		if (r.From < 0) == (r.To < 0) && r.To <= r.From {
			return wrong("it ends where it begins, or before")
		}
	}
	return r, nil
}

// String is the inverse of ParseRange.
func (r Range) String() string {
	if r == (Range{}) || r == (Range{0, End}) {
		return ":"
	}
	if r.To == End {
		return fmt.Sprintf("%d:", r.From)
	}
	return fmt.Sprintf("%d:%d", r.From, r.To)
}

func (r Range) everything() bool { return r == (Range{}) || r == (Range{0, End}) }

// clip gives the half-open range of positions that r means of n. A closed range may end beyond n: rows that were asked
// for by number and do not exist are missing, not ignored.
func (r Range) clip(n int) (from, to int) {
	if r == (Range{}) {
		return 0, n
	}
	from, to = r.From, r.To
	if from < 0 {
		from = max(0, from+n)
	}
	switch {
	case to == End:
		to = max(n, from)
	case to < 0:
		to = to + n
	}
	return from, max(from, to)
}

// ParseHeads reads a list such as "0,3,8:11"; "" is nil, all heads.
func ParseHeads(text string) ([]int, error) {
	if strings.TrimSpace(text) == "" {
		return nil, nil
	}
	wrong := func(why string) ([]int, error) {
		return nil, badArgument("write numbers and ranges, as in 0,3,8:11", "heads %q: %s", text, why)
	}
	heads := []int{}
	seen := map[int]bool{}
	for part := range strings.SplitSeq(text, ",") {
		from, to, isRange := strings.Cut(strings.TrimSpace(part), ":")
		first, err := parseIndex(from)
		if err != nil {
			return wrong(err.Error())
		}
		last := first + 1
		if isRange {
			if last, err = parseIndex(to); err != nil {
				return wrong(err.Error())
			}
		}
		switch {
		case first < 0:
			return wrong("a head is counted from 0")
		case last <= first:
			return wrong(fmt.Sprintf("%s is empty", part))
		case last-first > maxHeads-len(heads):
			return wrong(fmt.Sprintf("more than %d", maxHeads))
		}
		for h := first; h < last; h++ {
			if seen[h] {
				return wrong(fmt.Sprintf("head %d is named twice", h))
			}
			seen[h] = true
			heads = append(heads, h)
		}
	}
	return heads, nil
}

// ParseLevel reads "full" (and "") or "any".
func ParseLevel(text string) (Level, error) {
	switch text {
	case "", "full":
		return FullOnly, nil
	case "any":
		return AnyLevel, nil
	}
	return 0, badArgument("say level=full or level=any", "level %q: no such choice", text)
}

func parseIndex(text string) (int, error) {
	v, err := strconv.ParseInt(strings.TrimSpace(text), 10, 33) // positions are 32-bit
	if err != nil {
		return 0, fmt.Errorf("%q is not a whole number of at most 32 bits", text)
	}
	return int(v), nil
}
