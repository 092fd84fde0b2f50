// What attention heads look at: all of them small, one large, its weights on the tokens.
import { useMemo } from 'preact/hooks';
import { go, type Address } from '../address';
import { shown, table, type Scale } from '../colour';
import { getJSON, getListOnce, getTensor, type Coverage, type RequestInfo, type Tensor } from '../engine';
import { kinds, type Grid, type Kind } from '../heat/paint';
import { MissingLegend, type Reason } from '../heat/Legend';
import { HeatMap, type Cell } from '../heat/HeatMap';
import { useAsked } from '../parts/asked';
import { Busy, Problem } from '../parts/Problem';
import { usePath } from '../parts/store';
import { quote, shell, Take } from '../parts/Take';
import { isPattern } from '../sites';
import { tokenText } from '../words';
import { RequestPicker, useRequest } from './Request';
import { Empty } from './Requests';
import type { HeadRow } from './Structure';
import { Thumbnails, type Head } from './Thumbnails';

/** Queries shown at once: what a head has beyond is a click away. */
const WINDOW = 512;
const weights: Scale = { low: 0, high: 1, log: false, map: 'amount' };

export function Attention({ address }: { address: Address }) {
  const path = usePath();
  const { id, latest, request, sites } = useRequest(address);
  const patterns = useMemo(() => (sites.value ?? []).filter((s) => isPattern(s) && s.name.endsWith('hook_pattern') && s.rows > 0), [sites.value]);
  const layers = patterns.map((s) => s.layer ?? 0);
  const layer = address.args['layer'] ? Number(address.args['layer']) : (layers[Math.floor(layers.length / 2)] ?? 0);
  const head = Number(address.args['head'] ?? 0);
  const length = request.value?.positions ?? 0;
  const first = Math.max(0, Math.min(Number(address.args['from'] ?? 0), Math.max(0, length - 1)));
  const site = patterns.find((s) => s.layer === layer)?.name ?? '';
  const heads = patterns.find((s) => s.layer === layer)?.row_shape?.[0] ?? 0;
  const pictures = useAsked((signal) => (patterns.length && length ? getTensor('/thumbnails', { request: id, site: 'blocks.*.attn.hook_pattern' }, signal) : Promise.resolve(null)), [id, patterns.length, length]);
  const large = useAsked(async (signal) => {
    if (!site || head >= heads || length === 0) return null;
    const tokens = `${first}:${Math.min(length, first + WINDOW)}`;
    const [tensor, coverage] = await Promise.all([
      getTensor('/tensor', { request: id, site, heads: head, tokens, partial: true, as: 'F32' }, signal), getJSON<Coverage>('/coverage', { request: id, site }, signal)]);
    return { layer, head, gaps: !tensor.complete, ...headGrid(tensor, coverage, first, Math.min(length, first + WINDOW)) };
  }, [id, site, head, first, length]);
  // Of a request that goes on, again each time it has doubled: all together cost no more than two of the whole.
  const rows = useAsked((signal, tell) => (patterns.length && length ? getListOnce<HeadRow>('/inspect/heads', { request: id }, signal, tell) : Promise.resolve([])), [id, patterns.length, request.value?.ended_unix_ns ? 'whole' : Math.floor(Math.log2(length))]);
  const kindOfHead = (h: Head) => {
    const row = rows.value?.find((r) => r.layer === h.layer && r.head === h.head);
    return row ? `${row.kind === 'other' ? 'no particular kind' : row.kind}${row.score === null ? '' : `, score ${shown(row.score)}`}` : rows.error ? `kind unknown: ${rows.error.message}` : '';
  };
  const args = { id, layer: String(layer), head: String(head), from: first ? String(first) : '' };
  const show = (change: Record<string, string>, quietly = false) => go({ view: 'attention', args: { ...args, q: address.args['q'] ?? '', ...change } }, quietly);

  if (latest.error && !id) return <Problem error={latest.error} while="List the requests" />;
  if (latest.value?.length === 0 && !id) return <Empty />;
  if (request.error) return <Problem error={request.error} while={`Read request ${id}`} />;
  if (sites.error) return <Problem error={sites.error} while="List the sites" />;
  if (!request.value || !sites.value) return <Busy what="Reading the request" />;
  const r = request.value;
  const chosen = address.args['q'] ? Number(address.args['q']) : length - 1;
  const query = Math.min(Math.max(chosen, first), Math.max(first, Math.min(length, first + WINDOW) - 1));
  const name = (position: number) => `${position} ${JSON.stringify(tokenText(r, position))}`;
  const last = Math.min(length, first + WINDOW);
  const part = length > WINDOW; // of the queries, those that are drawn
  const gaps = large.value?.gaps ?? false;
  const key = address.args['k'] ? Number(address.args['k']) : null;
  return (
    <section>
      <h2>Attention of <code>{id}</code></h2>
      <div class="controls">
        <RequestPicker id={id} all={latest.value ?? []} view="attention" args={args} />
        <label>layer <select value={String(layer)} onChange={(event) => show({ layer: event.currentTarget.value })}>{layers.map((n) => <option key={n} value={String(n)}>{n}</option>)}</select></label>
        <label>head <select value={String(head)} onChange={(event) => show({ head: event.currentTarget.value })}>{Array.from({ length: heads }, (_, n) => <option key={n} value={String(n)}>{n}</option>)}</select></label>
        {length > WINDOW && (
          <>
            <button type="button" disabled={first === 0} onClick={() => show({ from: String(Math.max(0, first - WINDOW)) })}>Earlier queries</button>
            <button type="button" disabled={first + WINDOW >= length} onClick={() => show({ from: String(first + WINDOW) })}>Later queries</button>
          </>
        )}
      </div>
      {patterns.length === 0 && (
        <p class="empty">No attention pattern was captured for this request. Attach with <code>hooks=["blocks.*.attn.hook_pattern"]</code> and a model loaded with <code>attn_implementation="eager"</code>.</p>
      )}
      {patterns.length > 0 && (
        <div class="split">
          <div>
            <h3>All heads</h3>
            <p class="quiet">Down: {layers.length} layers; to the right: {heads} heads. In each, down: queries; to the right: keys.</p>
            {pictures.error && <Problem error={pictures.error} while="Draw the heads" />}
            {!pictures.value && !pictures.error && <Busy what="Drawing the heads" />}
            {pictures.value && <Thumbnails pictures={pictures.value} chosen={{ layer, head }} onChoose={(h: Head) => show({ layer: String(h.layer), head: String(h.head) })} describe={(h) => `layer ${h.layer}, head ${h.head}: ${kindOfHead(h)}`} />}
          </div>
          <div>
            <h3>Layer {large.value?.layer ?? layer}, head {large.value?.head ?? head}</h3>
            <p class="quiet" data-kind>{rows.busy && !rows.value ? `Classifying the heads …${rows.far ? ` ${Math.floor(100 * rows.far.share)} %` : ''}` : <>On this request: {kindOfHead(large.value ?? { layer, head })}.</>}</p>
            {large.error && <Problem error={large.error} while="Read the weights" />}
            {!large.value && !large.error && <Busy what="Reading the weights" />}
            {large.value && (
              <HeatMap name={`Weights of layer ${large.value.layer}, head ${large.value.head}: a row per query, a column per key`} grid={large.value.grid} scale={weights} unit="weight" square
                rowLabel={(row) => String(first + row)} rowName={(row) => `query ${name(first + row)}`} columnName={(column) => `looks at ${name(column)}`} missing={(cell) => large.value?.reason(cell) ?? ''}
                cursor={{ row: query - first, column: key ?? query }} onCursor={(cell) => show({ q: String(first + cell.row), k: String(cell.column) }, true)} />
            )}
            {large.value && <MissingLegend reasons={large.value.totals} />}
            {large.value && <Looks request={r} grid={large.value.grid} row={query - first} query={query} onQuery={(position) => show({ q: String(position), from: String(Math.floor(position / WINDOW) * WINDOW) })} />}
            <Take python={`import dmi\ncache = dmi.open(${quote(path)}).cache(request=${quote(id)})\nweights = cache.get(${quote(site)}, heads=${head}${part ? `, tokens=slice(${first}, ${last})` : ''}${gaps ? ', partial=True' : ''})  # [head, query, key]`}
              cli={`dmi get --store ${shell(path)} --request ${shell(id)} --site ${shell(site)} --heads ${head}${part ? ` --tokens ${first}:${last}` : ''}${gaps ? ' --partial' : ''} --out weights.npy`}
              file={{ name: `${id}.${site}.${head}.f32`, path: '/tensor', args: { request: id, site, heads: head, ...(part ? { tokens: `${first}:${last}` } : {}), partial: true, as: 'F32' } }} />
          </div>
        </div>
      )}
    </section>
  );
}

