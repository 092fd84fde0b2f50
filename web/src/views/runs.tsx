// Views over a whole run: which one, and its sites.
import { go, type Address } from '../address';
import { getList, getListOnce, type SiteInfo } from '../engine';
import { useAsked } from '../parts/asked';

export interface RunInfo { id: string; session: string; labels: Record<string, string>; tags: string[]; requests: number; begun_unix_ns: number; ended_unix_ns: number; rows: number; bytes: number }

/** The run of the address, else that of the request of the address, else the latest that holds anything. */
export function useRun(address: Address) {
  const runs = useAsked((signal) => getListOnce<RunInfo>('/runs', {}, signal).then((all) => all.filter((r) => r.rows > 0).reverse()), []);
  const ofRequest = address.args['id']?.replace(/\.[^.]*$/, '');
  const run = address.args['run'] || (runs.value?.some((r) => r.id === ofRequest) ? (ofRequest ?? '') : (runs.value?.[0]?.id ?? ''));
  const sites = useAsked((signal) => (run ? getList<SiteInfo>('/sites', { run }, signal).then((all) => all.filter((s) => s.rows > 0)) : Promise.resolve([])), [run]);
  return { run, runs, sites };
}

export const runTitle = (r: RunInfo): string => [r.id, ...Object.entries(r.labels).map(([name, value]) => `${name}: ${value}`), ...r.tags.map((tag) => `#${tag}`), `${r.requests} ${r.requests === 1 ? 'request' : 'requests'}`].join(' · ');

/** `none` offers to choose no run, in these words. */
export function RunPicker({ address, run, runs, name = 'run', none = '' }: { address: Address; run: string; runs: RunInfo[]; name?: string; none?: string }) {
  return (
    <label>{name}
      <select value={run} onChange={(event) => go({ view: address.view, args: { ...address.args, ...(name === 'run' ? { id: '' } : {}), [name]: event.currentTarget.value } })}>
        {none && <option value="">{none}</option>}
        {run && !runs.some((r) => r.id === run) && <option value={run}>{run}</option>}
        {runs.map((r) => <option key={r.id} value={r.id}>{runTitle(r)}</option>)}
      </select>
    </label>
  );
}
