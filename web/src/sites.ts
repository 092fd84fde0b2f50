// Sites by kind: blocks.3.hook_resid_post is the kind blocks.*.hook_resid_post at layer 3.
import type { CoverageRange, SiteInfo, Tensor } from './engine';
import type { Reason } from './heat/Legend';
import { kinds, type Grid, type Kind } from './heat/paint';

export const kindOf = (name: string): string => name.replace(/^blocks\.\d+\./, 'blocks.*.');

/** The kinds that occur, each once: first those of which anything is there, of these the residual stream. */
export function kindsOf(sites: SiteInfo[]): string[] {
  const there = new Set(sites.filter((site) => site.rows > 0).map((site) => kindOf(site.name)));
  const rank = (kind: string) => (there.has(kind) ? 0 : 4) + (kind.includes('resid_post') ? 0 : kind.includes('resid') ? 1 : kind.startsWith('blocks') ? 2 : 3);
  return [...new Set(sites.map((site) => kindOf(site.name)))].sort((a, b) => rank(a) - rank(b));
}

export const isPattern = (site: SiteInfo): boolean => site.axes.includes('key');
/** Whether it has statistics; of a site of which nothing was captured that is not known, and what became of its rows can still be shown. */
export const isNumeric = (site: SiteInfo): boolean => site.dtype !== 'BOOL' && site.name !== 'tokens';

/** Short name of a row of a map: its layer, or the site's name. */
export function rowName(site: string): string {
  const layer = /^blocks\.(\d+)\./.exec(site);
  return layer ? `layer ${layer[1]}` : site;
}

export const shortRow = (site: string): string => /^blocks\.(\d+)\./.exec(site)?.[1] ?? site;

/** What is said of rows that no book knows. */
const unbooked = (ended: boolean): string => (ended ? 'never computed: at this site the request ended before' : 'not computed yet');

/** A statistic's grid, and of every cell without a value why it has none, from the books. It is as wide as the request is long. `ended`: it goes no further. */
export function describedGrid(tensor: Tensor, ranges: CoverageRange[], length: number, ended: boolean): { grid: Grid; reason: (row: number, column: number) => string; totals: Reason[] } {
  const [height = 0, known = 0] = tensor.shape;
  const first = tensor.positions[0]?.[0] ?? 0;
  const width = height > 0 ? Math.max(known, length - first) : 0;
  const grid: Grid = { width, height, values: width === known ? tensor.values : new Float32Array(width * height).fill(NaN), kinds: new Uint8Array(width * height) };
  if (width > known) for (let row = 0; row < height; row++) grid.values.set(tensor.values.subarray(row * known, (row + 1) * known), row * width);
  const reasons: string[] = [];
  const why = new Uint16Array(width * height);
  const note = (text: string) => {
    const at = reasons.indexOf(text);
    return at >= 0 ? at + 1 : reasons.push(text);
  };
  const bySite = new Map<string, CoverageRange[]>();
  for (const range of ranges) bySite.set(range.site, [...(bySite.get(range.site) ?? []), range]);
  tensor.sites.forEach((site, row) => {
    for (let column = 0; column < width; column++) {
      const at = row * width + column;
      if (!Number.isNaN(grid.values[at])) continue;
      grid.kinds[at] = kinds.indexOf('unbooked');
      why[at] = note(unbooked(ended));
    }
    for (const range of (bySite.get(site) ?? []).sort((a, b) => a.attempt - b.attempt)) {
      for (let i = 0; i < range.count; i++) {
        const column = range.first + i * range.stride - first;
        const at = row * width + column;
        if (column < 0 || column >= width || !Number.isNaN(grid.values[at])) continue;
        const captured = range.outcome === 'captured';
        const kind: Kind = captured && range.level === 'full' ? 'nonfinite' : captured ? 'skipped' : ((kinds as readonly string[]).includes(range.outcome) ? (range.outcome as Kind) : 'lost');
        grid.kinds[at] = kinds.indexOf(kind);
        why[at] = note(captured && range.level === 'full' ? 'no finite element' : captured ? `kept at level ${range.level} only` : `${range.outcome} (${range.reason})`);
      }
    }
  });
  const totals = new Map<number, Reason>();
  why.forEach((index, at) => {
    if (index === 0) return;
    const total = totals.get(index);
    if (total) total[1]++;
    else totals.set(index, [reasons[index - 1] ?? '', 1, kinds[grid.kinds[at] ?? 0] ?? 'unbooked']);
  });
  return { grid, reason: (row, column) => reasons[(why[row * width + column] ?? 0) - 1] ?? '', totals: [...totals.values()] };
}

/** Why a row has no value, from the books; null where it was captured in full. `ended`: the request goes no further. */
export function fates(ranges: CoverageRange[], ended: boolean): (site: string, position: number) => [Kind, string] | null {
  const bySite = new Map<string, CoverageRange[]>();
  for (const range of ranges.toSorted((a, b) => a.attempt - b.attempt)) bySite.set(range.site, [...(bySite.get(range.site) ?? []), range]);
  return (site, position) => {
    let fate: [Kind, string] | null = ['unbooked', unbooked(ended)];
    for (const r of bySite.get(site) ?? []) {
      const at = position - r.first;
      if (at < 0 || at % r.stride !== 0 || at / r.stride >= r.count) continue;
      if (r.outcome !== 'captured') fate = [(kinds as readonly string[]).includes(r.outcome) ? (r.outcome as Kind) : 'lost', `${r.outcome} (${r.reason})`];
      else fate = r.level === 'full' ? null : ['skipped', `kept at level ${r.level} only`];
    }
    return fate;
  };
}
