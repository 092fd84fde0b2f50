// Elements of tensors as numbers: safetensors' dtype names, little-endian bytes.

const half = (bits: number): number => {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 0x3ff;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
};

const bytesOf: Record<string, number> = { BOOL: 1, U8: 1, I8: 1, U16: 2, I16: 2, F16: 2, BF16: 2, U32: 4, I32: 4, F32: 4, U64: 8, I64: 8, F64: 8 };

/** Whether floats() knows a dtype; of others the engine is asked for F32. */
export const known = (dtype: string): boolean => dtype in bytesOf;

export function floats(dtype: string, buffer: ArrayBuffer): Float32Array {
  const size = bytesOf[dtype];
  if (size === undefined) throw new Error(`elements of ${dtype} are not known to this page`);
  const count = buffer.byteLength / size;
  switch (dtype) {
    case 'F32':
      return new Float32Array(buffer);
    case 'BF16': {
      // The upper half of a float32.
      const wide = new Uint32Array(count);
      const narrow = new Uint16Array(buffer);
      for (let i = 0; i < count; i++) wide[i] = (narrow[i] ?? 0) << 16;
      return new Float32Array(wide.buffer);
    }
    case 'F16':
      return Float32Array.from(new Uint16Array(buffer), half);
    case 'F64':
      return Float32Array.from(new Float64Array(buffer));
    case 'I64':
      return Float32Array.from(new BigInt64Array(buffer), Number);
    case 'U64':
      return Float32Array.from(new BigUint64Array(buffer), Number);
    case 'I32':
      return Float32Array.from(new Int32Array(buffer));
    case 'U32':
      return Float32Array.from(new Uint32Array(buffer));
    case 'I16':
      return Float32Array.from(new Int16Array(buffer));
    case 'U16':
      return Float32Array.from(new Uint16Array(buffer));
    case 'I8':
      return Float32Array.from(new Int8Array(buffer));
    default:
      return Float32Array.from(new Uint8Array(buffer));
  }
}
