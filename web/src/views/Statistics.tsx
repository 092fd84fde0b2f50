// What values look like over a run: distributions, growth of the residual stream, dimensions that stand out, what is not finite, how experts share.
import { useMemo } from 'preact/hooks';
import { formatAddress, go, type Address } from '../address';
import { fit, shown } from '../colour';
import { getListOnce, type EngineError, type Far } from '../engine';
import { HeatMap } from '../heat/HeatMap';
import { useAsked } from '../parts/asked';
import { Chart } from '../parts/Chart';
import { Busy, Problem } from '../parts/Problem';
import { usePath } from '../parts/store';
import { quote, shell, Take } from '../parts/Take';
import { isNumeric, kindOf, kindsOf, rowName } from '../sites';
import { Empty } from './Requests';
import { RunPicker, useRun } from './runs';
import type { Pair } from './Structure';

interface Distribution {
  site: string; layer: number | null; rows: number; missing: number; count: number; nonfinite: number; nan: number; zeros: number; mean: number | null; std: number | null; absmax: number | null;
  p01: number | null; p05: number | null; p25: number | null; p50: number | null; p75: number | null; p95: number | null; p99: number | null; norm: number | null; norm_max: number | null;
  growth: number | null; histogram: { edges: number[]; counts: number[] } | null;
}
interface Outlier { site: string; layer: number | null; dim: number; kind: string; rows: number; mean: number | null; rms: number | null; absmax: number | null; share: number | null; ratio: number | null }
interface Load { layer: number | null; expert: number; tokens: number; share: number | null; load: number | null; balance: number | null }

const SHOWN = 30;

