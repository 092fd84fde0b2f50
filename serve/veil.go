package serve

import (
	"slices"

	"dmi/query"
	"dmi/store"
	"dmi/tensor"
)

// tokensSite holds the ids of prompts, as values of a tensor.
const tokensSite = "tokens"

func holdsPrompt(s tensor.Site) bool { return s.Name == tokensSite }

// veil is a source without prompts: what queries never see, no answer can hold.
type veil struct{ query.Source }

func (v veil) Sites(session uint32) ([]tensor.Site, error) {
	sites, err := v.Source.Sites(session)
	if slices.ContainsFunc(sites, holdsPrompt) {
		sites = slices.DeleteFunc(slices.Clone(sites), holdsPrompt)
	}
	return sites, err
}

func (v veil) Requests(f store.RequestFilter) ([]tensor.Request, error) {
	list, err := v.Source.Requests(f)
	list = slices.Clone(list)
	for i := range list {
		list[i].Tokens, list[i].Text, list[i].Pieces = nil, "", nil
	}
	return list, err
}

func (v veil) RequestByID(id string) (tensor.Request, bool, error) {
	r, found, err := v.Source.RequestByID(id)
	r.Tokens, r.Text, r.Pieces = nil, "", nil
	return r, found, err
}
