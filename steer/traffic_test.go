package steer

import (
	"testing"

	"dmi/policy"
	"dmi/store"
	"dmi/tensor"
)

func TestCosts(t *testing.T) {
	f := flow{tokens: 10, measured: true, rows: []store.SiteTotal{{DType: tensor.BF16, Shape: []int{2, 3}}, {}}}
	for text, want := range map[string]float64{"full": 10 * 12, "sampled/4": 30, "fp8": 10 * (4 + 8), "int8": 120, "stats": 320, "off": 0} { // quantised: a scale, and codes to a multiple of 4
		level, err := policy.ParseLevel(text)
		if err != nil {
			t.Fatal(err)
		}
		if got, known := f.cost(0, level); got != want || !known {
			t.Errorf("%s: %v %v, want %v", text, got, known, want)
		}
		if _, known := f.cost(1, level); known != (level.Level == tensor.Off) {
			t.Errorf("%s: the cost of rows that nobody saw is known", text)
		}
	}
}
