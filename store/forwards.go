package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path"
	"slices"

	"dmi/tensor"
)

// Forward is what one forward pass computed of a request: positions [First, First+Count).
type Forward struct {
	Step    uint64
	First   uint32
	Count   uint32
	Attempt uint16
}

// Forwards lists the forwards of a request in their order. Only the step manifest tells them apart, so it is read whole: the cost grows with
// the store, at some hundreds of megabytes a second, and not with the request.
func (s *Store) Forwards(ctx context.Context, key tensor.RequestKey) ([]Forward, error) {
	doing := fmt.Sprintf("list the forwards of request %d", key.Request)
	dir := path.Join(s.dir, "manifest")
	files, err := manifestFiles(s.fs, dir)
	if err != nil {
		return nil, explain(doing, err)
	}
	var forwards []Forward
	for i, number := range files {
		_, err := readManifest(s.fs, dir, s.id, number, 0, func(_ position, kind frameKind, payload []byte) error {
			if err := ctx.Err(); err != nil {
				return err
			}
			if kind != frameStep {
				return nil
			}
			step, err := decodeStep(payload)
			if err != nil || step.Session != key.Session {
				return err
			}
			opened, err := openings(&step)
			for _, o := range opened {
				for _, span := range o.spans {
					if span.request == key.Request {
						forwards = append(forwards, Forward{o.step, span.first, span.count, span.attempt})
					}
				}
			}
			return err
		})
		if errors.Is(err, errTorn) && i == len(files)-1 { // a frame that is being written
			err = nil
		}
		if err != nil {
			return nil, explain(doing, err)
		}
	}
	slices.SortStableFunc(forwards, func(a, b Forward) int { return cmp.Or(cmp.Compare(a.Step, b.Step), cmp.Compare(a.First, b.First)) })
	return forwards, nil
}
