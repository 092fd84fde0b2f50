package tensor

// Element returns the bytes, little-endian, of one element that stands for a key a row did not have: zero, or minus infinity. A dtype without
// infinities gives its lowest value.
func (f Fill) Element(d DType) []byte {
	e := make([]byte, d.Size())
	if f != FillNegInf {
		return e
	}
	switch d {
	case F16:
		copy(e, []byte{0x00, 0xfc})
	case BF16:
		copy(e, []byte{0x80, 0xff})
	case F32, C64: // a complex one: minus infinity + 0i
		copy(e, []byte{0x00, 0x00, 0x80, 0xff})
	case F64, C128:
		copy(e, []byte{0, 0, 0, 0, 0, 0, 0xf0, 0xff})
	case F8E5M2:
		e[0] = 0xfc
	case F8E4M3:
		e[0] = 0xfe // -448
	case F8E4M3FNUZ, F8E5M2FNUZ:
		e[0] = 0xff // -240, -57344
	case I8, I16, I32, I64:
		e[len(e)-1] = 0x80
	}
	return e
}

// Over writes the fill over every element of dst, whose length is a multiple of the dtype's size.
func (f Fill) Over(dst []byte, d DType) {
	if f == FillZero {
		clear(dst)
		return
	}
	n := copy(dst, f.Element(d))
	for n < len(dst) && n > 0 {
		n += copy(dst[n:], dst[:n])
	}
}
