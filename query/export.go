package query

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"dmi/tensor"
)

// Export is a file that is planned and not yet written.
type Export struct {
	ContentType string
	Filename    string
	Size        int64  // bytes; -1 where it is not known before it is written
	Rows        uint64 // whose values it holds; 0 where it holds statistics
	write       func(ctx context.Context, w io.Writer) error
}

// WriteTo writes the file. After an error what was written is not one: do not keep it.
func (x *Export) WriteTo(ctx context.Context, w io.Writer) error { return x.write(ctx, w) }

// Export plans a file of what a scope holds. Names within it and its completeness are settled before the first byte.
func (e *Engine) Export(ctx context.Context, q ExportQuery) (*Export, error) {
	switch q.Format {
	case "", "safetensors":
		return e.exportSafetensors(ctx, q)
	case "npy":
		return e.exportNPY(ctx, q)
	case "parquet":
		stats, err := e.Stats(ctx, StatsQuery{Scope: q.Scope, Site: q.Site, Layer: q.Layer})
		if err != nil {
			return nil, err
		}
		return &Export{"application/vnd.apache.parquet", fileName(q, "stats", ".parquet"), -1, 0, stats.WriteParquet}, nil
	}
	return nil, badArgument("say safetensors, npy or parquet", "export as %q: no such format", q.Format)
}

// named is a tensor of an export.
type named struct {
	name string
	*Tensor
}

func rowsOf(all []named) (rows uint64) {
	for _, t := range all {
		for _, span := range t.Positions {
			rows += uint64(span.Count)
		}
	}
	return rows
}

// tensors plans every tensor of an export. Sites of which the engine computed nothing are left out: there is nothing to name.
func (e *Engine) tensors(ctx context.Context, q ExportQuery) ([]named, []tensor.Request, error) {
	requests, err := e.requestsOf(ctx, q.Scope)
	if err != nil {
		return nil, nil, err
	}
	var all []named
	for _, r := range requests {
		sites, err := e.sitesOf(r.Key.Session, q.Site, q.Layer)
		if err != nil {
			return nil, nil, err
		}
		for _, site := range sites {
			t, err := e.tensor(ctx, r, site, TensorQuery{Partial: q.Partial, As: q.As})
			var failure *Error
			if errors.As(err, &failure) && failure.Code == Incomplete && (q.Partial || failure.Coverage.Complete) {
				continue
			}
			if err != nil {
				return nil, nil, err
			}
			name := site.Name
			if len(requests) > 1 {
				name = r.ID + "/" + name
			}
			all = append(all, named{name, t})
		}
	}
	if len(all) == 0 {
		return nil, nil, &Error{Code: Incomplete, Message: fmt.Sprintf("export of %d requests: no row of these sites was captured", len(requests)),
			Hint: "see the coverage"}
	}
	return all, requests, nil
}

// maxHeaderBytes is what readers of safetensors accept.
const maxHeaderBytes = 100_000_000

var inSafetensors = map[tensor.DType]bool{tensor.Bool: true, tensor.U8: true, tensor.I8: true, tensor.U16: true, tensor.I16: true, tensor.U32: true,
	tensor.I32: true, tensor.U64: true, tensor.I64: true, tensor.F16: true, tensor.BF16: true, tensor.F32: true, tensor.F64: true,
	tensor.F8E4M3: true, tensor.F8E5M2: true, tensor.F8E8M0: true, tensor.C64: true}

// exportSafetensors plans: 8 bytes of header length, the header (JSON, padded with blanks to 8 bytes), the tensors in its order.
func (e *Engine) exportSafetensors(ctx context.Context, q ExportQuery) (*Export, error) {
	all, requests, err := e.tensors(ctx, q)
	if err != nil {
		return nil, err
	}
	// Elements are to lie aligned: widest first, as the reference writer has it.
	var ordered []named
	for size := 16; size > 0; size /= 2 {
		for _, t := range all {
			if t.DType.Size() == size {
				ordered = append(ordered, t)
			}
		}
	}
	metadata, err := e.metadata(requests, ordered)
	if err != nil {
		return nil, err
	}
	header := []byte(`{"__metadata__":`)
	header = append(header, metadata...)
	var offset int64
	for _, t := range ordered {
		if !inSafetensors[t.DType] {
			return nil, badArgument("ask for F32, if it is real", "export %s as safetensors: the format has no dtype %s", t.name, t.DType)
		}
		entry, err := json.Marshal(struct {
			DType   string   `json:"dtype"`
			Shape   []int    `json:"shape"`
			Offsets [2]int64 `json:"data_offsets"`
		}{t.DType.String(), t.Shape, [2]int64{offset, offset + t.Size()}})
		if err != nil {
			return nil, err
		}
		name, err := json.Marshal(t.name)
		if err != nil {
			return nil, err
		}
		header = append(append(append(append(header, ','), name...), ':'), entry...)
		offset += t.Size()
		if len(header) > maxHeaderBytes {
			return nil, &Error{Code: OverLimit, Message: fmt.Sprintf("export of %d tensors: their names do not fit a safetensors header", len(ordered)),
				Hint: "export fewer requests or sites at a time"}
		}
	}
	header = append(header, '}')
	for len(header)%8 != 0 {
		header = append(header, ' ')
	}
	return &Export{"application/octet-stream", fileName(q, "", ".safetensors"), 8 + int64(len(header)) + offset, rowsOf(ordered),
		func(ctx context.Context, w io.Writer) error {
			if err := binary.Write(w, binary.LittleEndian, uint64(len(header))); err != nil {
				return err
			}
			if _, err := w.Write(header); err != nil {
				return err
			}
			for _, t := range ordered {
				if _, err := t.Open(ctx).WriteTo(w); err != nil {
					return fmt.Errorf("export %s: %w", t.name, err)
				}
			}
			return nil
		}}, nil
}

