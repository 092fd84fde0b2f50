package policy

import (
	"encoding/json"
	"hash/fnv"
	"slices"

	"dmi/tensor"
)

// group gives the rules that name requests by ids or tags their groups. Beyond MaxGroups they get none: producers cannot tell their rows apart.
func (d *Document) group() {
	sets := &d.Groups.Sets
	for i := range d.Rules {
		s := &d.Rules[i].Select
		if len(s.IDs)+len(s.Tags) == 0 {
			continue
		}
		at := slices.IndexFunc(*sets, func(g tensor.Group) bool { return slices.Equal(g.IDs, s.IDs) && slices.Equal(g.Tags, s.Tags) })
		if at < 0 && len(*sets) < tensor.MaxGroups {
			at = len(*sets)
			*sets = append(*sets, tensor.Group{IDs: append([]string{}, s.IDs...), Tags: append([]string{}, s.Tags...)})
		}
		s.group = uint8(at + 1)
	}
	if *sets == nil {
		return
	}
	text, _ := json.Marshal(*sets) // strings: cannot fail
	hash := fnv.New64a()
	hash.Write(text)
	d.Groups.Name = max(1, hash.Sum64())
	for i := range d.Rules {
		if s := &d.Rules[i].Select; s.group != 0 {
			s.groups = d.Groups.Name
		}
	}
}
