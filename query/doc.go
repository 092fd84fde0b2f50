// Package query answers questions about what was captured: it resolves the names people use, plans which chunks hold the
// rows asked for, and streams them in the reader's shape with bounded memory. An answer that lacks rows is an error with the
// coverage that says why, unless the asker wants it partial; then it carries the positions of the rows that are there.
//
// The methods of Engine, all with a context:
//
//	Tensor(TensorQuery) (*Tensor, error)       one request x site; (*Tensor).Size, Open -> *Reader (io.ReadSeeker, io.WriterTo)
//	Rows(RowsQuery) (*Rows, error)             one site over many requests, a page at a time
//	Coverage(CoverageQuery) (*Coverage, error)
//	Stats(StatsQuery) (*Stats, error)          then Each, WriteJSON, WriteArrow or WriteParquet
//	TopKeys(TopKeysQuery) ([]HeadKeys, error)
//	Export(ExportQuery) (*Export, error)       then ContentType, Filename, Size, WriteTo
//	Runs(RunsQuery), Requests(RequestsQuery), Request(id), Sites(SitesQuery)
//
// and the parsers ParseRange ("4:9"), ParseHeads ("0,3"), ParsePer, ParseLevel.
package query
