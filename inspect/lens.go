package inspect

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"slices"

	"dmi/query"
)

// LensQuery asks what a model would predict if it stopped after a layer.
type LensQuery struct {
	query.Scope
	Site   string // glob; "": hook_resid_post of every layer
	Layer  *int
	Tokens query.Range
	K      int    // candidates; 0: 5
	Models string // the store's folder of models
}

// LensRow is one cell: the tokens that a row predicts, and how the token that really followed fares. That is null where ids were not kept, where
// this reader may not see them, or after the last.
type LensRow struct {
	Request  string      `json:"request"`
	Site     string      `json:"site"`
	Layer    *int        `json:"layer"`
	Position int         `json:"position"`
	Top      []Candidate `json:"top"` // most likely first; of equal ones the lower id first. Empty where the row is not finite
	Entropy  Number      `json:"entropy"`
	Next     *int64      `json:"next"`
	NextText *string     `json:"next_text"` // null where the vocabulary is not known
	NextRank *int        `json:"next_rank"` // 1: the most likely
	NextProb Number      `json:"next_probability"`
}

// Candidate is a token that might follow.
type Candidate struct {
	Token       int     `json:"token"`
	Logit       Number  `json:"logit"`
	Probability Number  `json:"probability"`
	Text        *string `json:"text"` // null where the vocabulary is not known
}

const (
	// maxCells bounds how many rows one question is about: each costs a product with the whole unembedding. In bulk, Python does them with torch.
	maxCells     = 4096
	unembedBlock = 2 << 20 // bytes of the unembedding that a core works on at a time
	defaultTop   = 5
	maxLensTop   = 100
)

// cell is a row on its way through the unembedding.
type cell struct {
	row    LensRow
	x      []float64 // after the norm
	finite bool
	next   float64 // the real next token's logit
	tally
}

// tally is what is known of a cell's logits so far: the greatest, the sum of exp(logit-most) and of that times (logit-most), and how many exceed next's.
type tally struct {
	top          []Candidate
	most         float64
	sum, product float64
	above        int
}

func (t *tally) add(token int, logit, next float64, k int) {
	if logit > t.most {
		if t.sum > 0 {
			t.rescale(logit)
		}
		t.most = logit
	}
	e := math.Exp(logit - t.most)
	t.sum += e
	t.product += e * (logit - t.most)
	if logit > next {
		t.above++
	}
	t.offer(Candidate{Token: token, Logit: Number(logit)}, k)
}

// rescale makes the sums relative to a greater logit.
func (t *tally) rescale(most float64) {
	shift := t.most - most
	e := math.Exp(shift)
	t.product = e * (t.product + shift*t.sum)
	t.sum *= e
	t.most = most
}

func (t *tally) offer(c Candidate, k int) {
	if len(t.top) == k && c.Logit <= t.top[k-1].Logit {
		return
	}
	at, _ := slices.BinarySearchFunc(t.top, c, func(a, b Candidate) int { return cmp.Or(cmp.Compare(b.Logit, a.Logit), cmp.Compare(a.Token, b.Token)) })
	t.top = slices.Insert(t.top, at, c)
	t.top = t.top[:min(k, len(t.top))]
}

func (t *tally) merge(o *tally, k int) {
	if o.most > t.most && t.sum > 0 {
		t.rescale(o.most)
	} else if t.most > o.most && o.sum > 0 {
		o.rescale(t.most)
	}
	t.most = max(t.most, o.most)
	t.sum += o.sum
	t.product += o.product
	t.above += o.above
	for _, c := range o.top {
		t.offer(c, k)
	}
}

// Lens yields cells by request, site and position.
func Lens(ctx context.Context, e *query.Engine, q LensQuery, yield func(LensRow) error) error {
	k := cmp.Or(q.K, defaultTop)
	if k < 1 || k > maxLensTop {
		return badArgument("", "the %d likeliest tokens: ask for 1 to %d", k, maxLensTop)
	}
	survey, err := e.Survey(ctx, q.Scope, cmp.Or(q.Site, residuals), q.Layer, q.Tokens)
	if err != nil {
		return err
	}
	left := maxCells
	progress := progressOf(ctx)
	progress.begin("unembedding")
	for i, r := range survey.Requests {
		info, err := e.Request(ctx, r.ID)
		if err != nil {
			return err
		}
		w, err := openWeights(q.Models, info.Session)
		if err != nil {
			return err
		}
		err = lensOf(ctx, e, survey, i, w, k, &left, yield)
		w.close()
		if err != nil {
			return err
		}
	}
	return nil
}