/** A head's weights as a grid of [query, key]; keys after their query are nothing, queries that are missing say why. */
function headGrid(tensor: Tensor, coverage: Coverage, first: number, end: number): { grid: Grid; totals: Reason[]; reason: (cell: Cell) => string } {
  const keys = tensor.shape[2] ?? 0;
  const height = end - first;
  const grid: Grid = { width: keys, height, values: new Float32Array(height * keys).fill(NaN), kinds: new Uint8Array(height * keys).fill(kinds.indexOf('nothing')) };
  const there = new Set<number>();
  let row = 0;
  for (const [from, to] of tensor.positions) {
    for (let query = from; query < to; query++, row++) {
      there.add(query);
      const own = Math.min(keys, query + 1);
      grid.values.set(tensor.values.subarray(row * keys, row * keys + own), (query - first) * keys);
      for (let key = 0; key < own; key++) grid.kinds[(query - first) * keys + key] = Number.isFinite(tensor.values[row * keys + key]) ? 0 : kinds.indexOf('nonfinite');
    }
  }
  const why = new Map<number, [string, Kind]>();
  const lacks = (query: number, text: string, kind: Kind) => {
    why.set(query, [text, kind]);
    grid.kinds.fill(kinds.indexOf(kind), (query - first) * keys, (query - first) * keys + Math.min(keys, query + 1));
  };
  for (let query = first; query < end; query++) if (!there.has(query)) lacks(query, 'not on the books', 'unbooked');
  for (const range of coverage.ranges ?? []) {
    if (range.outcome === 'captured') continue;
    for (let i = 0; i < range.count; i++) {
      const query = range.first + i * range.stride;
      if (there.has(query) || query < first || query >= end) continue;
      lacks(query, `${range.outcome} (${range.reason})`, (kinds as readonly string[]).includes(range.outcome) ? (range.outcome as Kind) : 'lost');
    }
  }
  const totals = new Map<string, Reason>();
  for (const [text, kind] of why.values()) totals.set(text, [text, (totals.get(text)?.[1] ?? 0) + 1, kind]);
  return { grid, totals: [...totals.values()], reason: (cell) => (cell.column > first + cell.row ? 'the key comes after the query' : (why.get(first + cell.row)?.[0] ?? 'not a finite weight')) };
}

