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
const measures = { cosine: 'cosine of the rows, mean', cka: 'linear CKA' } as const;
type Measure = keyof typeof measures;

export function Structure({ address }: { address: Address }) {
  const path = usePath();
  const { run, runs, sites } = useRun(address);
  const kind = address.args['kind'] || 'previous-token';
  const patterns = (sites.value ?? []).some((s) => s.name.endsWith('hook_pattern'));
  const residuals = (sites.value ?? []).filter((s) => s.name.endsWith('hook_resid_post')).length;
  const heads = useAsked((signal, tell) => (run && patterns ? getListOnce<HeadRow>('/inspect/heads', { run }, signal, tell) : Promise.resolve([])), [run, patterns]);
  const requests = useAsked((signal) => (run ? getJSON<{ items: { id: string }[] }>('/requests', { run, latest: 1 }, signal) : Promise.resolve({ items: [] })), [run]);
  const measure = address.args['measure'] || 'cosine';
  const pairs = useAsked((signal, tell) => (run && residuals > 1 ? getListOnce<Pair>('/inspect/similarity', { run, site: 'blocks.*.hook_resid_post' }, signal, tell) : Promise.resolve([])), [run, residuals]);
  const other = address.args['against'] ?? '';
  const theirs = useAsked((signal, tell) => (other && patterns ? getListOnce<HeadRow>('/inspect/heads', { run: other }, signal, tell) : Promise.resolve(null)), [other, patterns]);
  const theirPairs = useAsked((signal, tell) => (other && residuals > 1 ? getListOnce<Pair>('/inspect/similarity', { run: other, site: 'blocks.*.hook_resid_post' }, signal, tell) : Promise.resolve(null)), [other, residuals]);
  const map = useMemo(() => headMap(heads.value ?? [], kind), [heads.value, kind]);
  const changed = useMemo(() => changes(heads.value ?? [], theirs.value ?? [], kind), [heads.value, theirs.value, kind]);
  const alike = useMemo(() => pairMap(pairs.value ?? [], measure as Measure), [pairs.value, measure]);
  const turned = useMemo(() => pairChanges(pairs.value ?? [], theirPairs.value ?? [], measure as Measure), [pairs.value, theirPairs.value, measure]);
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
      {patterns && heads.busy && !heads.value && <Busy what="Classifying the heads" far={heads.far} />}
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
      <h3>How alike the layers are</h3>
      {residuals < 2 && <p class="empty">The residual stream of fewer than two layers was captured in this run.</p>}
      {pairs.error && <Problem error={pairs.error} while="Compare the layers" />}
      {residuals > 1 && pairs.busy && !pairs.value && <Busy what="Comparing the layers" far={pairs.far} />}
      {alike.grid.height > 0 && (
        <>
          <div class="controls"><label>measure <select value={measure} onChange={(event) => go({ view: 'structure', args: { ...args, measure: event.currentTarget.value } })}>{Object.entries(measures).map(([name, title]) => <option key={name} value={name}>{title}</option>)}</select></label></div>
          <HeatMap name={`${measure} between the residual streams of every two layers`} grid={alike.grid} scale={{ ...share, low: Math.min(0, alike.least) }} unit={measure} rowLabel={(row) => String(alike.layers[row])} rowName={(row) => `layer ${alike.layers[row]}`} columnLabel={(column) => String(alike.layers[column])} columnName={(column) => `layer ${alike.layers[column]}`}
            missing={() => 'not a number for this pair'} square />
        </>
      )}
      {other && (
        <>
          <h3>What changed against run {other}</h3>
          {theirs.error && <Problem error={theirs.error} while="Classify the other run's heads" />}
          {theirPairs.error && <Problem error={theirPairs.error} while="Compare the other run's layers" />}
          {patterns && theirs.busy && !theirs.value && <Busy what="Classifying the other run's heads" far={theirs.far} />}
          {residuals > 1 && theirPairs.busy && !theirPairs.value && <Busy what="Comparing the other run's layers" far={theirPairs.far} />}
          <ByLayer changed={changed.all} turned={turned} kind={kind} measure={measure as Measure} />
          {theirs.value && <HeadChanges changed={changed} kind={kind} />}
          {theirPairs.value && <PairChanges turned={turned} measure={measure as Measure} />}
        </>
      )}
      <Take python={`import dmi\nstore = dmi.open(${quote(path)})\nheads = store.inspect.heads(run=${quote(run)})${other ? `\nothers = store.inspect.heads(run=${quote(other)})` : ''}\nalike = store.inspect.similarity(run=${quote(run)})${other ? `\nothers_alike = store.inspect.similarity(run=${quote(other)})` : ''}`}
        cli={`dmi inspect heads --store ${shell(path)} --run ${shell(run)}${other ? `   # and: dmi inspect heads --store ${shell(path)} --run ${shell(other)}` : ''}   # and: dmi inspect similarity --store ${shell(path)} --run ${shell(run)}${other ? `   # and: dmi inspect similarity --store ${shell(path)} --run ${shell(other)}` : ''}`}
        file={{ name: `${run}.structure.json`, text: () => JSON.stringify({ run, heads: heads.value, alike: pairs.value, ...(other ? { against: other, others: theirs.value, others_alike: theirPairs.value } : {}) }) }} />
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

/** Where the differences are: of every layer how many heads have become another kind, the score that moved most, and its likeness to the layer before. */
function ByLayer({ changed, turned, kind, measure }: { changed: Change[]; turned: ReturnType<typeof pairChanges>; kind: string; measure: Measure }) {
  const layers = [...new Set([...changed.map((c) => c.layer), ...turned.layers])].sort((a, b) => a - b);
  if (layers.length === 0) return null;
  return (
    <table class="list">
      <caption>by layer</caption>
      <thead><tr><th scope="col">layer</th><th scope="col">heads of another kind</th><th scope="col">{kind} score that moved most</th><th scope="col">{measure} with the layer before: in the other run</th><th scope="col">in this</th><th scope="col">change</th></tr></thead>
      <tbody>{layers.map((layer) => {
        const own = changed.filter((c) => c.layer === layer);
        const others = own.filter((c) => c.before !== c.after);
        const most = own.reduce<Change | null>((m, c) => (c.by !== null && Math.abs(c.by) > Math.abs(m?.by ?? 0) ? c : m), null);
        const step = turned.steps.find((s) => s.layer === layer);
        return (
          <tr key={layer} data-layer-changes={layer} data-turned={others.length} data-step={step?.by ?? ''}>
            <td class="number">{layer}</td><td>{own.length === 0 ? 'not in both' : others.map((c) => `${c.head}: ${c.before} → ${c.after}`).join(', ') || 'none'}</td>
            <td>{most ? `head ${most.head}: ${shown(most.by ?? NaN)}` : own.length ? 'none' : ''}</td>
            <td class="number">{step ? shown(step.before ?? NaN) : ''}</td><td class="number">{step ? shown(step.after ?? NaN) : ''}</td><td class="number">{step ? shown(step.by ?? NaN) : ''}</td>
          </tr>
        );
      })}</tbody>
    </table>
  );
}

/** A scale around 0 that holds all of some changes. */
const around = (values: (number | null)[]): Scale => {
  const most = Math.max(1e-6, ...values.map((v) => Math.abs(v ?? 0)).filter(Number.isFinite));
  return { low: -most, high: most, log: false, map: 'signed' };
};

function HeadChanges({ changed, kind }: { changed: ReturnType<typeof changes>; kind: string }) {
  const turned = changed.all.filter((c) => c.before !== c.after).length;
  if (changed.all.length === 0) return <p class="empty">The other run has no head in common with this one.</p>;
  return (
    <div class="split even" data-changes={turned}>
      <HeatMap name={`${kind} score, this run's less the other's: a row per layer, a column per head`} grid={changed.grid} scale={around(changed.all.map((c) => c.by))} unit={`${kind}, change`}
        rowLabel={(row) => String(changed.layers[row])} rowName={(row) => `layer ${changed.layers[row]}`} columnName={(head) => `head ${head}`} missing={() => 'no score in one of the two'} />
      <table class="list">
        <caption>{turned === 0 ? 'Every head is of the same kind in both; the greatest changes of its score:' : `${turned} ${turned === 1 ? 'head is' : 'heads are'} of another kind`}</caption>
        <thead><tr><th scope="col">layer</th><th scope="col">head</th><th scope="col">in the other run</th><th scope="col">in this</th><th scope="col">change of the score</th></tr></thead>
        <tbody>{changed.all.slice(0, BEST).map((c) => <tr key={`${c.layer} ${c.head}`} data-change={`${c.layer}.${c.head}`}><td class="number">{c.layer}</td><td class="number">{c.head}</td><td>{c.before}</td><td>{c.after}</td><td class="number">{c.by === null ? '' : shown(c.by)}</td></tr>)}</tbody>
      </table>
    </div>
  );
}

function PairChanges({ turned, measure }: { turned: ReturnType<typeof pairChanges>; measure: Measure }) {
  if (turned.all.length === 0) return <p class="empty">The other run has no two layers in common with this one.</p>;
  return (
    <div class="alike-changes">
      <HeatMap name={`${measure} between every two layers, this run's less the other's`} grid={turned.grid} scale={around(turned.all)} unit={`${measure}, change`} rowLabel={(row) => String(turned.layers[row])} rowName={(row) => `layer ${turned.layers[row]}`}
        columnLabel={(column) => String(turned.layers[column])} columnName={(column) => `layer ${turned.layers[column]}`} missing={() => 'not a number for this pair in one of the two'} square />
    </div>
  );
}

/** How much more alike two layers are than in the other run, for every two; and of those that follow each other, from what to what. */
function pairChanges(ours: Pair[], theirs: Pair[], measure: Measure) {
  const before = new Map(theirs.map((p) => [`${p.site_a} ${p.site_b}`, p[measure]]));
  const both = ours.filter((p) => before.has(`${p.site_a} ${p.site_b}`)).map((p) => {
    const was = before.get(`${p.site_a} ${p.site_b}`) ?? null;
    return { ...p, was, by: p[measure] === null || was === null ? null : p[measure] - was };
  });
  const map = pairMap(both.map((p) => ({ ...p, [measure]: p.by })), measure);
  const at = (layer: number | null) => map.layers.indexOf(layer ?? 0);
  return { ...map, all: both.map((p) => p.by), steps: both.filter((p) => at(p.layer_b) === at(p.layer_a) + 1).map((p) => ({ layer: p.layer_b ?? 0, before: p.was, after: p[measure], by: p.by })) };
}

function gridOf(width: number, height: number, values: Float32Array): Grid {
  return { width, height, values, kinds: Uint8Array.from(values, (v) => (Number.isNaN(v) ? missingKinds.indexOf('unbooked') : 0)) };
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

function pairMap(pairs: Pair[], measure: Measure) {
  const layers = [...new Set(pairs.flatMap((p) => [p.layer_a ?? 0, p.layer_b ?? 0]))].sort((a, b) => a - b);
  const n = layers.length;
  const values = new Float32Array(n * n).fill(NaN);
  let least = 0;
  for (const p of pairs) {
    const [a, b] = [layers.indexOf(p.layer_a ?? 0), layers.indexOf(p.layer_b ?? 0)];
    const v = p[measure] ?? NaN;
    values[a * n + b] = values[b * n + a] = v;
    if (v < least) least = v;
  }
  return { layers, least, grid: gridOf(n, n, values) };
}
