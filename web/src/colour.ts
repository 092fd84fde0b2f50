// Colours of values. Maps are perceptually even: viridis for amounts, a blue to red one for signed values; both read in grey and with colour blindness.

const viridis = [0x440154, 0x482878, 0x3e4a89, 0x31688e, 0x26828e, 0x1f9e89, 0x35b779, 0x6ece58, 0xb5de2b, 0xfde725];
const signed = [0x053061, 0x2166ac, 0x4393c3, 0x92c5de, 0xe8edf0, 0xf4a582, 0xd6604d, 0xb2182b, 0x67001f];

export type MapName = 'amount' | 'signed';

/** 256 RGBA colours. */
export function table(name: MapName): Uint8Array {
  const stops = name === 'amount' ? viridis : signed;
  const colours = new Uint8Array(1024);
  for (let i = 0; i < 256; i++) {
    const at = (i / 255) * (stops.length - 1);
    const from = Math.min(Math.floor(at), stops.length - 2);
    for (let channel = 0; channel < 3; channel++) {
      const shift = 16 - 8 * channel;
      const a = ((stops[from] ?? 0) >> shift) & 255;
      const b = ((stops[from + 1] ?? 0) >> shift) & 255;
      colours[4 * i + channel] = Math.round(a + (b - a) * (at - from));
    }
    colours[4 * i + 3] = 255;
  }
  return colours;
}

export type Colour = [number, number, number]; // from 0 to 1

/** A colour of the theme, as a custom property of the style sheet has it. */
export function themed(element: Element, property: string): Colour {
  const hex = getComputedStyle(element).getPropertyValue(property).trim().slice(1);
  const n = parseInt(hex.length === 3 ? hex.replace(/./g, '$&$&') : hex, 16);
  return [((n >> 16) & 255) / 255, ((n >> 8) & 255) / 255, (n & 255) / 255];
}

export interface Scale {
  low: number;
  high: number;
  log: boolean;
  map: MapName;
}

/** Where a value lies on a scale, from 0 to 1. */
export function place(scale: Scale, value: number): number {
  const f = scale.log ? (v: number) => Math.log(Math.max(v, 1e-30)) : (v: number) => v;
  const low = f(scale.low);
  const at = (f(value) - low) / Math.max(f(scale.high) - low, 1e-30);
  return Math.min(1, Math.max(0, at));
}

/** Whether amounts differ so much that only their logarithms can be told apart. */
export const spans = (map: MapName, low: number, high: number): boolean => map === 'amount' && low > 0 && high / low > 30;

/** The 1st and the 99th percentile of what is finite. */
export function middle(values: Float32Array): [number, number] | null {
  const step = Math.max(1, Math.floor(values.length / 20000));
  const sample: number[] = [];
  for (let i = 0; i < values.length; i += step) {
    const v = values[i] ?? NaN;
    if (Number.isFinite(v)) sample.push(v);
  }
  sample.sort((a, b) => a - b);
  return sample.length === 0 ? null : [sample[Math.ceil(0.01 * (sample.length - 1))] ?? 0, sample[Math.floor(0.99 * (sample.length - 1))] ?? 0];
}

/** A scale that leaves few values outside: between the 1st and 99th percentile, symmetric where values have signs. */
export function fit(values: Float32Array): Scale {
  const ends = middle(values);
  if (!ends) return { low: 0, high: 1, log: false, map: 'amount' };
  const [low, high] = ends;
  if (low < 0 && high > 0) {
    const bound = Math.max(-low, high);
    return { low: -bound, high: bound, log: false, map: 'signed' };
  }
  if (low === high) return { low: Math.min(0, low), high: Math.max(high, 1e-6, low + 1e-6), log: false, map: 'amount' };
  return { low, high, log: spans('amount', low, high), map: 'amount' };
}

export function shown(value: number): string {
  if (!Number.isFinite(value)) return String(value);
  const size = Math.abs(value);
  if (value === 0) return '0';
  if (size >= 1e5 || size < 1e-3) return value.toExponential(3);
  return String(Number(value.toPrecision(4)));
}