/** The tokens that a query looks at, shaded by weight, and the strongest in words. */
function Looks({ request, grid, row, query, onQuery }: { request: RequestInfo; grid: Grid; row: number; query: number; onQuery: (position: number) => void }) {
  const line = grid.values.subarray(row * grid.width, row * grid.width + Math.min(grid.width, query + 1));
  const colours = useMemo(() => table('amount'), []);
  const top = Array.from(line, (weight, position) => ({ weight, position })).filter((k) => Number.isFinite(k.weight)).sort((a, b) => b.weight - a.weight).slice(0, 5);
  return (
    <>
      <div class="tokens" role="group" aria-label={`weights of query ${query} on the tokens before it`}>
        {Array.from(line, (weight, position) => {
          const at = Number.isFinite(weight) ? 4 * Math.round(Math.sqrt(Math.min(1, Math.max(0, weight))) * 255) : -1;
          return (
            <button type="button" key={position} class="token" aria-pressed={position === query} title={`token ${position}: weight ${shown(weight)}`}
              style={at >= 0 ? { borderBottomColor: `rgb(${colours[at]}, ${colours[at + 1]}, ${colours[at + 2]})` } : {}} onClick={() => onQuery(position)}>{tokenText(request, position)}</button>
          );
        })}
      </div>
      <p class="quiet">Query {query} <q>{tokenText(request, query)}</q> looks most at {top.map((k, i) => <span key={k.position} data-key={k.position}>{i ? ', ' : ''}<q>{tokenText(request, k.position)}</q> ({k.position}): {shown(k.weight)}</span>)}.</p>
    </>
  );
}
