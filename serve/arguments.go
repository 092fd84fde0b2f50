package serve

import (
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"dmi/query"
	"dmi/tensor"
)

// arguments reads a request's parameters; the first error stays.
type arguments struct {
	values url.Values
	err    *failure
}

const (
	maxQueryBytes = 64 << 10
	maxRepeats    = 4096 // of one parameter
)

// parseArguments refuses parameters that a route does not take, and repeated ones where one is meant.
func parseArguments(r *http.Request, takes []string) (*arguments, *failure) {
	if len(r.URL.RawQuery) > maxQueryBytes {
		return nil, badArgument("ask in several requests", "%s: parameters of %d bytes: at most %d", r.URL.Path, len(r.URL.RawQuery), maxQueryBytes)
	}
	values, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, badArgument("encode them as in a URL", "%s: parameters: %v", r.URL.Path, err)
	}
	for name, given := range values {
		at := slices.IndexFunc(takes, func(t string) bool { return strings.TrimSuffix(t, "*") == name })
		if at < 0 {
			hint := "it takes none"
			if len(takes) > 0 {
				hint = "it takes " + strings.ReplaceAll(strings.Join(takes, ", "), "*", "")
			}
			return nil, badArgument(hint, "%s: there is no parameter %q", r.URL.Path, name)
		}
		repeats := 1
		if strings.HasSuffix(takes[at], "*") {
			repeats = maxRepeats
		}
		if len(given) > repeats {
			return nil, badArgument("", "%s: parameter %s is given %d times: at most %d", r.URL.Path, name, len(given), repeats)
		}
	}
	return &arguments{values: values}, nil
}

func badArgument(hint, format string, args ...any) *failure {
	return &failure{http.StatusBadRequest, string(query.BadArgument), fmt.Sprintf(format, args...), hint, nil}
}

func (a *arguments) fail(f *failure) {
	if a.err == nil {
		a.err = f
	}
}

func (a *arguments) text(name string) string   { return a.values.Get(name) }
func (a *arguments) list(name string) []string { return a.values[name] }

// must is text that has to be there.
func (a *arguments) must(name, hint string) string {
	v := a.values.Get(name)
	if v == "" {
		a.fail(badArgument(hint, "parameter %s is missing", name))
	}
	return v
}

func (a *arguments) flag(name string) bool {
	switch v := a.values.Get(name); v {
	case "", "false":
		return false
	case "true":
		return true
	default:
		a.fail(badArgument("say true or false", "%s=%q is neither true nor false", name, v))
		return false
	}
}

func (a *arguments) number(name string, least, most int64) int64 {
	v := a.values.Get(name)
	if v == "" {
		return 0
	}
	n, err := strconv.ParseInt(v, 10, 64)
	if err != nil || n < least || n > most {
		a.fail(badArgument(fmt.Sprintf("say a number from %d to %d", least, most), "%s=%q is not one", name, v))
	}
	return n
}

func (a *arguments) optional(name string, least, most int64) *int {
	if a.values.Get(name) == "" {
		return nil
	}
	n := int(a.number(name, least, most))
	return &n
}

func (a *arguments) layer() *int { return a.optional("layer", -100_000, 100_000) }

func (a *arguments) positions(name string) query.Range {
	r, err := query.ParseRange(a.values.Get(name))
	if err != nil {
		a.fail(asFailure(err))
	}
	return r
}

func (a *arguments) heads() []int {
	heads, err := query.ParseHeads(a.values.Get("heads"))
	if err != nil {
		a.fail(asFailure(err))
	}
	return heads
}

func (a *arguments) level() query.Level {
	level, err := query.ParseLevel(a.values.Get("level"))
	if err != nil {
		a.fail(asFailure(err))
	}
	return level
}

func (a *arguments) dtype() tensor.DType {
	v := a.values.Get("as")
	if v == "" {
		return tensor.DTypeNone
	}
	d, err := tensor.ParseDType(strings.ToUpper(v))
	if err != nil {
		a.fail(badArgument("say F32, or leave it out for the bytes as captured", "as=%q: no such dtype", v))
	}
	return d
}

func (a *arguments) labels() map[string]string {
	labels := map[string]string{}
	for _, pair := range a.values["label"] {
		k, v, two := strings.Cut(pair, "=")
		if !two || k == "" {
			a.fail(badArgument("write label=KEY=VALUE", "label %q has no key and value", pair))
		}
		labels[k] = v
	}
	return labels
}

// requestsAsked reads which requests are asked about; where empty, whole says whether that may be.
func (a *arguments) requestsAsked(whole bool) query.Scope {
	s := query.Scope{Requests: a.list("request"), Run: a.text("run"), Session: a.text("session")}
	if len(s.Requests) == 0 && s.Run == "" && s.Session == "" && !whole {
		a.fail(badArgument("name request=, run= or session=", "nothing says which requests are asked about"))
	}
	return s
}
