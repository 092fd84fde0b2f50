package inspect

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"strconv"

	"dmi/query"
	"dmi/tensor"
)

// weights are a model's final norm and unembedding, as docs/format/models.md describes their file. The unembedding stays in the file.
type weights struct {
	file     *os.File
	spelling string // path of the vocabulary; "": not known
	unembed  stored // [vocabulary, d]
	scale    []float64
	shift    []float64 // nil: none
	bias     []float64 // of the unembedding; nil: none
	centred  bool      // LayerNorm, else RMSNorm
	epsilon  float64
	logitCap float64 // 0: none
}

type stored struct {
	dtype  tensor.DType
	shape  []int
	offset int64 // in the file
}

const maxWeightsHeader = 1 << 20

var (
	weightsName    = regexp.MustCompile(`^[0-9a-f]{64}\.safetensors$`)
	vocabularyName = regexp.MustCompile(`^([0-9a-f]{64}\.json)?$`)
)

// openWeights opens what a session's model left in the store's folder of models.
func openWeights(folder, session string) (*weights, error) {
	none := func(why string) error {
		return &query.Error{Code: query.NotFound, Message: fmt.Sprintf("logit lens of session %s: %s", session, why),
			Hint: "attach with lens=True, or ask a live session: session.inspect.lens() saves the model's final norm and unembedding first"}
	}
	text, err := os.ReadFile(filepath.Join(folder, session+".json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, none("its model's unembedding was not saved")
	}
	if err != nil {
		return nil, fmt.Errorf("inspect: logit lens of session %s: %w", session, err)
	}
	var named struct {
		Lens       string `json:"lens"`
		Vocabulary string `json:"vocabulary"`
	}
	if err := json.Unmarshal(text, &named); err != nil || !weightsName.MatchString(named.Lens) || !vocabularyName.MatchString(named.Vocabulary) {
		return nil, none(fmt.Sprintf("%s.json names no file of weights", session))
	}
	file, err := os.Open(filepath.Join(folder, named.Lens))
	if err != nil {
		return nil, none(err.Error())
	}
	w := &weights{file: file}
	if named.Vocabulary != "" {
		w.spelling = filepath.Join(folder, named.Vocabulary)
	}
	if err := w.parse(); err != nil {
		file.Close()
		return nil, fmt.Errorf("inspect: weights %s of session %s: %w", named.Lens, session, err)
	}
	return w, nil
}

func (w *weights) close() { w.file.Close() }

// texts is what each token is written as, nil where the model's process did not say.
func (w *weights) texts() ([]string, error) {
	if w.spelling == "" {
		return nil, nil
	}
	text, err := os.ReadFile(w.spelling)
	if err != nil {
		return nil, fmt.Errorf("inspect: vocabulary: %w", err)
	}
	var texts []string
	if err := json.Unmarshal(text, &texts); err != nil {
		return nil, fmt.Errorf("inspect: vocabulary %s: %w", w.spelling, err)
	}
	if len(texts) < w.vocabulary() {
		return nil, fmt.Errorf("inspect: vocabulary %s has %d tokens, the unembedding %d", w.spelling, len(texts), w.vocabulary())
	}
	return texts, nil
}

func (w *weights) parse() error {
	info, err := w.file.Stat()
	if err != nil {
		return err
	}
	var length [8]byte
	if _, err := w.file.ReadAt(length[:], 0); err != nil {
		return err
	}
	n := binary.LittleEndian.Uint64(length[:])
	if n > maxWeightsHeader {
		return fmt.Errorf("a header of %d bytes: at most %d", n, maxWeightsHeader)
	}
	text := make([]byte, n)
	if _, err := w.file.ReadAt(text, 8); err != nil {
		return err
	}
	var header map[string]json.RawMessage
	if err := json.Unmarshal(text, &header); err != nil {
		return err
	}
	var facts map[string]string
	if err := json.Unmarshal(header["__metadata__"], &facts); err != nil {
		return fmt.Errorf("metadata: %w", err)
	}
	if facts["format"] != "dmi-lens-1" || facts["norm"] != "rms" && facts["norm"] != "layer" {
		return fmt.Errorf("format %q, norm %q: not what this version reads", facts["format"], facts["norm"])
	}
	w.centred = facts["norm"] == "layer"
	if w.epsilon, err = strconv.ParseFloat(facts["epsilon"], 64); err != nil {
		return fmt.Errorf("epsilon: %w", err)
	}
	if given := facts["logit_cap"]; given != "" {
		if w.logitCap, err = strconv.ParseFloat(given, 64); err != nil || !(w.logitCap > 0) {
			return fmt.Errorf("logit_cap %q is not a number above 0", given)
		}
	}
	find := func(name string, dims int) (s stored, found bool, err error) {
		raw, found := header[name]
		if !found {
			return s, false, nil
		}
		var entry struct {
			DType   string   `json:"dtype"`
			Shape   []int    `json:"shape"`
			Offsets [2]int64 `json:"data_offsets"`
		}
		if err := json.Unmarshal(raw, &entry); err != nil {
			return s, true, fmt.Errorf("%s: %w", name, err)
		}
		if s.dtype, err = tensor.ParseDType(entry.DType); err != nil {
			return s, true, err
		}
		elements := int64(1)
		for _, n := range entry.Shape {
			if n <= 0 || elements > math.MaxInt64/int64(n)/16 {
				return s, true, fmt.Errorf("%s: shape %v", name, entry.Shape)
			}
			elements *= int64(n)
		}
		s.shape, s.offset = entry.Shape, 8+int64(n)+entry.Offsets[0]
		if len(entry.Shape) != dims || !s.dtype.Real() || entry.Offsets[0] < 0 || entry.Offsets[1]-entry.Offsets[0] != elements*int64(s.dtype.Size()) || 8+int64(n)+entry.Offsets[1] > info.Size() {
			return s, true, fmt.Errorf("%s: %s %v at %v does not fit a file of %d bytes", name, entry.DType, entry.Shape, entry.Offsets, info.Size())
		}
		return s, true, nil
	}
	var found bool
	if w.unembed, found, err = find("unembed.weight", 2); err != nil {
		return err
	}
	if !found {
		return errors.New("no unembed.weight")
	}
	for name, to := range map[string]*[]float64{"norm.weight": &w.scale, "norm.bias": &w.shift, "unembed.bias": &w.bias} {
		s, found, err := find(name, 1)
		if err != nil {
			return err
		}
		want := w.unembed.shape[1]
		if name == "unembed.bias" {
			want = w.unembed.shape[0]
		}
		if !found {
			continue
		}
		if s.shape[0] != want {
			return fmt.Errorf("%s: %v elements, not %d", name, s.shape, want)
		}
		if *to, err = w.read(s, 0, want); err != nil {
			return err
		}
	}
	return nil
}

// read decodes elements [from, from+n) of a tensor.
func (w *weights) read(s stored, from, n int) ([]float64, error) {
	size := s.dtype.Size()
	data := make([]byte, n*size)
	if _, err := w.file.ReadAt(data, s.offset+int64(from)*int64(size)); err != nil {
		return nil, err
	}
	values := make([]float64, n)
	s.dtype.Floats(values, data)
	return values, nil
}

func (w *weights) width() int      { return w.unembed.shape[1] }
func (w *weights) vocabulary() int { return w.unembed.shape[0] }

// normed is a copy of a row after the model's final norm.
func (w *weights) normed(row []float64) []float64 {
	x := append([]float64(nil), row...)
	n := float64(len(x))
	if w.centred {
		mean := 0.0
		for _, v := range x {
			mean += v
		}
		mean /= n
		for i := range x {
			x[i] -= mean
		}
	}
	scale := 1 / math.Sqrt(dot(x, x)/n+w.epsilon)
	for i := range x {
		x[i] *= scale
		if w.scale != nil {
			x[i] *= w.scale[i]
		}
		if w.shift != nil {
			x[i] += w.shift[i]
		}
	}
	return x
}

// logit is what the model makes of a product with row `token` of the unembedding.
func (w *weights) logit(token int, product float64) float64 {
	if w.bias != nil {
		product += w.bias[token]
	}
	if w.logitCap > 0 {
		product = w.logitCap * math.Tanh(product/w.logitCap)
	}
	return product
}