func lensOf(ctx context.Context, e *query.Engine, survey *query.Survey, request int, w *weights, k int, left *int, yield func(LensRow) error) error {
	ids, err := tokensOf(ctx, e, survey.Requests[request])
	if err != nil {
		return err
	}
	var cells []*cell
	for i, site := range survey.Sites {
		selection, err := survey.Select(ctx, i, request)
		if err != nil {
			return err
		}
		if selection == nil {
			continue
		}
		err = selection.EachRow(ctx, blockBytes, func(v query.Values) error {
			if *left--; *left < 0 {
				return &query.Error{Code: query.OverLimit, Message: fmt.Sprintf("logit lens: more than %d rows, each of which costs a product with the whole unembedding", maxCells),
					Hint: "name fewer layers or tokens, or do it in bulk from Python: inspect.unembedding()"}
			}
			if len(v.Data) != w.width() || len(v.Shape) != 1 {
				return badArgument("name a site of the residual stream, such as "+residuals, "logit lens of site %s: its rows of %v are not what the final norm takes, [%d]",
					site.Name, v.Shape, w.width())
			}
			c := &cell{row: LensRow{Request: survey.Requests[request].ID, Site: site.Name, Layer: layerOf(site), Position: int(v.Position), Top: []Candidate{},
				Entropy: Number(nan), NextProb: Number(nan)}, x: w.normed(v.Data), next: math.Inf(1)}
			c.most = math.Inf(-1)
			square := dot(c.x, c.x)
			c.finite = square-square == 0
			if at := int(v.Position) + 1; at < len(ids) && ids[at] >= 0 && ids[at] < int64(w.vocabulary()) {
				c.row.Next = &ids[at]
				row, err := w.read(w.unembed, int(ids[at])*w.width(), w.width())
				if err != nil {
					return err
				}
				c.next = w.logit(int(ids[at]), dot(row, c.x))
			}
			cells = append(cells, c)
			return nil
		})
		if err != nil {
			return err
		}
	}
	if err := unembed(ctx, w, cells, k, 1/float64(len(survey.Requests))); err != nil {
		return err
	}
	texts, err := w.texts()
	if err != nil {
		return err
	}
	for _, c := range cells {
		line := c.line()
		if texts != nil {
			for i, candidate := range line.Top {
				line.Top[i].Text = &texts[candidate.Token]
			}
			if line.Next != nil {
				line.NextText = &texts[*line.Next]
			}
		}
		if err := yield(line); err != nil {
			return err
		}
	}
	return nil
}

// unembed passes over the unembedding once for all cells, which is a share of the tool's work.
func unembed(ctx context.Context, w *weights, cells []*cell, k int, share float64) error {
	d, vocabulary := w.width(), w.vocabulary()
	rows := max(1, unembedBlock/(d*w.unembed.dtype.Size()))
	progress := progressOf(ctx)
	if len(cells) == 0 {
		progress.add(share, 0)
		return nil
	}
	blocks := (vocabulary + rows - 1) / rows
	return inOrder(ctx, blocks, func(ctx context.Context, block int) ([]tally, error) {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		from := block * rows
		n := min(rows, vocabulary-from)
		values, err := w.read(w.unembed, from*d, n*d)
		if err != nil {
			return nil, err
		}
		tallies := make([]tally, len(cells))
		for i, c := range cells {
			tallies[i].most = math.Inf(-1)
			if !c.finite {
				continue
			}
			for j := range n {
				tallies[i].add(from+j, w.logit(from+j, dot(values[j*d:(j+1)*d], c.x)), c.next, k)
			}
		}
		return tallies, nil
	}, func(_ int, tallies []tally) error {
		for i, c := range cells {
			c.merge(&tallies[i], k)
		}
		progress.add(share/float64(blocks), rows*d*w.unembed.dtype.Size())
		return nil
	})
}

func (c *cell) line() LensRow {
	if !c.finite {
		return c.row
	}
	log := math.Log(c.sum) // of the sum of exp(logit-most)
	for _, one := range c.top {
		one.Probability = Number(math.Exp(float64(one.Logit) - c.most - log))
		c.row.Top = append(c.row.Top, one)
	}
	c.row.Entropy = Number(log - c.product/c.sum)
	if c.row.Next != nil {
		rank := c.above + 1
		c.row.NextRank, c.row.NextProb = &rank, Number(math.Exp(c.next-c.most-log))
	}
	return c.row
}
