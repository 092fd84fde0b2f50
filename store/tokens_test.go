package store

import (
	"testing"

	"dmi/tensor"

	"github.com/google/go-cmp/cmp"
)

func TestTokensOfTheCatalogue(t *testing.T) {
	for _, c := range []struct {
		request tensor.Request
		text    string
	}{
		{tensor.Request{}, ""},
		{tensor.Request{Tokens: []int64{}}, "[]"},
		{tensor.Request{Tokens: []int64{5, -1}}, "[5,-1]"},
		{tensor.Request{Tokens: []int64{5, 6}, Pieces: []string{"a\"\n", ""}}, `[[5,"a\"\n"],[6,""]]`},
	} {
		if text := tokensJSON(c.request); text != c.text {
			t.Errorf("%v: %s, want %s", c.request, text, c.text)
		}
		if c.text == "" {
			continue
		}
		ids, pieces, err := readTokens(c.text)
		if diff := cmp.Diff(c.request.Tokens, ids); err != nil || diff != "" || !cmp.Equal(c.request.Pieces, pieces) {
			t.Errorf("%s: %v %v %v", c.text, ids, pieces, err)
		}
	}
	for _, wrong := range []string{"[[1]]", `[[1,"a",2]]`, `[["a",1]]`, "[[", "{}"} {
		if ids, pieces, err := readTokens(wrong); err == nil {
			t.Errorf("%s is read as %v %v", wrong, ids, pieces)
		}
	}
}
