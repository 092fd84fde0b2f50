package ring

import (
	"fmt"
	"sync/atomic"
	"unicode/utf8"

	"dmi/tensor"
)

// Sites copies and checks the sites published since it was last called, and returns all of them. What it returned stays as it is.
func (r *Ring) Sites() ([]Site, error) {
	count := atomic.LoadUint64(r.control(ControlSitesCountOffset)) // pairs with the producer's release: the entries are there
	if count > uint64(r.header.SiteCapacity) || count < uint64(len(r.sites)) {
		return r.sites, fmt.Errorf("ring: control.sites_count is %d, after %d of at most %d", count, len(r.sites), r.header.SiteCapacity)
	}
	for i := len(r.sites); i < int(count); i++ {
		var b [SiteSize]byte
		copy(b[:], r.mem[r.header.SitesOffset+uint64(i)*SiteSize:])
		var s Site
		s.Decode(b[:])
		if err := s.check(uint32(i)); err != nil {
			return r.sites, err
		}
		if other, twice := r.names[s.Text()]; twice {
			return r.sites, fmt.Errorf("ring: site %d: site.name %q is that of site %d", i, s.Text(), other)
		}
		r.names[s.Text()] = s.ID
		r.sites = append(r.sites, s)
	}
	return r.sites[:len(r.sites):len(r.sites)], nil
}

func (s *Site) check(id uint32) error {
	bad := func(field string, value any, want string) error {
		return fmt.Errorf("ring: site %d: site.%s is %v: %s", id, field, value, want)
	}
	switch {
	case s.ID != id:
		return bad("id", s.ID, "sites are numbered by their place in the table")
	case s.NameBytes == 0 || s.NameBytes > SiteNameBytes:
		return bad("name_bytes", s.NameBytes, fmt.Sprintf("1 to %d are possible", SiteNameBytes))
	case !utf8.Valid(s.Name[:s.NameBytes]):
		return bad("name", fmt.Sprintf("%q", s.Name[:s.NameBytes]), "not UTF-8")
	case s.Space >= Spaces:
		return bad("space", s.Space, "no such row space")
	case s.NDim > MaxDims:
		return bad("ndim", s.NDim, fmt.Sprintf("at most %d", MaxDims))
	case s.RowAxis > 1:
		return bad("row_axis", s.RowAxis, "0 or 1")
	case s.Fill > 1:
		return bad("fill", s.Fill, "0 is zero and 1 minus infinity")
	case s.Flags&^(SiteOptional|SiteEvent) != 0:
		return bad("flags", s.Flags, "unknown flags")
	case s.Layer != NoLayer && s.Layer > 1<<20:
		return bad("layer", s.Layer, "no model has so many")
	}
	rows, keys := 0, 0
	for d := range int(s.NDim) {
		switch s.Role[d] {
		case RoleRow:
			rows++
		case RoleKey:
			keys++
		case RoleInner:
		default:
			return bad(fmt.Sprintf("role[%d]", d), s.Role[d], "ROW, INNER or KEY is needed")
		}
	}
	if s.NDim > 0 && (rows < 1 || rows > 2 || keys > 1) {
		return bad("role", s.Role[:s.NDim], "one or two ROW and at most one KEY are needed")
	}
	for _, c := range s.Name[:s.NameBytes] {
		if c < ' ' || c == 0x7f {
			return bad("name", fmt.Sprintf("%q", s.Text()), "has control characters")
		}
	}
	return nil
}

// Text is the site's canonical name.
func (s *Site) Text() string { return string(s.Name[:s.NameBytes]) }

// Keyed reports whether a dimension of the site counts keys.
func (s *Site) Keyed() bool {
	for d := range int(s.NDim) {
		if s.Role[d] == RoleKey {
			return true
		}
	}
	return false
}

// Optional reports whether the site owes only the rows that it gives.
func (s *Site) Optional() bool { return s.Flags&(SiteOptional|SiteEvent) != 0 }

// Tensor is the site in the engine's vocabulary.
func (s *Site) Tensor() tensor.Site {
	t := tensor.Site{ID: s.ID, Name: s.Text(), Layer: tensor.NoLayer, Space: tensor.Space(s.Space), RowAxis: int(s.RowAxis),
		Keyed: s.Keyed(), Fill: tensor.Fill(s.Fill), Optional: s.Optional()}
	if s.Layer != NoLayer {
		t.Layer = int(s.Layer)
	}
	return t
}
