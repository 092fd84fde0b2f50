package policy_test

import (
	"strings"
	"testing"

	"dmi/policy"
	"dmi/tensor"
)

func TestChoice(t *testing.T) {
	for _, c := range []struct {
		labels  map[string]string
		wrong   string
		wants   []string // site@position, of a request with a prompt of 4
		refuses []string
	}{
		{labels: map[string]string{"topic": "x"}, wants: []string{"logits@0"}},
		{labels: map[string]string{policy.CaptureLabel: "off"}, refuses: []string{"logits@0"}},
		{labels: map[string]string{policy.CaptureLabel: "off", policy.SitesLabel: "logits"}, refuses: []string{"logits@0"}},
		{labels: map[string]string{policy.SitesLabel: "resid_post,logits"}, wants: []string{"logits@0", "blocks.1.hook_resid_post@9"}, refuses: []string{"blocks.1.hook_resid_pre@0"}},
		{labels: map[string]string{policy.PositionsLabel: "prompt[-1] generated[:2]"}, wants: []string{"logits@3", "logits@5"}, refuses: []string{"logits@2", "logits@6"}},
		{labels: map[string]string{policy.SitesLabel: "logits", policy.PositionsLabel: "all[::4]"}, wants: []string{"logits@8"}, refuses: []string{"logits@7", "tokens@8"}},
		{labels: map[string]string{policy.CaptureLabel: "on"}, wrong: "off is possible", refuses: []string{"logits@0"}},
		{labels: map[string]string{policy.PositionsLabel: "prompt[x]"}, wrong: "dmi.positions", refuses: []string{"logits@0"}},
		{labels: map[string]string{policy.SitesLabel: strings.Repeat("a ", 300)}, wrong: "at most", refuses: []string{"a@0"}},
	} {
		choice, err := policy.ChoiceOf(c.labels)
		if (err == nil) != (c.wrong == "") || err != nil && !strings.Contains(err.Error(), c.wrong) {
			t.Errorf("%v: %v, not %q", c.labels, err, c.wrong)
		}
		for i, rows := range [][]string{c.wants, c.refuses} {
			for _, row := range rows {
				name, position, _ := strings.Cut(row, "@")
				r, token := policy.Request{Prompt: 4, Choice: choice}, policy.Token{Position: uint32(position[0] - '0'), Phase: policy.Decode}
				site := tensor.Site{Name: name, Layer: tensor.NoLayer}
				if got := choice.Site(site) && choice.Token(r, token); got != (i == 0) {
					t.Errorf("%v: %s is wanted: %v", c.labels, row, got)
				}
				document, err := policy.Parse(nil)
				if err != nil {
					t.Fatal(err)
				}
				if got := document.Evaluate(site, r, token, policy.State{}).Kept; got != (i == 0) {
					t.Errorf("%v: %s is kept: %v", c.labels, row, got)
				}
			}
		}
	}
}