// metadata is the header's __metadata__: strings only, so JSON within JSON.
func (e *Engine) metadata(requests []tensor.Request, all []named) ([]byte, error) {
	type about struct {
		ID      string          `json:"id"`
		Run     string          `json:"run"`
		Session string          `json:"session"`
		Model   json.RawMessage `json:"model,omitempty"`
		Tokens  []int64         `json:"tokens,omitempty"`
	}
	sessions, err := e.sessions()
	if err != nil {
		return nil, err
	}
	var list []about
	for _, r := range requests {
		if r, err = e.requestByID(r.ID); err != nil { // lists leave tokens out
			return nil, err
		}
		session := sessions[r.Key.Session]
		list = append(list, about{r.ID, r.Run, session.ID, session.Model, r.Tokens})
	}
	positions := map[string]string{}
	complete := "true"
	for _, t := range all {
		positions[t.name] = FormatSpans(t.Positions)
		if !t.Complete {
			complete = "false"
		}
	}
	requestsJSON, err := json.Marshal(list)
	if err != nil {
		return nil, err
	}
	positionsJSON, err := json.Marshal(positions)
	if err != nil {
		return nil, err
	}
	return json.Marshal(map[string]string{"format": "pt", "writer": "dmi", "requests": string(requestsJSON), "positions": string(positionsJSON),
		"complete": complete})
}

// FormatSpans writes spans as "a:b,c:d".
func FormatSpans(all []Span) string {
	parts := make([]string, len(all))
	for i, s := range all {
		parts[i] = fmt.Sprintf("%d:%d", s.First, s.end())
	}
	return strings.Join(parts, ",")
}

var numpyNames = map[tensor.DType]string{tensor.Bool: "|b1", tensor.U8: "|u1", tensor.I8: "|i1", tensor.U16: "<u2", tensor.I16: "<i2", tensor.U32: "<u4",
	tensor.I32: "<i4", tensor.U64: "<u8", tensor.I64: "<i8", tensor.F16: "<f2", tensor.F32: "<f4", tensor.F64: "<f8", tensor.C64: "<c8", tensor.C128: "<c16"}

// exportNPY plans a .npy file, version 1.0: one tensor.
func (e *Engine) exportNPY(ctx context.Context, q ExportQuery) (*Export, error) {
	all, _, err := e.tensors(ctx, q)
	if err != nil {
		return nil, err
	}
	if len(all) != 1 {
		return nil, badArgument("name one request and one site, or export as safetensors", "export as npy: %d tensors were asked for, the format holds one", len(all))
	}
	t := all[0]
	header, err := NPYHeader(t.DType, t.Shape)
	if err != nil {
		return nil, err
	}
	return &Export{"application/octet-stream", fileName(q, t.name, ".npy"), int64(len(header)) + t.Size(), rowsOf(all), func(ctx context.Context, w io.Writer) error {
		if _, err := w.Write(header); err != nil {
			return err
		}
		_, err := t.Open(ctx).WriteTo(w)
		return err
	}}, nil
}

// NPYHeader is what stands before the bytes of a tensor in a .npy file.
func NPYHeader(d tensor.DType, shape []int) ([]byte, error) {
	name, ok := numpyNames[d]
	if !ok {
		return nil, badArgument("export with --format safetensors, or with --as f32", "export as npy: NumPy has no dtype %s", d)
	}
	var dims strings.Builder
	for _, n := range shape {
		fmt.Fprintf(&dims, "%d, ", n)
	}
	text := fmt.Sprintf("{'descr': '%s', 'fortran_order': False, 'shape': (%s), }", name, strings.TrimSuffix(dims.String(), " "))
	header := append([]byte("\x93NUMPY\x01\x00\x00\x00"), text...)
	for (len(header)+1)%64 != 0 {
		header = append(header, ' ')
	}
	header = append(header, '\n')
	binary.LittleEndian.PutUint16(header[8:], uint16(len(header)-10))
	return header, nil
}

// fileName suggests a name made of what was asked for, safe on any file system.
func fileName(q ExportQuery, what, extension string) string {
	parts := []string{"dmi", q.Session, q.Run}
	if len(q.Requests) == 1 {
		parts = append(parts, q.Requests[0])
	}
	var named []string
	for _, p := range append(parts, what) {
		if p != "" {
			named = append(named, p)
		}
	}
	return strings.Map(func(c rune) rune {
		if c == '.' || c == '-' || c == '_' || c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' {
			return c
		}
		return '_'
	}, strings.Join(named, "-")) + extension
}
