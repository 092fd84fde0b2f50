// Package nearest finds the names that somebody who mistyped may have meant.
package nearest

import "slices"

// maxBytes of what was typed are looked at.
const maxBytes = 512

// Names gives the n names nearest to what was typed, nearest first.
func Names(names []string, typed string, n int) []string {
	sorted := slices.Clone(names)
	typed = typed[:min(len(typed), maxBytes)]
	slices.SortStableFunc(sorted, func(a, b string) int { return Distance(a, typed) - Distance(b, typed) })
	return sorted[:min(n, len(sorted))]
}

// Distance is Levenshtein's, over bytes.
func Distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := diagonal
			if a[i] != b[j] {
				change++
			}
			diagonal, row[j+1] = row[j+1], min(row[j+1]+1, row[j]+1, change)
		}
	}
	return row[len(b)]
}
