package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"dmi/query"
	"dmi/tensor"

	"github.com/spf13/cobra"
)

// formatOf says what a file's name, or a flag, asks for.
func formatOf(name, flag string, formats ...string) (string, error) {
	format := flag
	if format == "" {
		format = strings.TrimPrefix(filepath.Ext(name), ".")
	}
	if !slices.Contains(formats, format) {
		return "", usage(fmt.Errorf("%q: the format %q is not one of %s; name the file so, or say it with --format", name, format, strings.Join(formats, ", ")))
	}
	return format, nil
}

func getCommand(o *options) *cobra.Command {
	s := &selection{}
	var tokens, steps, heads, as, level, out, format string
	var partial bool
	c := &cobra.Command{
		Use:   "get",
		Short: "Get tensors: into a .safetensors or .npy file, statistics into .parquet, or described on the terminal",
		Example: "  dmi get --request r1a2b3c4.0 --site blocks.5.hook_resid_post --out resid.npy\n" +
			"  dmi get --site attn.hook_pattern --layer 5 --heads 0,3 --tokens 4:9 --out pattern.npy\n" +
			"  dmi get --run r1a2b3c4 --site 'blocks.*.hook_resid_post' --out run.safetensors",
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			r, err := o.reader(c)
			if err != nil {
				return err
			}
			defer r.close()
			if err := s.latest(c, r); err != nil {
				return err
			}
			cut := tokens != "" || steps != "" || heads != "" || level != ""
			if out != "" {
				if format, err = formatOf(out, format, "safetensors", "npy", "parquet", "raw"); err != nil {
					return err
				}
			}
			v := s.arguments(c)
			set(v, "as", strings.ToUpper(as))
			if partial {
				v.Set("partial", "true")
			}
			// A whole tensor, or several, are an export; one that is cut, or only looked at, is a read.
			if out != "" && format != "raw" && (!cut || format == "parquet") {
				if cut && format == "parquet" {
					return usage(fmt.Errorf("get: Parquet holds statistics of whole requests; leave --tokens, --steps, --heads and --level out, or use `dmi stats --tokens`"))
				}
				if format == "parquet" && (as != "" || partial) {
					return usage(fmt.Errorf("get: Parquet holds statistics of the rows that are there; leave --as and --partial out"))
				}
				v.Set("format", format)
				return download(c, o, r, "/export", v, out)
			}
			if len(s.requests) != 1 || s.site == "" {
				return usage(fmt.Errorf("get: name one --request and one --site to look at a tensor or to cut it; --out FILE.safetensors takes several"))
			}
			set(v, "tokens", tokens)
			set(v, "steps", steps)
			set(v, "heads", heads)
			set(v, "level", level)
			answer, err := r.do(c.Context(), http.MethodGet, "/tensor", v)
			if err != nil {
				return err
			}
			defer answer.Body.Close()
			d, err := describeAnswer(answer.Header)
			if err != nil {
				return err
			}
			switch {
			case out == "":
				return d.print(c, o, answer.Body)
			case format == "raw":
				return save(c, o, answer.Body, out)
			}
			head, err := d.fileHeader(format, s.requests[0])
			if err != nil {
				return err
			}
			return save(c, o, io.MultiReader(bytes.NewReader(head), answer.Body), out)
		},
	}
	s.register(c, true, true)
	f := c.Flags()
	f.StringVarP(&tokens, "tokens", "t", "", "positions A:B, half-open; negative ones count from the end")
	f.StringVar(&steps, "steps", "", "forwards A:B of the request, counted from 0")
	f.StringVar(&heads, "heads", "", "heads, such as 0,3")
	c.Flags().StringVar(&level, "level", "", "full (rows at that level, or an error) or any (quantised rows too, as F32)")
	f.StringVar(&as, "as", "", "F32: converted (NumPy has no bfloat16)")
	f.StringVarP(&out, "out", "o", "", "file to write; - for the standard output, with --format")
	f.StringVar(&format, "format", "", "safetensors, npy, parquet or raw; default: what the file's name ends in")
	f.BoolVar(&partial, "partial", false, "the rows that are there, where some are missing")
	return c
}

// described is what the headers of /tensor say.
type described struct {
	Site      string   `json:"site"`
	DType     string   `json:"dtype"`
	Shape     []int    `json:"shape"`
	Axes      []string `json:"axes"`
	Positions string   `json:"positions"`
	Complete  bool     `json:"complete"`
	Missing   uint64   `json:"missing"`
	dtype     tensor.DType
}

