package tensor

import "fmt"

// DType is an element type. Values equal enum dmi_dtype of abi/ring.h.
type DType uint8

const (
	DTypeNone DType = iota
	Bool
	U8
	I8
	U16
	I16
	U32
	I32
	U64
	I64
	F16
	BF16
	F32
	F64
	F8E4M3
	F8E5M2
	F8E4M3FNUZ
	F8E5M2FNUZ
	F8E8M0
	C64
	C128
)

var dtypes = [...]struct {
	name string // safetensors' name where it has one, else ours
	size int    // bytes an element
}{
	{"NONE", 0}, {"BOOL", 1}, {"U8", 1}, {"I8", 1}, {"U16", 2}, {"I16", 2}, {"U32", 4}, {"I32", 4}, {"U64", 8}, {"I64", 8},
	{"F16", 2}, {"BF16", 2}, {"F32", 4}, {"F64", 8}, {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"F8_E4M3FNUZ", 1}, {"F8_E5M2FNUZ", 1},
	{"F8_E8M0", 1}, {"C64", 8}, {"C128", 16},
}

// Valid reports whether d names an element type.
func (d DType) Valid() bool { return d > DTypeNone && int(d) < len(dtypes) }

// Size returns the bytes of one element, 0 for an invalid dtype.
func (d DType) Size() int {
	if int(d) >= len(dtypes) {
		return 0
	}
	return dtypes[d].size
}

func (d DType) String() string {
	if int(d) >= len(dtypes) {
		return fmt.Sprintf("DType(%d)", uint8(d))
	}
	return dtypes[d].name
}

// ParseDType is the inverse of String.
func ParseDType(name string) (DType, error) {
	for i, d := range dtypes {
		if i > 0 && d.name == name {
			return DType(i), nil
		}
	}
	return DTypeNone, fmt.Errorf("tensor: parse dtype %q: not one that DMI knows (F32, BF16, F8_E4M3, I64, ...)", name)
}
