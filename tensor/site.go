package tensor

// NoLayer is Site.Layer of a site outside any block.
const NoLayer = -1

// Space says what the rows of a site are counted in. Values equal enum dmi_space of abi/ring.h.
type Space uint8

const (
	Tokens Space = iota // every token that went in
	Logits              // those whose logits the model computed
	Cache               // every token, found by its slot in the key-value cache
	Spaces = 3
)

// Fill is the value of the keys that a row did not have when it was computed (they were still to come).
type Fill uint8

const (
	FillZero Fill = iota
	FillNegInf
)

// Site is a named place in a model, of one session.
type Site struct {
	ID      uint32   `json:"id"`
	Name    string   `json:"name"` // canonical, as in docs/sites.md
	Aliases []string `json:"aliases,omitempty"`
	Layer   int      `json:"layer"` // NoLayer where it has none
	Space   Space    `json:"space"`
	RowAxis int      `json:"row_axis"` // where the row axis stands in what a reader is given
	Keyed   bool     `json:"keyed"`    // the last axis counts keys, which grow with the request
	Fill    Fill     `json:"fill"`
	// Optional: it may stay silent in a step, or fire several times (DMI_SITE_OPTIONAL, DMI_SITE_EVENT); it owes only the rows that it gives.
	Optional bool `json:"optional,omitempty"`
}
