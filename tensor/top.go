package tensor

import (
	"encoding/binary"
	"math"
	"slices"
)

// Element is one of a row's greatest, and which of its elements it is: of keyed rows, of those of the keys that the row had, one head after the other.
type Element struct {
	Index uint32  `json:"index"`
	Value float64 `json:"value"`
}

const noElement = math.MaxUint32 // fills up where fewer are finite

// TopOf reads the greatest elements of a stored row at level Stats back, the greatest first. Their values are rounded to float32.
func TopOf(row []byte) []Element {
	little, top := binary.LittleEndian, (len(row)/4-Figures)/2
	list := make([]Element, 0, top)
	for i := range top {
		at := 4 * (Figures + i)
		if index := little.Uint32(row[at+4*top:]); index != noElement {
			list = append(list, Element{index, float64(math.Float32frombits(little.Uint32(row[at:])))})
		}
	}
	return list
}

// Greatest gives the greatest of the first elements of each line, the greatest first and of equal ones that of the lower index; those that are not finite are passed over.
func Greatest(values []float64, line, own, top int) []Element {
	if top == 0 || own == 0 {
		return nil
	}
	list := make([]Element, 0, top)
	index := uint32(0)
	for at := 0; at < len(values); at += line {
		for _, v := range values[at : at+own] {
			if v-v == 0 && (len(list) < top || v > list[top-1].Value) {
				if len(list) == top {
					list = list[:top-1]
				}
				place, _ := slices.BinarySearchFunc(list, v, func(e Element, v float64) int {
					if e.Value >= v {
						return -1
					}
					return 1
				})
				list = slices.Insert(list, place, Element{index, v})
			}
			index++
		}
	}
	return list
}

// putTop writes elements as a stored row has them.
func putTop(to []byte, list []Element, top int) {
	little := binary.LittleEndian
	for i := range top {
		value, index := float32(math.NaN()), uint32(noElement)
		if i < len(list) {
			value, index = float32(list[i].Value), list[i].Index
		}
		little.PutUint32(to[4*i:], math.Float32bits(value))
		little.PutUint32(to[4*(top+i):], index)
	}
}

// narrow keeps so many of the greatest elements of rows at level Stats.
func (c *Chunk) narrow(top int) {
	had := TopIn(c.Shape)
	if had <= top || c.Rows == 0 {
		return
	}
	size, bytes := 4*(Figures+2*had), 4*(Figures+2*top)
	out := make([]byte, 0, int(c.Rows)*bytes)
	for i := range int(c.Rows) {
		row := c.Data[i*size : (i+1)*size]
		indices := 4 * (Figures + had)
		out = append(out, row[:4*(Figures+top)]...)
		out = append(out, row[indices:indices+4*top]...)
	}
	c.Shape, c.Data = StatsShape(top), out
}
