package nearest

import (
	"slices"
	"testing"
)

func TestDistance(t *testing.T) {
	for _, test := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"abc", "", 3}, {"kitten", "sitting", 3}, {"flaw", "lawn", 2}, {"q", "q", 0}} {
		if got := Distance(test.a, test.b); got != test.want || Distance(test.b, test.a) != test.want {
			t.Errorf("%q to %q: %d, want %d", test.a, test.b, got, test.want)
		}
	}
}

func TestNames(t *testing.T) {
	if got := Names([]string{"layers", "hooks", "tokens"}, "hook", 2); !slices.Equal(got, []string{"hooks", "tokens"}) {
		t.Errorf("nearest to hook: %v", got)
	}
}
