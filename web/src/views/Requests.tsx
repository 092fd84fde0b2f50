// The way into a store: its requests, the newest first.
import { formatAddress } from '../address';
import { getJSON, getList, type RequestInfo, type SessionInfo } from '../engine';
import { useEffect, useState } from 'preact/hooks';
import { useAsked } from '../parts/asked';
import { Busy, Problem, size } from '../parts/Problem';
import { usePath, useStore } from '../parts/store';
import { quote, shell, Take } from '../parts/Take';
import type { RunInfo } from './runs';

const PAGE = 100;

/** A request, and by what people know it: labels and tags of its own and of its run, and the model. */
export interface Listed extends RequestInfo { names: string[]; model: string }

// What runs are called and sessions observe does not change: it is asked for once.
const runs = new Map<string, RunInfo>();
const sessions = new Map<string, SessionInfo>();

async function know<T extends { id: string }>(known: Map<string, T>, path: string, ids: string[], signal: AbortSignal): Promise<void> {
  if (ids.every((id) => known.has(id))) return;
  for (const one of await getList<T>(path, {}, signal)) known.set(one.id, one);
}

/** What a session observed, in a few words: the model, its class and dtype. */
export const modelOf = (session: string): string => [...new Set(['name', 'class', 'dtype'].flatMap((key) => { const v = sessions.get(session)?.model[key]; return typeof v === 'string' ? [v] : []; }))].join(', ');

export function useRequests(every = 0) {
  return useAsked(async (signal): Promise<Listed[]> => {
    const { items } = await getJSON<{ items: RequestInfo[] }>('/requests', { latest: PAGE, limit: PAGE }, signal);
    await Promise.all([know(runs, '/runs', items.map((r) => r.run), signal), know(sessions, '/sessions', items.map((r) => r.session), signal)]);
    return items.reverse().map((r) => {
      const run = runs.get(r.run);
      return { ...r, model: modelOf(r.session), names: [...new Set([...Object.entries({ ...run?.labels, ...r.labels }).map(([k, v]) => `${k}: ${v}`), ...[...(run?.tags ?? []), ...r.tags].map((tag) => `#${tag}`)])] };
    });
  }, [], every);
}

/** A request's name in a list to choose from. */
export const requestTitle = (r: Listed): string => [r.id, ...r.names, ...(sessions.size > 1 ? [r.model] : [])].join(' · ');

const ENDING = 72; // characters
const endings = new Map<string, string>();

/** How the text of each request ends, where it was kept: asked for when the list stands, a few at a time; of one that goes on, what it was. */
function useEndings(list: Listed[] | null): Map<string, string> {
  const [, redraw] = useState(0);
  const ids = (list ?? []).map((r) => r.id).join();
  useEffect(() => {
    const abort = new AbortController();
    const wanted = (list ?? []).filter((r) => !endings.has(r.id));
    const some = async () => {
      for (let r = wanted.shift(); r && !abort.signal.aborted; r = wanted.shift()) {
        const { pieces, text } = await getJSON<RequestInfo>(`/requests/${encodeURIComponent(r.id)}`, {}, abort.signal);
        const whole = text ?? pieces?.join('') ?? '';
        endings.set(r.id, (whole.length > ENDING ? '…' : '') + whole.slice(-ENDING).replaceAll('\n', '⏎'));
        redraw((n) => n + 1);
      }
    };
    void Promise.allSettled([some(), some(), some(), some()]);
    return () => abort.abort();
  }, [ids]);
  return endings;
}

export function Requests() {
  const path = usePath();
  const live = useStore()?.attached.length ?? 0;
  const { value, error, busy } = useRequests(live ? 2000 : 0);
  const ends = useEndings(value);
  if (error && !value) return <Problem error={error} while="List the requests" />;
  if (!value) return <Busy what="Listing requests" />;
  if (value.length === 0) return <Empty />;
  return (
    <section aria-busy={busy}>
      <h2>Requests</h2>
      <p class="quiet">{value.length < PAGE ? (value.length === 1 ? 'The only one.' : `All ${value.length}, newest first.`) : `The latest ${PAGE}, newest first.`}</p>
      <table class="list">
        <thead><tr><th scope="col">request</th><th scope="col">begun</th><th scope="col">tokens</th><th scope="col">captured</th><th scope="col">labels</th><th scope="col">model</th><th scope="col">its text ends</th><th scope="col">look at</th></tr></thead>
        <tbody>
          {value.map((r) => (
            <tr key={r.id}>
              <th scope="row"><a href={formatAddress({ view: 'request', args: { id: r.id } })}>{r.id}</a></th>
              <td class="time">{new Date(r.begun_unix_ns / 1e6).toLocaleString()}{r.ended_unix_ns ? '' : ' (goes on)'}</td>
              <td class="number">{r.positions}</td>
              <td class="number">{size(r.bytes)}</td>
              <td>{r.names.join(', ')}</td>
              <td>{r.model}</td>
              <td class="ending">{ends.get(r.id) ?? ''}</td>
              <td><a href={formatAddress({ view: 'attention', args: { id: r.id } })} aria-label={`attention of ${r.id}`}>attention</a></td>
            </tr>
          ))}
        </tbody>
      </table>
      <Take python={`import dmi\nstore = dmi.open(${quote(path)})\nrows = store.requests(latest=${PAGE})`} cli={`dmi requests --store ${shell(path)} --latest ${PAGE}`}
        file={{ name: 'requests.json', path: '/requests', args: { latest: PAGE, limit: PAGE } }} />
    </section>
  );
}

export function Empty() {
  return (
    <section class="empty">
      <h2>Nothing was captured yet</h2>
      <p>This store has no request. Attach a model to it:</p>
      <pre tabIndex={0}>{`import dmi\nsession = dmi.attach(model, hooks=["blocks.*.hook_resid_post"], store=STORE)`}</pre>
      <p>The page shows the first request as soon as it comes.</p>
    </section>
  );
}
