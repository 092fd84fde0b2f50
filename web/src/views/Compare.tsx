// Where two requests, or the same prompt in two runs, part: by layer and token.
import { useMemo } from 'preact/hooks';
import { go, type Address } from '../address';
import { fit, shown } from '../colour';
import { EngineError, getList, getListOnce, getJSON, type Coverage, type RequestInfo, type SiteInfo } from '../engine';
import { kinds as missingKinds, type Kind } from '../heat/paint';
import { MissingLegend, type Reason } from '../heat/Legend';
import { HeatMap, type Cell } from '../heat/HeatMap';
import { useAsked } from '../parts/asked';
import { Busy, Problem } from '../parts/Problem';
import { usePath } from '../parts/store';
import { quote, shell, Take } from '../parts/Take';
import { fates, isNumeric, kindOf, kindsOf, rowName, shortRow } from '../sites';
import { tokenText } from '../words';
import { Empty, modelOf, requestTitle, useRequests, type Listed } from './Requests';

interface Difference { a: string; b: string; site: string; layer: number | null; position: number | null; rows: number; differ: number; first: number | null; max_abs: number | null; relative: number | null; cosine: number | null; mismatched: number; missing: number }

const measures = { relative: 'relative difference', max_abs: 'greatest difference', cosine: 'cosine' } as const;

