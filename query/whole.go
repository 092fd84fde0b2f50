package query

import "dmi/tensor"

// wholeStore is the store's own sums. Rows whose fate is still being decided are not complete.
func (e *Engine) wholeStore() (*Coverage, error) {
	books := e.source.Books()
	c := &Coverage{Outcomes: map[string]map[string]uint64{}}
	whole := uint64(0)
	for _, line := range books.Lines {
		c.count(tensor.Entry{Outcome: line.Outcome, Reason: line.Reason, Level: line.Level}, line.Rows)
		if !owed(line.Outcome) || line.Outcome == tensor.Captured && line.Level == tensor.Full {
			whole += line.Rows
		}
	}
	for _, rows := range books.Expired {
		c.Expired += rows
	}
	c.Complete = c.Expired == 0 && whole == c.Rows && c.Rows == books.Produced
	return c, nil
}

// coverUnattributed adds the rows of a session whose request nobody knows. Where their sites are not known either, they stand with the first.
func (e *Engine) coverUnattributed(c *Coverage, q CoverageQuery) error {
	s, err := e.sessionByID(q.Session)
	if err != nil {
		return err
	}
	sites, err := e.sitesOf(s.Number, q.Site, q.Layer)
	if err != nil {
		return err
	}
	wanted := map[uint32]bool{}
	for _, site := range sites {
		wanted[site.ID] = true
	}
	entries, err := e.source.Entries(tensor.RequestKey{Session: s.Number, Request: tensor.NoRequest})
	if err != nil {
		return err
	}
	for _, entry := range entries {
		n := uint64(0)
		for _, id := range entry.Sites {
			if wanted[id] {
				n++
			}
		}
		if n > 0 {
			c.add(entry, n)
			c.Complete = c.Complete && !owed(entry.Outcome)
		}
	}
	return nil
}
