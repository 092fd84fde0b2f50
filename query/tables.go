package query

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"

	"dmi/tensor"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/array"
	"github.com/apache/arrow-go/v18/arrow/ipc"
	"github.com/apache/arrow-go/v18/arrow/memory"
	"github.com/apache/arrow-go/v18/parquet"
	"github.com/apache/arrow-go/v18/parquet/compress"
	"github.com/apache/arrow-go/v18/parquet/pqarrow"
)

const (
	batchRows    = 8192
	rowGroupRows = 128 << 10 // a row group is held in memory until it is whole
)

// statsSchema is what a table of statistics looks like; null is what a grouping does not have, NaN what only non-finite elements have.
var statsSchema = arrow.NewSchema([]arrow.Field{
	{Name: "request", Type: arrow.BinaryTypes.String, Nullable: true},
	{Name: "site", Type: arrow.BinaryTypes.String},
	{Name: "layer", Type: arrow.PrimitiveTypes.Int32, Nullable: true},
	{Name: "position", Type: arrow.PrimitiveTypes.Int64, Nullable: true},
	{Name: "rows", Type: arrow.PrimitiveTypes.Uint64},
	{Name: "mean", Type: arrow.PrimitiveTypes.Float64},
	{Name: "rms", Type: arrow.PrimitiveTypes.Float64},
	{Name: "min", Type: arrow.PrimitiveTypes.Float64},
	{Name: "max", Type: arrow.PrimitiveTypes.Float64},
	{Name: "absmax", Type: arrow.PrimitiveTypes.Float64},
	{Name: "l2", Type: arrow.PrimitiveTypes.Float64},
	{Name: "nonfinite", Type: arrow.PrimitiveTypes.Uint64},
	{Name: "count", Type: arrow.PrimitiveTypes.Uint64},
}, nil)

// WriteJSON writes {"items": [...], "next": null}, a line at a time.
func (s *Stats) WriteJSON(ctx context.Context, w io.Writer) error {
	out := bufio.NewWriter(w)
	separator := `{"items":[` + "\n"
	err := s.Each(ctx, func(row StatsRow) error {
		line, err := json.Marshal(row)
		if err != nil {
			return err
		}
		_, _ = out.WriteString(separator)
		separator = ",\n"
		_, err = out.Write(line)
		return err
	})
	if err != nil {
		return err
	}
	if separator[0] == '{' {
		_, _ = out.WriteString(separator)
	}
	_, _ = out.WriteString("\n],\"next\":null}\n")
	return out.Flush()
}

// WriteArrow writes an Arrow IPC stream.
func (s *Stats) WriteArrow(ctx context.Context, w io.Writer) error {
	stream := ipc.NewWriter(w, ipc.WithSchema(statsSchema))
	if err := s.batches(ctx, stream.Write); err != nil {
		return err
	}
	return stream.Close()
}

// WriteParquet writes a Parquet file, compressed with zstd.
func (s *Stats) WriteParquet(ctx context.Context, w io.Writer) error {
	file, err := pqarrow.NewFileWriter(statsSchema, struct{ io.Writer }{w}, // the writer closes what it can, and w is not ours
		parquet.NewWriterProperties(parquet.WithCompression(compress.Codecs.Zstd), parquet.WithMaxRowGroupLength(rowGroupRows)),
		pqarrow.DefaultWriterProps())
	if err != nil {
		return fmt.Errorf("query: write statistics as Parquet: %w", err)
	}
	if err := s.batches(ctx, file.WriteBuffered); err != nil {
		return err
	}
	return file.Close()
}

// batches hands the lines over as records; each is released after the call.
func (s *Stats) batches(ctx context.Context, write func(arrow.RecordBatch) error) error {
	builder := array.NewRecordBuilder(memory.NewGoAllocator(), statsSchema)
	defer builder.Release()
	rows := 0
	flush := func() error {
		record := builder.NewRecordBatch()
		defer record.Release()
		rows = 0
		return write(record)
	}
	err := s.Each(ctx, func(row StatsRow) error {
		appendStats(builder, row)
		if rows++; rows == batchRows {
			return flush()
		}
		return nil
	})
	if err != nil || rows == 0 {
		return err
	}
	return flush()
}

func appendStats(b *array.RecordBuilder, row StatsRow) {
	request := b.Field(0).(*array.StringBuilder)
	if row.Request == "" {
		request.AppendNull()
	} else {
		request.Append(row.Request)
	}
	b.Field(1).(*array.StringBuilder).Append(row.Site)
	layer := b.Field(2).(*array.Int32Builder)
	if row.Layer == tensor.NoLayer {
		layer.AppendNull()
	} else {
		layer.Append(int32(row.Layer))
	}
	position := b.Field(3).(*array.Int64Builder)
	if row.Position < 0 {
		position.AppendNull()
	} else {
		position.Append(row.Position)
	}
	b.Field(4).(*array.Uint64Builder).Append(row.Rows)
	for i, v := range []float64{row.Mean, row.RMS, row.Min, row.Max, row.AbsMax, row.L2} {
		b.Field(5 + i).(*array.Float64Builder).Append(v)
	}
	b.Field(11).(*array.Uint64Builder).Append(row.NonFinite)
	b.Field(12).(*array.Uint64Builder).Append(row.Count)
}
