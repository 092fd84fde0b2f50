package trigger

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"

	"dmi/tensor"
)

// Probe is a linear probe: weight · row + bias. Weights are rounded to float32.
type Probe struct {
	Weight []float64
	Bias   float64
}

// Bounds of a probe's file.
const (
	probeHeader = 1 << 20
	probeBytes  = 64 << 20
)

// ReadProbe reads `weight`, and `bias` where there is one, from a safetensors file below a folder: a document that comes over the network names no file elsewhere.
func ReadProbe(dir, name string) (*Probe, error) {
	fail := func(err error) (*Probe, error) { return nil, fmt.Errorf("probe %q: %w", name, err) }
	if !filepath.IsLocal(name) {
		return fail(fmt.Errorf("a path below the store's folder is needed: put the file there, and name it from there"))
	}
	root, err := os.OpenRoot(dir) // no link leads out of it
	if err != nil {
		return fail(err)
	}
	defer root.Close()
	file, err := root.Open(filepath.FromSlash(name))
	if err != nil {
		return fail(fmt.Errorf("below the store's folder: %w", err))
	}
	defer file.Close()
	if info, err := file.Stat(); err != nil || !info.Mode().IsRegular() {
		return fail(fmt.Errorf("it is no file"))
	}
	text, err := io.ReadAll(io.LimitReader(file, probeBytes+1))
	if err != nil {
		return fail(err)
	}
	if len(text) > probeBytes {
		return fail(fmt.Errorf("it has more than %d bytes", probeBytes))
	}
	p, err := parseProbe(text)
	if err != nil {
		return fail(err)
	}
	return p, nil
}

func parseProbe(text []byte) (*Probe, error) {
	if len(text) < 8 {
		return nil, fmt.Errorf("%d bytes are no safetensors file", len(text))
	}
	length := binary.LittleEndian.Uint64(text)
	if length > min(probeHeader, uint64(len(text)-8)) {
		return nil, fmt.Errorf("a header of %d bytes in a safetensors file of %d", length, len(text))
	}
	var header map[string]json.RawMessage
	if err := json.Unmarshal(text[8:8+length], &header); err != nil {
		return nil, fmt.Errorf("the header is not a safetensors file's: %w", err)
	}
	data := text[8+length:]
	weight, err := probeTensor(header, data, "weight")
	if err != nil {
		return nil, err
	}
	if len(weight) == 0 {
		return nil, fmt.Errorf("it has no tensor `weight`, or an empty one")
	}
	bias, err := probeTensor(header, data, "bias")
	if err != nil {
		return nil, err
	}
	for i, v := range weight {
		if weight[i] = float64(float32(v)); math.IsInf(weight[i], 0) && !math.IsInf(v, 0) {
			return nil, fmt.Errorf("`weight` has %v, which is no float32: producers evaluate probes as well", v)
		}
	}
	p := &Probe{Weight: weight}
	switch len(bias) {
	case 0:
	case 1:
		p.Bias = bias[0]
	default:
		return nil, fmt.Errorf("`bias` has %d elements: a probe gives one number", len(bias))
	}
	for _, v := range append(bias, weight...) {
		if v-v != 0 {
			return nil, fmt.Errorf("it has elements that are not finite")
		}
	}
	return p, nil
}

// probeTensor gives a tensor's elements, nil where there is none of the name.
func probeTensor(header map[string]json.RawMessage, data []byte, name string) ([]float64, error) {
	raw, there := header[name]
	if !there {
		return nil, nil
	}
	var entry struct {
		DType   string    `json:"dtype"`
		Shape   []uint64  `json:"shape"`
		Offsets [2]uint64 `json:"data_offsets"`
	}
	if err := json.Unmarshal(raw, &entry); err != nil {
		return nil, fmt.Errorf("`%s`: %w", name, err)
	}
	dtype, err := tensor.ParseDType(entry.DType)
	if err != nil || !dtype.Real() {
		return nil, fmt.Errorf("`%s` is of %q: real numbers are needed", name, entry.DType)
	}
	elements := uint64(1)
	for _, n := range entry.Shape { // [1, n] is as good as [n]
		if n > probeBytes || elements*n > probeBytes {
			return nil, fmt.Errorf("`%s` has a shape of %v", name, entry.Shape)
		}
		elements *= n
	}
	from, to := entry.Offsets[0], entry.Offsets[1]
	if from > to || to > uint64(len(data)) || to-from != elements*uint64(dtype.Size()) {
		return nil, fmt.Errorf("`%s`: bytes %d to %d of %d for %d elements of %s", name, from, to, len(data), elements, dtype)
	}
	values := make([]float64, elements)
	dtype.Floats(values, data[from:to])
	return values, nil
}

// at is the probe's value for a row of as many elements as weights.
func (p *Probe) at(row []float64) float64 {
	// In the order of cuda/src/watch.h, which must come to the same.
	var sum [4]float64
	i := 0
	for ; i+4 <= len(p.Weight); i += 4 {
		for k := range sum {
			sum[k] += float64(p.Weight[i+k] * row[i+k])
		}
	}
	for ; i < len(p.Weight); i++ {
		sum[0] += float64(p.Weight[i] * row[i])
	}
	return p.Bias + ((sum[0] + sum[1]) + (sum[2] + sum[3]))
}
