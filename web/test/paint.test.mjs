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
        grid.kinds[i] = next() < holes ? 1 + below(8) : 0;
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
          if (only.size === 1 && only.has(8)) assert.equal(image.data[p], blank);
          else assert.ok(image.data[p] === blank || image.data[p] === line);
        }
      }
    }
  });

  it('every kind of missing value looks different from the others', () => {
    const looks = new Set();
    for (let kind = 1; kind < 9; kind++) {
      const image = { width: 24, height: 24, data: new Uint32Array(576) };
      paint.paint(image, { width: 1, height: 1, values: new Float32Array([NaN]), kinds: new Uint8Array([kind]) }, { x0: 0, x1: 1 }, { low: 0, high: 1, log: false, map: 'amount' }, paper, ink);
      looks.add([...image.data].map((p) => (p === line ? '#' : '.')).join(''));
    }
    assert.equal(looks.size, 8);
    const blank = [...looks].filter((look) => !look.includes('#'));
    assert.equal(blank.length, 1, 'only where there cannot be a value is nothing drawn');
    for (const [at, kind] of paint.kinds.entries()) {
      if (at === 0) continue;
      const swatch = { width: 24, height: 24, data: new Uint32Array(576) };
      paint.patch(swatch, kind, paper, ink);
      assert.equal([...swatch.data].map((p) => (p === line ? '#' : '.')).join(''), [...looks][at - 1], `the legend's ${kind}`);
    }
  });

  it('every character of a token can be seen', async () => {
    const { visible, tokenText } = await vite.ssrLoadModule('/src/words.ts');
    for (const [text, seen] of [[' Paris', '␣Paris'], ['\n', '⏎'], ['\t\r', '⇥␍'], ['', '∅'], ['\u00a0', '\\u{a0}'], ['\u200b', '\\u{200b}'], ['\u0007', '\\u{7}'], ['\u{e0001}', '\\u{e0001}'], ['né 中🙂', 'né␣中🙂']]) assert.equal(visible(text), seen);
    const request = { pieces: ['a', '\t'], tokens: [5, 6, 7] };
    assert.deepEqual([0, 1, 2, 3].map((position) => tokenText(request, position)), ['a', '⇥', '7', '·']);
  });

  it('what has no value says why, and is hatched: on the books, on none, and beyond the end', async () => {
    const { describedGrid, fates } = await vite.ssrLoadModule('/src/sites.ts');
    const range = (site, first, count, outcome, reason, more = {}) => ({ request: 'r', site, first, count, stride: 1, outcome, reason, level: 'full', policy: 0, attempt: 0, expired_unix_ns: 0, ...more });
    const tensor = { values: new Float32Array([1, NaN, 3, NaN, 5, NaN]), shape: [2, 3], positions: [[0, 3]], sites: ['a', 'b'] };
    const books = [range('a', 0, 1, 'captured', ''), range('a', 1, 1, 'dropped', 'ring_full'), range('a', 2, 1, 'captured', ''), range('b', 0, 1, 'captured', '', { level: 'int8' }), range('b', 1, 1, 'captured', ''), range('b', 2, 1, 'captured', '')];
    for (const [ended, beyond] of [[true, 'never computed: at this site the request ended before'], [false, 'not computed yet']]) {
      const { grid, reason, totals } = describedGrid(tensor, books, 5, ended);
      assert.deepEqual([grid.width, grid.height], [5, 2]);
      assert.deepEqual([...grid.kinds].map((kind) => paint.kinds[kind]), ['value', 'dropped', 'value', 'unbooked', 'unbooked', 'skipped', 'value', 'nonfinite', 'unbooked', 'unbooked']);
      assert.deepEqual([...grid.values].map(String), ['1', 'NaN', '3', 'NaN', 'NaN', 'NaN', '5', 'NaN', 'NaN', 'NaN']);
      assert.deepEqual([reason(0, 1), reason(0, 3), reason(1, 0), reason(1, 2), reason(0, 0)], ['dropped (ring_full)', beyond, 'kept at level int8 only', 'no finite element', '']);
      assert.deepEqual(totals.toSorted((x, y) => (x[0] < y[0] ? -1 : 1)), [['dropped (ring_full)', 1, 'dropped'], ['kept at level int8 only', 1, 'skipped'], [beyond, 4, 'unbooked'], ['no finite element', 1, 'nonfinite']].toSorted((x, y) => (x[0] < y[0] ? -1 : 1)));
      const fate = fates(books, ended);
      assert.deepEqual([fate('a', 0), fate('a', 1), fate('a', 4), fate('b', 0), fate('c', 0)], [null, ['dropped', 'dropped (ring_full)'], ['unbooked', beyond], ['skipped', 'kept at level int8 only'], ['unbooked', beyond]]);
    }
  });
});
