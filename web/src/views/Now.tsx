// What happens now: who runs, how fast, how full everything is, and what passes at every layer and site.
import { useEffect, useMemo, useRef, useState } from 'preact/hooks';
import { formatAddress, go, type Address } from '../address';
import { fit, middle, shown, spans, type Scale } from '../colour';
import { follow, getJSON, type EngineError, type EngineEvent, type Occupancy, type RequestInfo, type StatsRow, type Status } from '../engine';
import { kinds, type Grid } from '../heat/paint';
import { HeatMap, type Cell } from '../heat/HeatMap';
import { useAsked } from '../parts/asked';
import { Chart } from '../parts/Chart';
import { Busy, Problem, size } from '../parts/Problem';
import { usePath } from '../parts/store';
import { quote, shell, Take } from '../parts/Take';
import { kindOf } from '../sites';
import { statistics } from './Request';
import { Empty } from './Requests';

interface LiveMap { session: string; sent_unix_ns: number; seconds: number; tokens: number; dropped: number; sites: StatsRow[] }
interface Point { at: number; tokens: number; bytes: Record<string, number> }

const KEPT = 240; // points of the curves: two minutes
const EVERY = 500; // ms between two points

/** What came last at every site of a session. */
type Latest = Map<string, StatsRow>;

export function Now({ address }: { address: Address }) {
  const path = usePath();
  const status = useAsked((signal) => getJSON<Status>('/status', {}, signal), [], EVERY);
  const requests = useAsked((signal) => getJSON<{ items: RequestInfo[] }>('/requests', { latest: 1, limit: 1 }, signal).then((page) => page.items), [], 2000); // is there any
  const capturing = status.value?.live != null; // else nothing passes here
  const live = useLive(capturing);
  const curves = useCurves(status.value, live.tokens);
  const statistic = address.args['stat'] || 'rms';
  const sessions = status.value?.attached ?? [];
  const session = address.args['session'] || live.latestSession || sessions[0]?.session || '';
  const latest = live.maps.get(session);
  const map = useMemo(() => (latest ? layerMap(latest, statistic) : null), [latest, statistic, live.version]);
  const scale = useSteadyScale(map?.grid.values, `${session} ${statistic}`);
  const chosen = address.args['site'];
  const cursor = chosen && map ? map.find(chosen) : null;
  if (status.error && !status.value) return <Problem error={status.error} while="Ask the engine how it is" />;
  if (!status.value) return <Busy what="Asking the engine" />;
  const s = status.value;
  const newest = requests.value?.[0];
  const moved = [...curves.tokens, ...curves.outcomes].some((curve) => curve.values.some((v) => v > 0)); // of a store at rest there is nothing to draw
  const pressure: [string, Occupancy][] = [['buffer of the store', s.store.buffer_bytes], ...sessions.flatMap((a) => Object.entries(a.occupancy).map(([name, o]): [string, Occupancy] => [`${a.session}: ${name.replaceAll('_', ' ')}`, o]))];
  return (
    <section>
      <h2>Now</h2>
      {requests.value?.length === 0 && sessions.length === 0 && <Empty />}
      {sessions.length === 0 && <p>No model is attached. {newest && <>What was stored is under <a href={formatAddress({ view: 'requests', args: {} })}>Requests</a>. Of the latest, <code>{newest.id}</code>: <Ways id={newest.id} /></>}</p>}
      {sessions.length > 0 && (
        <>
          <table class="list">
            <caption>models that run</caption>
            <thead><tr><th scope="col">session</th><th scope="col">model</th><th scope="col">mode</th><th scope="col">tokens/s</th><th scope="col">forwards</th><th scope="col">captured</th><th scope="col">waits</th><th scope="col">behind the ring</th></tr></thead>
            <tbody>
              {sessions.map((a) => (
                <tr key={a.session}>
                  <th scope="row">{a.session}</th><td>{a.model}</td><td>{a.mode}</td><td class="number" data-tokens={a.session}>{shown(live.rate(a.session))}</td><td class="number">{a.steps}</td>
                  <td class="number">{size(a.captured_bytes)}</td><td class="number">{a.waits ? `${a.waits} (${(a.wait_ns / 1e6).toFixed(0)} ms)` : 0}</td><td class="number">{(a.lag_ns / 1e6).toFixed(1)} ms</td>
                </tr>
              ))}
            </tbody>
          </table>
          {live.broken && <Problem error={live.broken} while="Follow the live values" />}
          <div class="controls">
            <label>statistic
              <select value={statistic} onChange={(event) => go({ view: 'now', args: { ...address.args, stat: event.currentTarget.value } })}>{statistics.map((name) => <option key={name} value={name}>{name}</option>)}</select>
            </label>
            {live.maps.size > 1 && <label>session <select value={session} onChange={(event) => go({ view: 'now', args: { ...address.args, session: event.currentTarget.value } })}>{[...live.maps.keys()].map((id) => <option key={id} value={id}>{id}</option>)}</select></label>}
            <span class="quiet" data-behind={live.behind} data-following={live.following}>{latest ? `drawn ${live.behind.toFixed(0)} ms after the engine sent it; ${live.dropped} rows left out because this page was slow` : live.following ? 'waiting for the next token …' : 'asking for the live values …'}</span>
          </div>
          {map && scale && (
            <div class="livemap"><HeatMap name={`${statistic} of what passed last, a row per kind of site, a column per layer`} grid={map.grid} scale={scale} unit={statistic} height={Math.max(72, map.grid.height * 22)}
              rowLabel={(row) => map.rows[row]?.replace(/^blocks\.\*\.(attn\.|mlp\.)?/, '').replace('hook_', '') ?? ''} columnLabel={(column) => (map.columns[column] ?? '').replace('layer ', '')} columnName={(column) => map.columns[column] ?? ''} cursor={cursor}
              missing={(cell) => (map.name(cell) ? 'no finite element' : 'there is no such site, or nothing of it has passed since the page was opened')}
              onCursor={(cell: Cell) => go({ view: 'now', args: { ...address.args, site: map.name(cell) } }, true)} />
            <Take python={`import dmi\nstore = dmi.open(${quote(path)})\nlast = {}  # ${statistic} of what passed last at every site, as the map has it\nfor came in store.watch(session=${quote(session)}):\n    last |= {row["site"]: row[${quote(statistic)}] for row in came["sites"]}\n    print(last, flush=True)`}
              cli={`dmi tail --map --store ${shell(path)} --session ${shell(session)}`} file={{ name: `${session}.now.csv`, text: () => csvOf(latest) }} /></div>
          )}
        </>
      )}
      {(sessions.length > 0 || moved) && (
        <div class="pair">
          <div>
            <h3>Tokens per second</h3>
            <Chart name="Tokens per second" x={curves.x} series={curves.tokens} height={150} time />
          </div>
          <div>
            <h3>MiB per second by outcome</h3>
            <Chart name="MiB per second by outcome" x={curves.x} series={curves.outcomes} height={150} time />
            <p class="quiet">Captured: <b data-bytes>{size(s.rates.bytes_per_second)}/s</b>. Of rows that were not captured, what they would have taken.</p>
          </div>
        </div>
      )}
      <h3>Books</h3>
      <p>{Object.entries(s.books.outcomes).flatMap(([outcome, reasons]) => Object.entries(reasons).map(([reason, rows]) => `${rows} ${outcome} (${reason})`)).join(', ') || 'No row yet'}.</p>
      <h3>How full</h3>
      <div class="gauges">
        {pressure.map(([name, o]) => (
          <label key={name} class="gauge"><span>{name}</span><meter min={0} max={Math.max(1, o.capacity)} low={o.capacity * 0.6} high={o.capacity * 0.85} optimum={0} value={o.used} /><span class="number">{name.includes('byte') || name.includes('buffer') ? `${size(o.used)} of ${size(o.capacity)}` : `${o.used} of ${o.capacity}`}</span></label>
        ))}
        <p>Disk: {size(s.store.disk_free_bytes)} free, {size(s.store.segment_bytes)} in {s.store.segments} {s.store.segments === 1 ? 'segment' : 'segments'}; the oldest row that is not durable is {s.store.durable_lag_seconds.toFixed(1)} s old.</p>
      </div>
      {capturing && <Events />}
      <Take python={`import dmi\nstore = dmi.open(${quote(path)})\nstatus = store.status()  # sessions, rates, books, how full${capturing ? '; what happens: for event in store.events()' : ''}`}
        cli={`dmi top --store ${shell(path)}${capturing ? `   # and: dmi tail --events --store ${shell(path)}` : ''}`}
        file={{ name: 'now.json', text: () => JSON.stringify({ status: s, per_second: curves }) }} />
    </section>
  );
}

/** From a request to what can be seen of it. */
function Ways({ id }: { id: string }) {
  const ways: [string, string][] = [['request', 'its tokens'], ['attention', 'its attention'], ['statistics', 'statistics of its run'], ['structure', 'what the heads do']];
  return <>{ways.map(([view, title], i) => <span key={view}>{i ? ', ' : ''}<a href={formatAddress({ view, args: { id } })}>{title}</a></span>)}.</>;
}

function csvOf(latest: Latest | undefined): string {
  const head = ['site', 'layer', 'rows', 'mean', 'rms', 'min', 'max', 'absmax', 'l2', 'nonfinite', 'count'] as const;
  return [head.join(), ...[...(latest?.values() ?? [])].map((row) => head.map((name) => row[name] ?? '').join())].join('\n');
}

/** The live stream: of every session what came last, tokens per second, how late it is drawn. */
function useLive(capturing: boolean) {
  const state = useRef({ maps: new Map<string, Latest>(), tokens: new Map<string, { at: number; tokens: number }[]>(), total: 0, dropped: 0, latestSession: '', sent: 0 });
  const [version, redraw] = useState(0);
  const [behind, setBehind] = useState(0);
  const [broken, setBroken] = useState<EngineError | null>(null);
  const [following, setFollowing] = useState(false); // from here on nothing that passes is missed
  useEffect(() => {
    if (!capturing) return;
    const abort = new AbortController();
    let frame = 0;
    const draw = () => {
      frame = 0;
      setBehind(Math.max(0, Date.now() - state.current.sent / 1e6));
      redraw((n) => n + 1);
    };
    void follow('/live/map', {}, (name, data) => {
      if (name !== 'map') return;
      const map = data as LiveMap;
      const own = state.current;
      const latest = own.maps.get(map.session) ?? new Map<string, StatsRow>();
      for (const row of map.sites) latest.set(row.site, row);
      own.maps.set(map.session, latest);
      own.tokens.set(map.session, [...(own.tokens.get(map.session) ?? []).filter((t) => t.at > Date.now() - 3000), { at: Date.now(), tokens: map.tokens }]);
      own.total += map.tokens;
      own.dropped += map.dropped;
      own.latestSession = map.session;
      own.sent = map.sent_unix_ns;
      if (!frame) frame = requestAnimationFrame(draw);
    }, (why) => { setBroken(why); setFollowing(why === null); }, abort.signal);
    return () => {
      abort.abort();
      cancelAnimationFrame(frame);
      setFollowing(false);
    };
  }, [capturing]);
  const rate = (session: string) => (state.current.tokens.get(session) ?? []).filter((t) => t.at > Date.now() - 3000).reduce((sum, t) => sum + t.tokens, 0) / 3;
  const own = state.current;
  return { maps: own.maps, tokens: own.total, dropped: own.dropped, latestSession: own.latestSession, version, behind, following, broken: capturing ? broken : null, rate };
}

/** Curves over the last two minutes, from totals that are asked for twice a second. */
function useCurves(status: Status | null, tokens: number) {
  const points = useRef<Point[]>([]);
  const [curves, set] = useState<{ x: number[]; tokens: { label: string; values: number[] }[]; outcomes: { label: string; values: number[] }[] }>({ x: [], tokens: [{ label: 'tokens', values: [] }], outcomes: [{ label: 'captured', values: [] }] });
  useEffect(() => {
    if (!status) return;
    points.current = [...points.current, { at: Date.now() / 1000, tokens, bytes: status.bytes }].slice(-KEPT);
    const all = points.current;
    const speed = (value: (p: Point) => number) => all.slice(1).map((p, i) => Math.max(0, (value(p) - value(all[i] ?? p)) / Math.max(0.05, p.at - (all[i]?.at ?? p.at - 1))));
    const names = [...new Set(['captured', ...all.flatMap((p) => Object.keys(p.bytes))])];
    set({ x: all.slice(1).map((p) => p.at), tokens: [{ label: 'tokens', values: speed((p) => p.tokens) }], outcomes: names.map((label) => ({ label: label.replace('_', ' '), values: speed((p) => (p.bytes[label] ?? 0) / 2 ** 20) })) });
  }, [status]);
  return curves;
}

/** What came last as a grid of kinds and layers; sites without a layer stand in a last column. */
function layerMap(latest: Latest, statistic: string) {
  const all = [...latest.values()].filter((row) => row.site !== 'tokens');
  const rows = [...new Set(all.map((row) => kindOf(row.site)))].sort();
  const layers = [...new Set(all.flatMap((row) => (row.layer === null ? [] : [row.layer])))].sort((a, b) => a - b);
  const alone = all.some((row) => row.layer === null);
  const width = layers.length + (alone ? 1 : 0);
  const grid: Grid = { width, height: rows.length, values: new Float32Array(width * rows.length).fill(NaN), kinds: new Uint8Array(width * rows.length).fill(kinds.indexOf('nothing')) };
  const names = new Array<string>(width * rows.length).fill('');
  for (const row of all) {
    const at = rows.indexOf(kindOf(row.site)) * width + (row.layer === null ? layers.length : layers.indexOf(row.layer));
    const value = row[statistic as keyof StatsRow];
    grid.values[at] = typeof value === 'number' ? value : NaN;
    grid.kinds[at] = typeof value === 'number' ? 0 : kinds.indexOf('nonfinite');
    names[at] = row.site;
  }
  return {
    grid, rows, columns: [...layers.map((n) => `layer ${n}`), ...(alone ? ['no layer'] : [])], name: (cell: Cell) => names[cell.row * width + cell.column] ?? '',
    find: (site: string): Cell | null => { const at = names.indexOf(site); return at < 0 ? null : { row: Math.floor(at / width), column: at % width }; },
  };
}

/** A scale that only widens, so that colours do not jump from token to token. */
function useSteadyScale(values: Float32Array | undefined, what: string): Scale | null {
  const kept = useRef<{ what: string; scale: Scale } | null>(null);
  if (!values) return null;
  const now = fit(values);
  const old = kept.current?.what === what ? kept.current.scale : null;
  const [least, most] = middle(values) ?? [0, 0];
  if (least === most) return old ?? now; // too few to know of the others to come
  const [low, high] = old && old.map === now.map ? [Math.min(old.low, now.low), Math.max(old.high, now.high)] : [now.low, now.high];
  const scale = { ...now, low, high, log: spans(now.map, low, high) };
  kept.current = { what, scale };
  return scale;
}

function Events() {
  const [list, set] = useState<EngineEvent[]>([]);
  useEffect(() => {
    const abort = new AbortController();
    void follow('/live/events', {}, (name, data) => {
      if (name === 'event') set((old) => [data as EngineEvent, ...old.filter((e) => e.id !== (data as EngineEvent).id)].slice(0, 100));
    }, () => undefined, abort.signal); // the map's stream says what is wrong
    return () => abort.abort();
  }, []);
  return (
    <>
      <h3>Events</h3>
      {list.length === 0 && <p class="quiet">None yet.</p>}
      {list.length > 0 && (
        <div class="events" tabIndex={0} role="region" aria-label="events, the newest first">
          <table class="list">
            <thead><tr><th scope="col">when</th><th scope="col">level</th><th scope="col">what</th><th scope="col">session</th><th scope="col">message</th></tr></thead>
            <tbody>{list.map((e) => <tr key={e.id} data-level={e.level}><td class="time">{new Date(e.time).toLocaleTimeString()}</td><td>{e.level}</td><td>{e.code}</td><td>{e.session ?? ''}</td><td>{e.message}</td></tr>)}</tbody>
          </table>
        </div>
      )}
    </>
  );
}