export function Compare({ address }: { address: Address }) {
  const path = usePath();
  const requests = useRequests();
  const all = requests.value ?? [];
  const a = address.args['a'] || address.args['id'] || all[1]?.id || all[0]?.id || '';
  const named = (id: string) => all.find((r) => r.id === id)?.names.filter((name) => !name.startsWith('#')).join() ?? '';
  const same = (r: Listed) => r.id !== a && named(a) !== '' && named(r.id) === named(a); // the same prompt, as far as labels say
  const b = address.args['b'] || (all.find(same) ?? all.find((r) => r.id !== a))?.id || '';
  const ours = useAsked((signal) => (a ? getJSON<RequestInfo>(`/requests/${encodeURIComponent(a)}`, {}, signal) : Promise.resolve(null)), [a]);
  const theirs = useAsked((signal) => (b ? getJSON<RequestInfo>(`/requests/${encodeURIComponent(b)}`, {}, signal) : Promise.resolve(null)), [b]);
  const sites = useAsked((signal) => Promise.all([a, b].map((request) => (request ? getList<SiteInfo>('/sites', { request }, signal) : Promise.resolve([])))), [a, b]);
  const every = useMemo(() => (sites.value ?? []).flat().filter(isNumeric), [sites.value]);
  const kinds = useMemo(() => kindsOf(every), [every]);
  const site = address.args['site'] || kinds[0] || '';
  const measure = (address.args['measure'] || 'relative') as keyof typeof measures;
  const comparable = sites.value?.every((side) => side.some((s) => kindOf(s.name) === site)); // else there is nothing to ask: one of the two lacks them all
  const asked = useAsked((signal, tell) => (a && b && site && comparable === false ? Promise.resolve({ site, lines: [] }) : a && b && site && comparable ? getListOnce<Difference>('/inspect/compare', { a, b, site, per: 'row' }, signal, tell).then((lines) => ({ site, lines })) : Promise.resolve(null)), [a, b, site, comparable]);
  const rows = { ...asked, value: asked.value?.site === site ? asked.value.lines : null }; // another site's are not these
  const length = Math.max(ours.value?.positions ?? 0, theirs.value?.positions ?? 0);
  const names = useMemo(() => [...new Set(every.filter((s) => kindOf(s.name) === site).sort((x, y) => (x.layer ?? -1) - (y.layer ?? -1)).map((s) => s.name))], [every, site]);
  const lacking = rows.value !== null && rows.value.length < length * names.length;
  const books = useAsked((signal) => (lacking ? Promise.all([a, b].map((request) => getJSON<Coverage>('/coverage', { request, site }, signal).catch((error: unknown) => { if (error instanceof EngineError && error.status === 404) return undefined; throw error; }))) : Promise.resolve(null)), [a, b, site, lacking]);
  const map = useMemo(() => {
    if (!rows.value || !sites.value) return null;
    const side = (name: string, of: RequestInfo | null, i: number): Side => ({ name, id: of?.id ?? '', positions: of?.positions ?? 0, ended: Boolean(of?.ended_unix_ns), has: new Set(sites.value?.[i]?.map((s) => s.name)), books: books.value?.[i] });
    return differences(rows.value, measure, names, length, [side('a', ours.value, 0), side('b', theirs.value, 1)]);
  }, [rows.value, measure, names, length, books.value, ours.value, theirs.value]);
  if (requests.error) return <Problem error={requests.error} while="List the requests" />;
  if (requests.value?.length === 0) return <Empty />;
  if (!requests.value) return <Busy what="Listing the requests" />;
  const args = { a, b, site, measure };
  const show = (change: Record<string, string>, quietly = false) => go({ view: 'compare', args: { ...args, ...change } }, quietly);
  const word = (position: number) => {
    const [x, y] = [ours.value ? tokenText(ours.value, position) : '', theirs.value ? tokenText(theirs.value, position) : ''];
    return x === y ? `token ${position} ${JSON.stringify(x)}` : `token ${position} ${JSON.stringify(x)} against ${JSON.stringify(y)}`;
  };
  const picker = (name: 'a' | 'b', value: string) => (
    <label>{name}
      <select value={value} onChange={(event) => show({ [name]: event.currentTarget.value, cell: '' })}>
        {!all.some((r) => r.id === value) && <option value={value}>{value}</option>}
        {name === 'b' && all.some(same) && <optgroup label="with the same labels as a">{all.filter(same).map((r) => <option key={r.id} value={r.id}>{requestTitle(r)}</option>)}</optgroup>}
        {all.filter((r) => name === 'a' || !same(r)).map((r) => <option key={r.id} value={r.id}>{requestTitle(r)}</option>)}
      </select>
    </label>
  );
  const cell = (address.args['cell'] ?? '').split(',').map(Number);
  const cursor: Cell | null = map && cell.length === 2 && (cell[0] ?? -1) < map.grid.height && (cell[1] ?? -1) < map.grid.width ? { row: cell[0] ?? 0, column: cell[1] ?? 0 } : null;
  const parts = firstTokens(ours.value, theirs.value);
  return (
    <section>
      <h2>Compare</h2>
      <div class="controls">
        {picker('a', a)}{b && picker('b', b)}
        <label>site <select value={site} onChange={(event) => show({ site: event.currentTarget.value, cell: '' })}>{kinds.map((k) => <option key={k} value={k}>{k}</option>)}</select></label>
        <label>measure <select value={measure} onChange={(event) => show({ measure: event.currentTarget.value })}>{Object.entries(measures).map(([name, title]) => <option key={name} value={name}>{title}</option>)}</select></label>
      </div>
      {!b && <p class="empty">There is only one request: nothing to compare it with yet.</p>}
      {ours.value && theirs.value && <p class="quiet" data-models>{modelOf(ours.value.session) === modelOf(theirs.value.session) ? `Both of ${modelOf(ours.value.session)}.` : `a: ${modelOf(ours.value.session)}; b: ${modelOf(theirs.value.session)}.`}</p>}
      {parts !== null && <p data-parts={parts}>{parts < 0 ? 'Both have the same tokens.' : `Their tokens part at ${parts}: ${word(parts)}.`}</p>}
      {sites.error && <Problem error={sites.error} while="List the sites" />}
      {rows.error && <Problem error={rows.error} while={`Compare ${site}`} />}
      {b && !rows.value && !rows.error && !sites.error && <Busy what={`Comparing ${site}`} far={rows.far} />}
      {map && map.grid.width > 0 && (
        <>
          <HeatMap name={`${measures[measure]} of ${site} between ${a} and ${b}: a row per layer, a column per token`} grid={map.grid} scale={fit(map.grid.values)} unit={measure}
            rowLabel={(row) => shortRow(map.sites[row] ?? '')} rowName={(row) => rowName(map.sites[row] ?? '')} columnName={word} missing={(c) => map.reason(c)} cursor={cursor} onCursor={(c) => show({ cell: `${c.row},${c.column}` }, true)} />
          <MissingLegend reasons={map.reasons} />
          <table class="list">
            <caption>where they part, site by site</caption>
            <thead><tr><th scope="col">site</th><th scope="col">first differs at</th><th scope="col">rows that differ</th><th scope="col">greatest relative difference</th><th scope="col">missing</th></tr></thead>
            <tbody>{map.bySite.map((s) => <tr key={s.site} data-site={s.site}><th scope="row">{s.site}</th><td>{s.rows === 0 ? 'cannot be compared' : s.first === null ? 'nowhere' : word(s.first)}</td><td class="number">{s.rows === 0 ? '' : `${s.differ} of ${s.rows}`}</td><td class="number">{s.rows === 0 ? '' : shown(s.most)}</td>
              <td>{[...s.lacking].map(([why, n]) => `${n} ${n === 1 ? 'row' : 'rows'}: ${why}`).join(', ')}</td></tr>)}</tbody>
          </table>
        </>
      )}
      {map && map.grid.width === 0 && <p class="empty">The two have no row of {site} in common.</p>}
      {b && <Take python={`import dmi\nstore = dmi.open(${quote(path)})\nrows = store.inspect.compare(${quote(a)}, ${quote(b)}, ${quote(site)}, per="row")`}
        cli={`dmi inspect compare ${shell(a)} ${shell(b)} --store ${shell(path)} --site ${shell(site)} --per row`}
        file={{ name: `${a}-${b}.json`, path: '/inspect/compare', args: { a, b, site, per: 'row' } }} />}
    </section>
  );
}