func describeAnswer(h http.Header) (*described, error) {
	d := &described{Site: h.Get("Dmi-Site"), DType: h.Get("Dmi-Dtype"), Positions: h.Get("Dmi-Positions"), Complete: h.Get("Dmi-Complete") == "true", Shape: []int{}}
	var err error
	if d.dtype, err = tensor.ParseDType(d.DType); err != nil {
		return nil, fmt.Errorf("the engine's answer: %w", err)
	}
	for _, n := range strings.Split(h.Get("Dmi-Shape"), ",") {
		dim, err := strconv.Atoi(n)
		if err != nil {
			return nil, fmt.Errorf("the engine's answer: shape %q: %w", h.Get("Dmi-Shape"), err)
		}
		d.Shape = append(d.Shape, dim)
	}
	d.Axes = strings.Split(h.Get("Dmi-Axes"), ",")
	d.Missing, err = strconv.ParseUint(h.Get("Dmi-Missing"), 10, 64)
	return d, err
}

func (d *described) bytes() int64 {
	n := int64(d.dtype.Size())
	for _, dim := range d.Shape {
		n *= int64(dim)
	}
	return n
}

// fileHeader is what stands before the bytes of one tensor in a file.
func (d *described) fileHeader(format, request string) ([]byte, error) {
	if format == "npy" {
		return query.NPYHeader(d.dtype, d.Shape)
	}
	type entry struct {
		DType   string   `json:"dtype"`
		Shape   []int    `json:"shape"`
		Offsets [2]int64 `json:"data_offsets"`
	}
	header, err := json.Marshal(map[string]any{
		"__metadata__": map[string]string{"format": "pt", "writer": "dmi", "request": request, "positions": d.Positions, "complete": strconv.FormatBool(d.Complete)},
		d.Site:         entry{d.DType, d.Shape, [2]int64{0, d.bytes()}},
	})
	if err != nil {
		return nil, err
	}
	for len(header)%8 != 0 {
		header = append(header, ' ')
	}
	return append(binary.LittleEndian.AppendUint64(nil, uint64(len(header))), header...), nil
}

const shownElements = 8

// print describes a tensor, with its first elements and its statistics.
func (d *described) print(c *cobra.Command, o *options, body io.Reader) error {
	var statistics tensor.Statistics
	var first []float64
	block := make([]byte, 1<<20)
	for d.dtype.Real() {
		n, err := io.ReadFull(body, block)
		if n == 0 && err == io.EOF {
			break
		}
		if err != nil && err != io.ErrUnexpectedEOF {
			return fmt.Errorf("read the tensor: %w", err)
		}
		whole := block[:n/d.dtype.Size()*d.dtype.Size()]
		if first == nil {
			first = make([]float64, min(shownElements, len(whole)/d.dtype.Size()))
			d.dtype.Floats(first, whole[:len(first)*d.dtype.Size()])
		}
		statistics.Add(d.dtype, whole)
		if err != nil {
			break
		}
	}
	if want := d.bytes() / int64(d.dtype.Size()); d.dtype.Real() && int64(statistics.Count) != want {
		return fmt.Errorf("read the tensor: the answer broke off after %d of %d elements", statistics.Count, want)
	}
	if o.json {
		return printJSON(c, d)
	}
	out := c.OutOrStdout()
	fmt.Fprintf(out, "%s  %s %v [%s]  %s\n", d.Site, d.DType, d.Shape, strings.Join(d.Axes, ", "), humanBytes(uint64(d.bytes())))
	fmt.Fprintf(out, "positions %s", d.Positions)
	if !d.Complete {
		fmt.Fprintf(out, "  (%d rows asked for are missing)", d.Missing)
	}
	fmt.Fprintln(out)
	if d.dtype.Real() {
		least, greatest := statistics.Range()
		fmt.Fprintf(out, "mean %.5g  rms %.5g  min %.5g  max %.5g  L2 %.5g  non-finite %d of %d\n", statistics.Mean(), statistics.RMS(), least, greatest, statistics.L2(),
			statistics.NonFinite, statistics.Count)
		fmt.Fprintf(out, "first %v\n", first)
	}
	return nil
}
