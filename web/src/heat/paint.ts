// Paints a grid of values into pixels. What it costs is bounded by the canvas and by the cells in view, a few milliseconds: see decision 0005.
import { place, table, type Colour, type Scale } from '../colour';

/** Why a cell has no value. Each kind has its own hatching; only where there cannot be one, as for keys after their query, is the paper left blank. */
export const kinds = ['value', 'nonfinite', 'dropped', 'lost', 'skipped', 'not_computed', 'rejected', 'unbooked', 'nothing'] as const;
export type Kind = (typeof kinds)[number];
const NOTHING = kinds.indexOf('nothing');

export interface Grid {
  width: number;
  height: number;
  values: Float32Array; // [row, column]
  kinds: Uint8Array; // index into `kinds`
}

/** The columns of the grid that are in view; all rows are. */
export interface View {
  x0: number;
  x1: number;
}

export interface Pixels {
  width: number;
  height: number;
  data: Uint32Array; // [row, column], as ImageData has them: little-endian, alpha first
}

/** Whether a pixel is ink, of each kind: crosses where a value is not finite, slants where rows were dropped or lost, lines and dots for the rest, upright crosses for what is on no books. */
const hatching: ((x: number, y: number) => boolean)[] = [
  () => false,
  (x, y) => (x + y) % 6 < 2 || (x - y + 6000) % 6 < 2,
  (x, y) => (x + y) % 6 < 2,
  (x, y) => (x - y + 6000) % 6 < 3,
  (_, y) => y % 6 < 1,
  (x, y) => x % 6 < 2 && y % 6 < 2,
  (x) => x % 6 < 1,
  (x, y) => (x % 6 < 3 && y % 6 === 1) || (x % 6 === 1 && y % 6 < 3),
  () => false,
];

/** A patch of a kind's hatching, for a legend. */
export function patch(into: Pixels, kind: Kind, paper: Colour, ink: Colour): void {
  const is = hatching[kinds.indexOf(kind)];
  for (let y = 0; y < into.height; y++) for (let x = 0; x < into.width; x++) into.data[y * into.width + x] = is?.(x, y) ? packed(ink) : packed(paper);
}

/** Which cells every pixel along an axis shows: pixel i those from [i] up to [i + 1] where several share a pixel, else the one under its middle. */
function cellsOf(pixels: number, from: number, to: number, cells: number): { first: Int32Array; last: Int32Array } {
  const several = to - from > pixels;
  const edge = (i: number) => Math.floor(from + (i * (to - from)) / pixels); // in this order it is exact where the edge of a cell is that of a pixel
  const first = new Int32Array(pixels);
  const last = new Int32Array(pixels);
  for (let i = 0; i < pixels; i++) {
    const a = Math.min(cells - 1, edge(several ? i : i + 0.5));
    first[i] = a;
    last[i] = several ? Math.min(cells, Math.max(a + 1, edge(i + 1))) : a + 1;
  }
  return { first, last };
}

/** A colour as a pixel: little-endian, alpha first. */
export const packed = ([r, g, b]: Colour) => (0xff000000 | (Math.round(b * 255) << 16) | (Math.round(g * 255) << 8) | Math.round(r * 255)) >>> 0;

/** Paints what is in view. Where several cells share a pixel the greatest shows (of signed values, the farthest from 0), so that no outlier is lost between pixels. */
export function paint(into: Pixels, grid: Grid, view: View, scale: Scale, paper: Colour, ink: Colour): void {
  const { width, height, data } = into;
  const [blank, line] = [packed(paper), packed(ink)];
  const colours = new Uint32Array(table(scale.map).buffer);
  const signed = scale.map === 'signed';
  const columns = cellsOf(width, view.x0, view.x1, grid.width);
  const rows = cellsOf(height, 0, grid.height, grid.height);
  const kindOf = new Uint8Array(width); // of the pixels of a line
  let hatched = false;
  for (let y = 0; y < height; y++) {
    const at = y * width;
    const [top, bottom] = [rows.first[y] as number, rows.last[y] as number];
    if (y === 0 || top !== rows.first[y - 1]) {
      hatched = false;
      for (let x = 0; x < width; x++) {
        let [best, weight, kind] = [0, -Infinity, -1];
        for (let row = top; row < bottom; row++) {
          const end = row * grid.width + (columns.last[x] as number);
          for (let i = row * grid.width + (columns.first[x] as number); i < end; i++) {
            const its = grid.kinds[i] as number;
            if (its !== 0) {
              if (kind === -1) kind = its;
              continue;
            }
            const value = grid.values[i] as number;
            const heavy = signed ? Math.abs(value) : value;
            if (kind !== 0 || heavy > weight) [best, weight, kind] = [value, heavy, 0];
          }
        }
        kindOf[x] = kind;
        data[at + x] = kind === 0 ? (colours[Math.round(place(scale, best) * 255)] as number) : blank;
        hatched ||= kind !== 0 && kind !== NOTHING;
      }
    } else {
      data.copyWithin(at, at - width, at);
    }
    if (!hatched) continue;
    for (let x = 0; x < width; x++) {
      const kind = kindOf[x] as number;
      if (kind !== 0) data[at + x] = hatching[kind]?.(x, y) ? line : blank;
    }
  }
}
