package store

import (
	"encoding/json"
	"fmt"

	"dmi/tensor"
)

// tokensJSON is how the catalogue has the tokens of a request: a list of ids, or of [id, text] where what each is written as was kept; "" of none.
func tokensJSON(r tensor.Request) string {
	switch {
	case r.Tokens == nil:
		return ""
	case len(r.Pieces) == 0 || len(r.Pieces) != len(r.Tokens):
		return toJSON(r.Tokens)
	}
	pairs := make([]tokenPiece, len(r.Tokens))
	for i, id := range r.Tokens {
		pairs[i] = tokenPiece{id, r.Pieces[i]}
	}
	return toJSON(pairs)
}

// readTokens is the inverse of tokensJSON.
func readTokens(text string) (ids []int64, pieces []string, err error) {
	if len(text) < 2 || text[:2] != "[[" {
		err = json.Unmarshal([]byte(text), &ids)
		return ids, nil, err
	}
	var pairs []tokenPiece
	if err := json.Unmarshal([]byte(text), &pairs); err != nil {
		return nil, nil, err
	}
	for _, p := range pairs {
		ids, pieces = append(ids, p.id), append(pieces, p.piece)
	}
	return ids, pieces, nil
}

type tokenPiece struct {
	id    int64
	piece string
}

func (p tokenPiece) MarshalJSON() ([]byte, error) { return json.Marshal([]any{p.id, p.piece}) }

func (p *tokenPiece) UnmarshalJSON(text []byte) error {
	pair := []any{&p.id, &p.piece}
	if err := json.Unmarshal(text, &pair); err != nil {
		return err
	}
	if len(pair) != 2 {
		return fmt.Errorf("a token of %d parts: id and text are needed", len(pair))
	}
	return nil
}
