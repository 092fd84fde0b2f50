// Package policy says what leaves the device, and at what fidelity: a YAML document (docs/format/policy.md), how it is read, what it
// means for a row, and the forms in which it is handed to producers.
//
//	document.go   what can be said
//	parse.go      YAML to Document; yaml.go: strictly, with line and column of everything that is wrong
//	window.go     positions of tokens
//	evaluate.go   what a document means for one row: slow, obvious, the oracle of everything else
//	compile.go    the same for the sites of a session at once
package policy
