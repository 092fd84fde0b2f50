// What the parts of a model do: kinds of attention heads, and how alike its layers are.
import { useMemo } from 'preact/hooks';
import { formatAddress, go, type Address } from '../address';
import { shown, type Scale } from '../colour';
import { getJSON, getListOnce } from '../engine';
import { kinds as missingKinds, type Grid } from '../heat/paint';
import { HeatMap, type Cell } from '../heat/HeatMap';
import { useAsked } from '../parts/asked';
import { Busy, Problem } from '../parts/Problem';
import { usePath } from '../parts/store';
import { quote, shell, Take } from '../parts/Take';
import { Empty } from './Requests';
import { RunPicker, useRun } from './runs';

export interface HeadRow { site: string; layer: number | null; head: number; kind: string; score: number | null; previous_token: number | null; induction: number | null; duplicate_token: number | null; first_token_sink: number | null }
export interface Pair { site_a: string; site_b: string; layer_a: number | null; layer_b: number | null; cosine: number | null; cka: number | null; rows: number; sampled: number }

const scores: Record<string, keyof HeadRow> = { 'previous-token': 'previous_token', induction: 'induction', 'duplicate-token': 'duplicate_token', 'first-token-sink': 'first_token_sink' };
const share: Scale = { low: 0, high: 1, log: false, map: 'amount' };
const BEST = 12;

