// What heat maps paint, pixel by pixel, against a slow and obvious way to say it; drawn at random, from a seed that is printed.
import assert from 'node:assert/strict';
import { dirname, join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { fileURLToPath } from 'node:url';
import { createServer } from 'vite';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const seed = Number(process.env.DMI_TEST_SEED ?? Math.floor(Math.random() * 2 ** 31));

/** Numbers from 0 to 1 (mulberry32). */
function random(state) {
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

describe(`painting (DMI_TEST_SEED=${seed})`, () => {
  let vite, paint, colour;
  before(async () => {
    vite = await createServer({ root, configFile: false, logLevel: 'error', server: { middlewareMode: true, ws: false, watch: null }, optimizeDeps: { noDiscovery: true } });
    paint = await vite.ssrLoadModule('/src/heat/paint.ts');
    colour = await vite.ssrLoadModule('/src/colour.ts');
  });
  after(() => vite?.close());

  const [paper, ink] = [[1, 1, 1], [0.2, 0.4, 0.6]];
  const [blank, line] = [0xffffffff, 0xff996633];

  it('every pixel shows the greatest of its cells, and every cell in view has a pixel', () => {
    const next = random(seed);
    const below = (n) => Math.floor(next() * n);
    for (let round = 0; round < 300; round++) {
      const [width, height, columns, rows] = [1 + below(70), 1 + below(40), 1 + below(200), 1 + below(100)];
      const grid = { width: columns, height: rows, values: new Float32Array(columns * rows), kinds: new Uint8Array(columns * rows) };
      const holes = next() < 0.5 ? 0 : next();
      for (let i = 0; i < columns * rows; i++) {
        grid.kinds[i] = next() < holes ? 1 + below(7) : 0;
        grid.values[i] = grid.kinds[i] ? NaN : (next() - 0.3) * 10 ** below(4);
      }
      const x0 = below(columns);
      const x1 = x0 + 1 + below(columns - x0);
      const scale = next() < 0.5 ? { low: -5, high: 5, log: false, map: 'signed' } : { low: 0.1, high: 900, log: next() < 0.5, map: 'amount' };
      const image = { width, height, data: new Uint32Array(width * height) };
      paint.paint(image, grid, { x0, x1 }, scale, paper, ink);
      // Which pixels a cell is on, from the cell's side: where cells are wider than pixels, those whose middle it covers; else the one in which it ends.
      const pixelsOf = (cell, from, to, pixels) => {
        const n = to - from;
        if (n > pixels) return [Math.floor(((cell - from + 1) * pixels - 1) / n)]; // the one in which it ends begins no later than it does
        return Array.from({ length: pixels }, (_, p) => p).filter((p) => Math.floor(((2 * p + 1) * n) / (2 * pixels)) === cell - from);
      };
      const best = new Map(); // pixel -> its cells
      for (let c = x0; c < x1; c++) {
        const across = pixelsOf(c, x0, x1, width);
        if (width >= x1 - x0 || across.length) assert.ok(across.length, `column ${c} of ${x0} to ${x1} has no pixel of ${width}`);
        for (let r = 0; r < rows; r++) for (const y of pixelsOf(r, 0, rows, height)) for (const x of across) best.set(y * width + x, [...(best.get(y * width + x) ?? []), r * columns + c]);
      }
      const sized = (v) => (scale.map === 'signed' ? Math.abs(v) : v);
      const colours = new Uint32Array(colour.table(scale.map).buffer);
      for (let p = 0; p < width * height; p++) {
        const cells = best.get(p) ?? [];
        const shown = cells.filter((i) => grid.kinds[i] === 0);
        if (shown.length) {
          const top = Math.max(...shown.map((i) => sized(grid.values[i])));
          const may = shown.filter((i) => sized(grid.values[i]) === top).map((i) => colours[Math.round(colour.place(scale, grid.values[i]) * 255)]);
          assert.ok(may.includes(image.data[p]), `round ${round}, pixel ${p}: ${image.data[p].toString(16)} is not of ${may.map((m) => m.toString(16))}`);
        } else {
          assert.ok(cells.length, `round ${round}: pixel ${p} of ${width} x ${height} has no cell of ${x1 - x0} x ${rows}`);
          const only = new Set(cells.map((i) => grid.kinds[i]));
          if (only.size === 1 && only.has(7)) assert.equal(image.data[p], blank);
          else assert.ok(image.data[p] === blank || image.data[p] === line);
        }
      }
    }
  });

  it('every kind of missing value looks different from the others', () => {
    const looks = new Set();
    for (let kind = 1; kind < 8; kind++) {
      const image = { width: 24, height: 24, data: new Uint32Array(576) };
      paint.paint(image, { width: 1, height: 1, values: new Float32Array([NaN]), kinds: new Uint8Array([kind]) }, { x0: 0, x1: 1 }, { low: 0, high: 1, log: false, map: 'amount' }, paper, ink);
      looks.add([...image.data].map((p) => (p === line ? '#' : '.')).join(''));
    }
    assert.equal(looks.size, 7);
  });
});