export function Statistics({ address }: { address: Address }) {
  const path = usePath();
  const { run, runs, sites } = useRun(address);
  const numeric = useMemo(() => (sites.value ?? []).filter(isNumeric), [sites.value]);
  const kinds = useMemo(() => kindsOf(numeric), [numeric]);
  const kind = address.args['site'] || kinds[0] || '';
  const stats = useAsked((signal, tell) => (run && kind ? getListOnce<Distribution>('/inspect/stats', { run, site: kind }, signal, tell).then((rows) => ({ kind, rows })) : Promise.resolve(null)), [run, kind]);
  const summed = stats.value?.kind === kind ? stats.value.rows : null; // what was there of another site is not of this
  const vectors = numeric.some((s) => kindOf(s.name) === kind && s.axes.length === 2);
  const outliers = useAsked((signal, tell) => (run && kind && vectors ? getListOnce<Outlier>('/inspect/outliers', { run, site: kind }, signal, tell).then((rows) => ({ kind, rows })) : Promise.resolve(null)), [run, kind, vectors]);
  const standing = outliers.value?.kind === kind ? outliers.value.rows : null;
  const layered = vectors && numeric.filter((s) => kindOf(s.name) === kind && s.layer !== null).length > 1;
  const first = summed !== null && (!vectors || standing !== null); // what is read from top to bottom comes in that order: the cosines cost more than the rest
  const alike = useAsked((signal, tell) => (run && kind && layered && first ? getListOnce<Pair>('/inspect/similarity', { run, site: kind }, signal, tell).then((rows) => ({ kind, rows })) : Promise.resolve(null)), [run, kind, layered, first]);
  const turns = alike.value?.kind === kind ? alike.value.rows : null;
  const mixture = (sites.value ?? []).some((s) => s.name.endsWith('hook_expert_indices'));
  const router = useAsked((signal, tell) => (run && mixture ? getListOnce<Load>('/inspect/router', { run }, signal, tell) : Promise.resolve([])), [run, mixture]);
  if (runs.error) return <Problem error={runs.error} while="List the runs" />;
  if (runs.value?.length === 0) return <Empty />;
  if (!runs.value || !sites.value) return <Busy what="Reading the runs" />;
  const rows = summed ?? [];
  const picked = rows.find((r) => String(r.layer ?? '') === (address.args['layer'] ?? '')) ?? rows[rows.length - 1];
  const layers = rows.map((r, i) => r.layer ?? i);
  const bad = rows.filter((r) => r.nonfinite > 0);
  const args = { run, site: kind };
  return (
    <section>
      <h2>Statistics</h2>
      <div class="controls">
        <RunPicker address={address} run={run} runs={runs.value} />
        <label>site <select value={kind} onChange={(event) => go({ view: 'statistics', args: { run, site: event.currentTarget.value } })}>{kinds.map((k) => <option key={k} value={k}>{k}</option>)}</select></label>
      </div>
      {stats.error && <Problem error={stats.error} while={`Sum up ${kind}`} />}
      {stats.busy && rows.length === 0 && <Busy what={`Summing up ${kind}`} far={stats.far} />}
      {rows.length > 0 && (
        <>
          <div class="pair">
            <div>
              <h3>Growth: norm of a row, layer by layer</h3>
              <Chart name={`Mean and greatest norm of ${kind} by layer`} x={layers} series={[{ label: 'mean', values: rows.map((r) => r.norm) }, { label: 'greatest', values: rows.map((r) => r.norm_max) }]} log xLabel="layer" />
            </div>
            <div>
              <h3>Distribution, layer by layer</h3>
              <Chart name={`Quantiles of ${kind} by layer`} x={layers} xLabel="layer"
                series={(['p01', 'p25', 'p50', 'p75', 'p99'] as const).map((p) => ({ label: p, values: rows.map((r) => r[p]) }))} />
            </div>
          </div>
          {layered && <Turns run={run} pairs={turns} error={alike.error} busy far={alike.far} />}
          {picked && (
            <>
              <div class="controls">
                <h3>Elements of <code>{picked.site}</code></h3>
                {rows.length > 1 && <label>layer <select value={String(picked.layer ?? '')} onChange={(event) => go({ view: 'statistics', args: { ...args, layer: event.currentTarget.value } })}>{rows.map((r) => <option key={r.site} value={String(r.layer ?? '')}>{r.layer ?? r.site}</option>)}</select></label>}
              </div>
              <dl class="facts">
                <div><dt>elements</dt><dd>{picked.count}</dd></div><div><dt>rows</dt><dd data-rows={picked.rows}>{picked.rows}{picked.missing ? `, ${picked.missing} missing` : ''}</dd></div><div><dt>mean</dt><dd>{shown(picked.mean ?? NaN)}</dd></div>
                <div><dt>deviation</dt><dd>{shown(picked.std ?? NaN)}</dd></div><div><dt>greatest</dt><dd>{shown(picked.absmax ?? NaN)}</dd></div><div><dt>zeros</dt><dd>{picked.zeros}</dd></div>
                <div><dt>mean norm of a row</dt><dd data-norm={picked.norm ?? ''}>{shown(picked.norm ?? NaN)}</dd></div>
              </dl>
              {picked.histogram && (
                <Chart name={`Elements of ${picked.site} by power of two`} x={picked.histogram.counts.map((_, i) => i + 0.5)} bars height={160} xLabel="value: a bar between every two powers of two" xName={(edge) => shown(picked.histogram?.edges[edge] ?? NaN)}
                  series={[{ label: 'elements', values: picked.histogram.counts }]} />
              )}
            </>
          )}
          <h3>Not finite</h3>
          {bad.length === 0 ? <p>Every element is finite{rows.some((r) => r.missing) ? `; ${rows.reduce((n, r) => n + r.missing, 0)} rows are missing` : ''}.</p> : (
            <table class="list"><thead><tr><th scope="col">site</th><th scope="col">elements</th><th scope="col">of these NaN</th></tr></thead>
              <tbody>{bad.map((r) => <tr key={r.site}><th scope="row">{r.site}</th><td class="number">{r.nonfinite}</td><td class="number">{r.nan}</td></tr>)}</tbody></table>
          )}
        </>
      )}
      {vectors && <Outliers list={standing} error={outliers.error} busy far={outliers.far} />}
      {router.error && <Problem error={router.error} while="Sum up the experts" />}
      {mixture && router.value && router.value.length > 0 && <Router loads={router.value} />}
      <Take python={`import dmi\nstore = dmi.open(${quote(path)})\nrows = store.inspect.stats(${quote(kind)}, run=${quote(run)})${vectors ? `\noutliers = store.inspect.outliers(${quote(kind)}, run=${quote(run)})` : ''}${layered ? `\nalike = store.inspect.similarity(${quote(kind)}, run=${quote(run)})` : ''}${mixture ? `\nrouter = store.inspect.router(run=${quote(run)})` : ''}`}
        cli={`dmi inspect stats --store ${shell(path)} --run ${shell(run)} --site ${shell(kind)}${vectors ? `   # and: dmi inspect outliers --store ${shell(path)} --run ${shell(run)} --site ${shell(kind)}` : ''}${layered ? `   # and: dmi inspect similarity --store ${shell(path)} --run ${shell(run)} --site ${shell(kind)}` : ''}${mixture ? `   # and: dmi inspect router --store ${shell(path)} --run ${shell(run)}` : ''}`}
        file={{ name: `${run}.${kind.replaceAll('*', 'N')}.json`, text: () => JSON.stringify({ run, site: kind, rows: summed, ...(vectors ? { outliers: standing } : {}), ...(layered ? { alike: turns } : {}), ...(mixture ? { router: router.value } : {}) }) }} />
    </section>
  );
}

/** How far each layer turns what it was given: the cosine of a row after it with the one after the layer before, mean over rows. */
function Turns({ run, pairs, error, busy, far }: { run: string; pairs: Pair[] | null; error: EngineError | null; busy: boolean; far: Far | null }) {
  const steps = useMemo(() => {
    const layers = [...new Set((pairs ?? []).map((p) => p.layer_a))].sort((a, b) => (a ?? 0) - (b ?? 0));
    return (pairs ?? []).filter((p) => layers.indexOf(p.layer_b) === layers.indexOf(p.layer_a) + 1).sort((a, b) => (a.layer_a ?? 0) - (b.layer_a ?? 0));
  }, [pairs]);
  const least = steps.reduce<Pair | null>((least, p) => (p.cosine !== null && (least?.cosine ?? 2) > p.cosine ? p : least), null);
  if (error) return <Problem error={error} while="Compare the layers" />;
  if (!pairs) return busy ? <Busy what="Comparing the layers" far={far} /> : null;
  return (
    <>
      <h3>Cosine with the layer before</h3>
      <Chart name="Mean cosine of a row with the same row one layer before, by layer" x={steps.map((p) => p.layer_b ?? 0)} series={[{ label: 'cosine', values: steps.map((p) => p.cosine) }]} xLabel="layer" height={150} />
      {least && <p class="quiet" data-turn={least.layer_b}>Least at layer {least.layer_b}: {shown(least.cosine ?? NaN)}. Every pair of layers is in <a href={formatAddress({ view: 'structure', args: { run } })}>Structure</a>.</p>}
    </>
  );
}

function Outliers({ list, error, busy, far }: { list: Outlier[] | null; error: EngineError | null; busy: boolean; far: Far | null }) {
  const top = useMemo(() => (list ?? []).filter((o) => o.kind !== 'dead').sort((a, b) => (b.absmax ?? 0) - (a.absmax ?? 0)).slice(0, SHOWN), [list]);
  const dead = useMemo(() => {
    const byLayer = new Map<string, number>();
    for (const o of list ?? []) if (o.kind === 'dead') byLayer.set(rowName(o.site), (byLayer.get(rowName(o.site)) ?? 0) + 1);
    return [...byLayer];
  }, [list]);
  if (error) return <Problem error={error} while="Look for outliers" />;
  if (!list) return busy ? <Busy what="Looking for outliers" far={far} /> : null;
  return (
    <>
      <h3>Dimensions that stand out</h3>
      {top.length === 0 ? <p>None: no dimension is massive or an outlier.</p> : (
        <>
          <p class="quiet">{list.filter((o) => o.kind === 'massive').length} massive, {list.filter((o) => o.kind === 'outlier').length} outliers{list.length > SHOWN ? `; the ${top.length} greatest:` : ':'}</p>
          <table class="list"><thead><tr><th scope="col">site</th><th scope="col">dimension</th><th scope="col">kind</th><th scope="col">greatest</th><th scope="col">mean</th><th scope="col">rms over the median's</th><th scope="col">share of rows</th></tr></thead>
            <tbody>{top.map((o) => <tr key={`${o.site} ${o.dim}`}><th scope="row">{rowName(o.site)}</th><td class="number">{o.dim}</td><td>{o.kind}</td><td class="number">{shown(o.absmax ?? NaN)}</td><td class="number">{shown(o.mean ?? NaN)}</td><td class="number">{shown(o.ratio ?? NaN)}</td><td class="number">{o.share === null ? '' : `${(100 * o.share).toFixed(1)} %`}</td></tr>)}</tbody></table>
        </>
      )}
      <p>{dead.length === 0 ? 'No dimension is dead.' : `Dead, 0 in every row: ${dead.map(([layer, n]) => `${n} in ${layer}`).join(', ')}.`}</p>
    </>
  );
}

function Router({ loads }: { loads: Load[] }) {
  const layers = [...new Set(loads.map((l) => l.layer ?? 0))].sort((a, b) => a - b);
  const experts = Math.max(...loads.map((l) => l.expert)) + 1;
  const grid = useMemo(() => {
    const values = new Float32Array(layers.length * experts).fill(NaN);
    for (const l of loads) values[layers.indexOf(l.layer ?? 0) * experts + l.expert] = l.load ?? NaN;
    return { width: experts, height: layers.length, values, kinds: Uint8Array.from(values, (v) => (Number.isNaN(v) ? 7 : 0)) };
  }, [loads]);
  return (
    <>
      <h3>Load of the experts</h3>
      <div class="router"><HeatMap name="Load of experts: a row per layer, a column per expert; 1 is balanced" grid={grid} scale={{ ...fit(grid.values), low: 0 }} unit="load" rowLabel={(row) => String(layers[row])} rowName={(row) => `layer ${layers[row]}`} columnName={(e) => `expert ${e}`} /></div>
    </>
  );
}