export function Structure({ address }: { address: Address }) {
  const path = usePath();
  const { run, runs, sites } = useRun(address);
  const kind = address.args['kind'] || 'previous-token';
  const patterns = (sites.value ?? []).some((s) => s.name.endsWith('hook_pattern'));
  const residuals = (sites.value ?? []).filter((s) => s.name.endsWith('hook_resid_post')).length;
  const heads = useAsked((signal, found) => (run && patterns ? getListOnce<HeadRow>('/inspect/heads', { run }, signal, found) : Promise.resolve([])), [run, patterns]);
  const requests = useAsked((signal) => (run ? getJSON<{ items: { id: string }[] }>('/requests', { run, latest: 1 }, signal) : Promise.resolve({ items: [] })), [run]);
  const measure = address.args['measure'] || 'cosine';
  const pairs = useAsked((signal, found) => (run && residuals > 1 ? getListOnce<Pair>('/inspect/similarity', { run, site: 'blocks.*.hook_resid_post' }, signal, found) : Promise.resolve([])), [run, residuals]);
  const other = address.args['against'] ?? '';
  const theirs = useAsked((signal, found) => (other && patterns ? getListOnce<HeadRow>('/inspect/heads', { run: other }, signal, found) : Promise.resolve(null)), [other, patterns]);
  const map = useMemo(() => headMap(heads.value ?? [], kind), [heads.value, kind]);
  const changed = useMemo(() => changes(heads.value ?? [], theirs.value ?? [], kind), [heads.value, theirs.value, kind]);
  const alike = useMemo(() => pairMap(pairs.value ?? [], measure as 'cosine' | 'cka'), [pairs.value, measure]);
  if (runs.error) return <Problem error={runs.error} while="List the runs" />;
  if (runs.value?.length === 0) return <Empty />;
  if (!runs.value || !sites.value) return <Busy what="Reading the runs" />;
  const args = { run, kind, against: other, measure: address.args['measure'] ?? '' };
  const id = requests.value?.items[0]?.id ?? '';
  const found = (heads.value ?? []).filter((h) => h.kind === kind).sort((a, b) => (b.score ?? 0) - (a.score ?? 0));
  const counts = Object.keys(scores).map((name) => [name, (heads.value ?? []).filter((h) => h.kind === name).length] as const);
  const cellOf = (text: string | undefined): Cell | null => {
    const [layer, head] = (text ?? '').split(',').map(Number);
    const row = map.layers.indexOf(layer ?? -1);
    return row >= 0 && head !== undefined && head < map.grid.width ? { row, column: head } : null;
  };
  return (
    <section>
      <h2>Structure</h2>
      <div class="controls"><RunPicker address={address} run={run} runs={runs.value} /><RunPicker address={address} run={other} runs={runs.value.filter((r) => r.id !== run)} name="against" none="no other run" /></div>
      <h3>Kinds of attention heads</h3>
      {!patterns && <p class="empty">No attention pattern was captured in this run: attach with <code>hooks=["blocks.*.attn.hook_pattern"]</code>.</p>}
      {heads.error && <Problem error={heads.error} while="Classify the heads" />}
      {patterns && heads.busy && !heads.value && <Busy what="Classifying the heads" found={heads.found} />}
      {map.grid.height > 0 && (
        <>
          <div class="controls">
            <label>score <select value={kind} onChange={(event) => go({ view: 'structure', args: { ...args, kind: event.currentTarget.value } })}>{counts.map(([name, n]) => <option key={name} value={name}>{name} ({n})</option>)}</select></label>
            <span class="quiet">Induction and duplicate-token heads show on text that repeats; <code>session.inspect.repeated_tokens()</code> runs the model on random tokens, twice over.</span>
          </div>
          <div class="split even">
            <HeatMap name={`${kind} score: a row per layer, a column per head`} grid={map.grid} scale={share} unit={kind} rowLabel={(row) => String(map.layers[row])} rowName={(row) => `layer ${map.layers[row]}`} columnName={(head) => `head ${head}`}
              missing={() => 'no query counts for this score'} cursor={cellOf(address.args['head'])} onCursor={(cell) => go({ view: 'structure', args: { ...args, head: `${map.layers[cell.row]},${cell.column}` } }, true)} />
            <div>
              <table class="list">
                <caption>{found.length ? found.length > BEST ? `${kind} heads, the ${BEST} clearest of ${found.length}` : `${kind} heads, the clearest first` : `No head is a ${kind} head.`}</caption>
                {found.length > 0 && <thead><tr><th scope="col">layer</th><th scope="col">head</th><th scope="col">score</th><th scope="col">look at</th></tr></thead>}
                <tbody>{found.slice(0, BEST).map((h) => (
                  <tr key={`${h.layer} ${h.head}`} data-head={`${h.layer}.${h.head}`}><td class="number">{h.layer}</td><td class="number">{h.head}</td><td class="number">{shown(h.score ?? NaN)}</td>
                    <td><a href={formatAddress({ view: 'attention', args: { id, layer: String(h.layer), head: String(h.head) } })} aria-label={`attention of layer ${h.layer}, head ${h.head}`}>attention</a></td></tr>
                ))}</tbody>
              </table>
            </div>
          </div>
        </>
      )}
      {other && <Changes other={other} error={theirs.error} busy={theirs.busy && !theirs.value} changed={changed} kind={kind} />}
      <h3>How alike the layers are</h3>
      {residuals < 2 && <p class="empty">The residual stream of fewer than two layers was captured in this run.</p>}
      {pairs.error && <Problem error={pairs.error} while="Compare the layers" />}
      {residuals > 1 && pairs.busy && !pairs.value && <Busy what="Comparing the layers" found={pairs.found} />}
      {alike.grid.height > 0 && (
        <>
          <div class="controls"><label>measure <select value={measure} onChange={(event) => go({ view: 'structure', args: { ...args, measure: event.currentTarget.value } })}><option value="cosine">cosine of the rows, mean</option><option value="cka">linear CKA</option></select></label></div>
          <HeatMap name={`${measure} between the residual streams of every two layers`} grid={alike.grid} scale={{ ...share, low: Math.min(0, alike.least) }} unit={measure} rowLabel={(row) => String(alike.layers[row])} rowName={(row) => `layer ${alike.layers[row]}`} columnLabel={(column) => String(alike.layers[column])} columnName={(column) => `layer ${alike.layers[column]}`}
            missing={() => 'not a number for this pair'} square cursor={null} onCursor={() => undefined} />
        </>
      )}
      <Take python={`import dmi\nstore = dmi.open(${quote(path)})\nheads = store.inspect.heads(run=${quote(run)})${other ? `\nothers = store.inspect.heads(run=${quote(other)})` : ''}\nalike = store.inspect.similarity(run=${quote(run)})`}
        cli={`dmi inspect heads --store ${shell(path)} --run ${shell(run)}${other ? `   # and: dmi inspect heads --store ${shell(path)} --run ${shell(other)}` : ''}   # and: dmi inspect similarity --store ${shell(path)} --run ${shell(run)}`}
        file={{ name: `${run}.heads.json`, path: '/inspect/heads', args: { run } }} />
    </section>
  );
}

interface Change { layer: number; head: number; before: string; after: string; by: number | null }

/** Heads of which the kind or the score is another in the other run, the greatest change first. */
function changes(ours: HeadRow[], theirs: HeadRow[], kind: string) {
  const before = new Map(theirs.map((h) => [`${h.layer} ${h.head}`, h]));
  const score = (h: HeadRow) => h[scores[kind] ?? 'score'];
  const all: Change[] = ours.flatMap((h) => {
    const was = before.get(`${h.layer} ${h.head}`);
    const [a, b] = [score(h), was && score(was)];
    return was ? [{ layer: h.layer ?? 0, head: h.head, before: was.kind, after: h.kind, by: typeof a === 'number' && typeof b === 'number' ? a - b : null }] : [];
  });
  const rows = all.map((c) => ({ ...headless, layer: c.layer, head: c.head, score: c.by }));
  return { ...headMap(rows, 'by'), all: all.sort((a, b) => Number(b.before !== b.after) - Number(a.before !== a.after) || Math.abs(b.by ?? 0) - Math.abs(a.by ?? 0)) };
}

const headless: HeadRow = { site: '', layer: null, head: 0, kind: '', score: null, previous_token: null, induction: null, duplicate_token: null, first_token_sink: null };

function Changes({ other, error, busy, changed, kind }: { other: string; error: import('../engine').EngineError | null; busy: boolean; changed: ReturnType<typeof changes>; kind: string }) {
  const most = changed.all.reduce((n, c) => Math.max(n, Math.abs(c.by ?? 0)), 0);
  const turned = changed.all.filter((c) => c.before !== c.after).length;
  return (
    <>
      <h3>What changed against run {other}</h3>
      {error && <Problem error={error} while="Classify the other run's heads" />}
      {busy && <Busy what="Classifying the other run's heads" />}
      {!busy && !error && changed.all.length === 0 && <p class="empty">The other run has no head in common with this one.</p>}
      {changed.all.length > 0 && (
        <div class="split even" data-changes={turned}>
          <HeatMap name={`${kind} score, this run's less the other's: a row per layer, a column per head`} grid={changed.grid} scale={{ low: -Math.max(most, 1e-6), high: Math.max(most, 1e-6), log: false, map: 'signed' }} unit={`${kind}, change`}
            rowLabel={(row) => String(changed.layers[row])} rowName={(row) => `layer ${changed.layers[row]}`} columnName={(head) => `head ${head}`} missing={() => 'no score in one of the two'} cursor={null} onCursor={() => undefined} />
          <table class="list">
            <caption>{turned === 0 ? 'Every head is of the same kind in both; the greatest changes of its score:' : `${turned} ${turned === 1 ? 'head is' : 'heads are'} of another kind`}</caption>
            <thead><tr><th scope="col">layer</th><th scope="col">head</th><th scope="col">in the other run</th><th scope="col">in this</th><th scope="col">change of the score</th></tr></thead>
            <tbody>{changed.all.slice(0, BEST).map((c) => <tr key={`${c.layer} ${c.head}`} data-change={`${c.layer}.${c.head}`}><td class="number">{c.layer}</td><td class="number">{c.head}</td><td>{c.before}</td><td>{c.after}</td><td class="number">{c.by === null ? '' : shown(c.by)}</td></tr>)}</tbody>
          </table>
        </div>
      )}
    </>
  );
}

function gridOf(width: number, height: number, values: Float32Array): Grid {
  return { width, height, values, kinds: Uint8Array.from(values, (v) => (Number.isNaN(v) ? missingKinds.indexOf('absent') : 0)) };
}

function headMap(heads: HeadRow[], kind: string) {
  const layers = [...new Set(heads.map((h) => h.layer ?? 0))].sort((a, b) => a - b);
  const width = heads.reduce((n, h) => Math.max(n, h.head + 1), 0);
  const values = new Float32Array(width * layers.length).fill(NaN);
  for (const h of heads) {
    const score = h[scores[kind] ?? 'score'];
    values[layers.indexOf(h.layer ?? 0) * width + h.head] = typeof score === 'number' ? score : NaN;
  }
  return { layers, grid: gridOf(width, layers.length, values) };
}

function pairMap(pairs: Pair[], measure: 'cosine' | 'cka') {
  const layers = [...new Set(pairs.flatMap((p) => [p.layer_a ?? 0, p.layer_b ?? 0]))].sort((a, b) => a - b);
  const n = layers.length;
  const values = new Float32Array(n * n).fill(NaN);
  for (let i = 0; i < n; i++) values[i * n + i] = 1;
  let least = 0;
  for (const p of pairs) {
    const [a, b] = [layers.indexOf(p.layer_a ?? 0), layers.indexOf(p.layer_b ?? 0)];
    const v = p[measure] ?? NaN;
    values[a * n + b] = values[b * n + a] = v;
    if (v < least) least = v;
  }
  return { layers, least, grid: gridOf(n, n, values) };
}