/** The first position at which the tokens differ; -1: none; null: not known. */
function firstTokens(a: RequestInfo | null, b: RequestInfo | null): number | null {
  if (!a?.tokens || !b?.tokens) return null;
  const both = Math.min(a.tokens.length, b.tokens.length);
  for (let i = 0; i < both; i++) if (a.tokens[i] !== b.tokens[i]) return i;
  return a.tokens.length === b.tokens.length ? -1 : both;
}

/** One of the two: its books are asked for where something is lacking. */
interface Side { name: string; id: string; positions: number; ended: boolean; has: Set<string>; books: Coverage | undefined }

/** `sites`: those of the kind that one of the two has. `length`: positions of the longer. */
function differences(rows: Difference[], measure: keyof typeof measures, sites: string[], length: number, sides: Side[]) {
  const lines = rows.filter((r) => r.position !== null);
  const width = sites.length ? lines.reduce((n, r) => Math.max(n, (r.position ?? 0) + 1), length) : 0;
  const values = new Float32Array(width * sites.length).fill(NaN);
  const grid = { width, height: sites.length, values, kinds: new Uint8Array(width * sites.length).fill(missingKinds.indexOf('unbooked')) };
  const bySite = sites.map((site) => ({ site, rows: 0, differ: 0, first: null as number | null, most: 0, lacking: new Map<string, number>() }));
  const both = new Set<number>();
  for (const r of lines) {
    const row = sites.indexOf(r.site);
    const sum = bySite[row];
    if (!sum || r.rows === 0) continue;
    const at = row * width + (r.position ?? 0);
    both.add(at);
    values[at] = r[measure] ?? NaN;
    grid.kinds[at] = Number.isNaN(values[at]) ? missingKinds.indexOf('nonfinite') : 0;
    sum.rows += r.rows;
    if (r.differ > 0) {
      sum.differ += r.differ;
      sum.first = sum.first === null ? r.position : Math.min(sum.first, r.position ?? Infinity);
    }
    sum.most = Math.max(sum.most, r.relative ?? 0);
  }
  const known = sides.map((side) => ({ ...side, fate: fates(side.books?.ranges ?? [], side.ended) }));
  const why = new Map<number, string>();
  const totals = new Map<string, Reason>();
  sites.forEach((site, row) => {
    for (let position = 0; position < width; position++) {
      const at = row * width + position;
      if (grid.kinds[at] === 0) continue;
      const reasons: [Kind, string][] = both.has(at) ? [['nonfinite', 'no finite element in both']] : known.flatMap(({ name, id, positions, has, books, fate }): [Kind, string][] => {
        const [kind, text] = !has.has(site) ? ['skipped' as const, 'its session does not capture this site'] : position >= positions ? ['unbooked' as const, 'ends before'] : books ? (fate(site, position) ?? [null, '']) : [null, ''];
        return kind ? [[kind, `missing in ${name} (${id}): ${text}`]] : [];
      });
      const text = reasons.map(([, text]) => text).join('; ') || 'one of the two lacks this row';
      const kind = reasons.at(-1)?.[0] ?? 'unbooked';
      grid.kinds[at] = missingKinds.indexOf(kind);
      why.set(at, text);
      totals.set(text, [text, (totals.get(text)?.[1] ?? 0) + 1, kind]);
      const lacking = bySite[row]?.lacking;
      if (lacking && !both.has(at)) lacking.set(text, (lacking.get(text) ?? 0) + 1);
    }
  });
  return { sites, bySite, grid, reason: (c: Cell) => why.get(c.row * width + c.column) ?? '', reasons: [...totals.values()] };
}
