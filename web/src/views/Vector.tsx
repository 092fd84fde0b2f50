// The vector behind a cell: its norm, the distribution of its elements, its largest dimensions.
import { useMemo } from 'preact/hooks';
import { shown } from '../colour';
import { getTensor, type RequestInfo } from '../engine';
import { useAsked } from '../parts/asked';
import { Chart } from '../parts/Chart';
import { Busy, Problem } from '../parts/Problem';
import { usePath } from '../parts/store';
import { quote, shell, Take } from '../parts/Take';
import { tokenText } from '../words';

const LARGEST = 12;
const BINS = 48;

export interface Summary {
  count: number; nonfinite: number; norm: number; mean: number; std: number; largest: { index: number; value: number }[]; edges: number[]; counts: number[];
}

export function summarise(values: Float32Array): Summary {
  const finite = values.filter(Number.isFinite);
  let [sum, squares, low, high] = [0, 0, Infinity, -Infinity];
  for (const v of finite) {
    sum += v;
    squares += v * v;
    low = Math.min(low, v);
    high = Math.max(high, v);
  }
  const mean = sum / finite.length;
  const counts = new Array<number>(BINS).fill(0);
  const width = (high - low) / BINS || 1;
  for (const v of finite) {
    const bin = Math.min(BINS - 1, Math.floor((v - low) / width));
    counts[bin] = (counts[bin] ?? 0) + 1;
  }
  const largest = Array.from(values, (value, index) => ({ index, value })).filter((e) => Number.isFinite(e.value)).sort((a, b) => Math.abs(b.value) - Math.abs(a.value)).slice(0, LARGEST);
  return { count: values.length, nonfinite: values.length - finite.length, norm: Math.sqrt(squares), mean, std: Math.sqrt(Math.max(0, squares / finite.length - mean * mean)), largest,
    edges: counts.map((_, i) => low + (i + 0.5) * width), counts };
}

export function Vector({ request, site, position, reason }: { request: RequestInfo; site: string; position: number; reason: string }) {
  const path = usePath();
  const asked = useAsked((signal) => (reason ? Promise.resolve(null) : getTensor('/tensor', { request: request.id, site, tokens: String(position), as: 'F32' }, signal)), [request.id, site, position, reason]);
  const summary = useMemo(() => (asked.value ? summarise(asked.value.values) : null), [asked.value]);
  const next = request.pieces?.[position + 1] === undefined && request.tokens?.[position + 1] === undefined ? undefined : tokenText(request, position + 1);
  return (
    <section class="vector" aria-label="vector of the chosen cell">
      <h3><code>{site}</code> at token {position} <q>{tokenText(request, position)}</q></h3>
      {reason && <p class="problem">There is no vector: {reason}.</p>}
      {!reason && asked.error && <Problem error={asked.error} while="Read the vector" />}
      {!reason && !summary && !asked.error && <Busy what="Reading the vector" />}
      {summary && asked.value && (
        <>
          <dl class="facts">
            <div><dt>shape</dt><dd>{asked.value.axes.map((axis, i) => `${axis} ${asked.value?.shape[i]}`).join(' × ')}</dd></div>
            <div><dt>norm</dt><dd data-norm={summary.norm}>{shown(summary.norm)}</dd></div>
            <div><dt>mean</dt><dd>{shown(summary.mean)}</dd></div>
            <div><dt>deviation</dt><dd>{shown(summary.std)}</dd></div>
            <div><dt>not finite</dt><dd>{summary.nonfinite}</dd></div>
            {next !== undefined && <div><dt>the real next token</dt><dd><q>{next}</q></dd></div>}
          </dl>
          <div class="columns">
            <Chart name={`Distribution of the ${summary.count} elements`} x={summary.edges} series={[{ label: 'elements', values: summary.counts }]} bars height={180} xLabel="value" />
            <table class="list">
              <caption>largest elements</caption>
              <thead><tr><th scope="col">{asked.value.shape.length > 2 ? 'element' : 'dimension'}</th><th scope="col">value</th></tr></thead>
              <tbody>{summary.largest.map((e) => <tr key={e.index} data-dim={e.index}><td class="number">{where(e.index, asked.value?.shape ?? [])}</td><td class="number">{shown(e.value)}</td></tr>)}</tbody>
            </table>
          </div>
        </>
      )}
      {reason ? (
        <Take python={`import dmi\ncache = dmi.open(${quote(path)}).cache(request=${quote(request.id)})\nbooks = cache.coverage(${quote(site)})  # what became of each row`} cli={`dmi coverage --store ${shell(path)} --request ${shell(request.id)} --site ${shell(site)}`}
          file={{ name: `${request.id}.${site}.coverage.json`, path: '/coverage', args: { request: request.id, site } }} />
      ) : <Take python={`import dmi\ncache = dmi.open(${quote(path)}).cache(request=${quote(request.id)})\nvector = cache.get(${quote(site)}, tokens=${position})`}
        cli={`dmi get --store ${shell(path)} --request ${shell(request.id)} --site ${shell(site)} --tokens ${position} --out vector.npy`}
        file={{ name: `${request.id}.${site}.${position}.f32`, path: '/tensor', args: { request: request.id, site, tokens: String(position), as: 'F32' } }} />}
    </section>
  );
}

/** Indices of an element within its row: of [heads, d_head] two. */
function where(index: number, shape: number[]): string {
  const inner = shape.slice(1);
  const at: number[] = [];
  for (const n of inner.reverse()) {
    at.unshift(index % n);
    index = Math.floor(index / n);
  }
  return at.join(', ');
}
