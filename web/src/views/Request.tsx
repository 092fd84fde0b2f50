// A request: its tokens, a statistic of every token at every layer, and the vector behind each cell.
import { useEffect, useMemo, useState } from 'preact/hooks';
import { go, type Address } from '../address';
import { fit, place, shown, table } from '../colour';
import { getJSON, getList, getTensor, type Coverage, type RequestInfo, type SiteInfo } from '../engine';
import { HeatMap, type Cell } from '../heat/HeatMap';
import { MissingLegend } from '../heat/Legend';
import { useAsked } from '../parts/asked';
import { Busy, Problem, size } from '../parts/Problem';
import { usePath, useStore } from '../parts/store';
import { quote, shell, Take } from '../parts/Take';
import { describedGrid, isNumeric, kindsOf, rowName, shortRow } from '../sites';
import { tokenText } from '../words';
import { Empty, requestTitle, useRequests, type Listed } from './Requests';
import { Lens } from './Lens';
import { Vector } from './Vector';

export const statistics = ['l2', 'rms', 'absmax', 'mean', 'min', 'max', 'nonfinite'];

/** Which request a view is about: the one of the address, else the latest. */
export function useRequest(address: Address) {
  const latest = useRequests();
  const id = address.args['id'] || latest.value?.[0]?.id || '';
  const live = useStore()?.attached.length ?? 0;
  const request = useAsked((signal) => (id ? getJSON<RequestInfo>(`/requests/${encodeURIComponent(id)}`, {}, signal) : Promise.resolve(null)), [id], live ? 1000 : 0);
  const sites = useAsked((signal) => (id ? getList<SiteInfo>('/sites', { request: id }, signal) : Promise.resolve([])), [id]);
  return { id, latest, request, sites };
}

export function RequestPicker({ id, all, view, args }: { id: string; all: Listed[]; view: string; args: Record<string, string> }) {
  return (
    <label>request
      <select value={id} onChange={(event) => go({ view, args: { ...args, id: event.currentTarget.value, cell: '' } })}>
        {!all.some((r) => r.id === id) && <option value={id}>{id}</option>}
        {all.map((r) => <option key={r.id} value={r.id}>{requestTitle(r)}</option>)}
      </select>
    </label>
  );
}

export function Request({ address }: { address: Address }) {
  const path = usePath();
  const { id, latest, request, sites } = useRequest(address);
  const numeric = useMemo(() => (sites.value ?? []).filter(isNumeric), [sites.value]);
  const kinds = useMemo(() => kindsOf(numeric), [numeric]);
  const site = address.args['site'] || kinds[0] || '';
  const statistic = address.args['stat'] || 'l2';
  const length = request.value?.positions ?? 0;
  const ended = Boolean(request.value?.ended_unix_ns);
  const asked = useAsked(async (signal) => {
    if (!id || !site || length === 0) return null;
    const [tensor, coverage] = await Promise.all([
      getTensor('/grid', { request: id, site, statistic }, signal),
      getJSON<Coverage>('/coverage', { request: id, site }, signal),
    ]);
    return { tensor, site, statistic, ...describedGrid(tensor, coverage.ranges ?? [], length, ended), scale: fit(tensor.values) };
  }, [id, site, statistic, length, ended]);
  const map = { ...asked, value: asked.value?.site === site ? asked.value : null }; // another site's rows are not these
  const args = { id, site, stat: statistic, lens: address.args['lens'] ?? '' };
  const chosen = parseCell(address.args['cell']);
  const cursor: Cell | null = chosen && map.value ? { row: map.value.tensor.sites.indexOf(chosen.site), column: chosen.position } : null;
  const inside = cursor && cursor.row >= 0 ? cursor : null;
  const [lit, setLit] = useState<number | null>(null);
  useEffect(() => setLit(null), [id]);

  if (latest.error && !id) return <Problem error={latest.error} while="List the requests" />;
  if (latest.value?.length === 0 && !id) return <Empty />;
  if (request.error) return <Problem error={request.error} while={`Read request ${id}`} />;
  if (!request.value) return <Busy what="Reading the request" />;
  const r = request.value;
  const open = (cell: Cell, quietly = false) => {
    const name = map.value?.tensor.sites[cell.row];
    if (name) go({ view: 'request', args: { ...args, cell: `${name}:${cell.column}` } }, quietly);
  };
  const token = (position: number) => `token ${position} ${JSON.stringify(tokenText(r, position))}`;
  const row = inside?.row ?? (map.value ? map.value.grid.height - 1 : 0);
  return (
    <section>
      <h2>Request <code>{id}</code></h2>
      <div class="controls">
        <RequestPicker id={id} all={latest.value ?? []} view="request" args={args} />
        <label>site
          <select value={site} onChange={(event) => go({ view: 'request', args: { ...args, site: event.currentTarget.value } })}>
            {!kinds.includes(site) && <option value={site}>{site}</option>}
            {kinds.map((kind) => <option key={kind} value={kind}>{kind}</option>)}
          </select>
        </label>
        <label>statistic
          <select value={statistic} onChange={(event) => go({ view: 'request', args: { ...args, stat: event.currentTarget.value, cell: address.args['cell'] ?? '' } })}>
            {statistics.map((name) => <option key={name} value={name}>{name}</option>)}
          </select>
        </label>
        <a href={`#/attention?id=${encodeURIComponent(id)}`}>attention</a>
        <span class="quiet">{r.positions} tokens, {size(r.bytes)}{r.ended_unix_ns ? '' : ', goes on'}</span>
      </div>
      <Tokens request={r} values={map.value ? map.value.grid.values.subarray(row * map.value.grid.width, (row + 1) * map.value.grid.width) : null} label={map.value ? rowName(map.value.tensor.sites[row] ?? '') : ''}
        statistic={map.value?.statistic ?? statistic} selected={inside?.column ?? lit} onSelect={(position) => (map.value ? open({ row, column: position }) : setLit(position))} />
      {map.error && <Problem error={map.error} while={`Draw ${statistic} of ${site}`} />}
      {!map.value && !map.error && <Busy what={`Computing ${statistic} of ${site}`} />}
      {map.value && map.value.grid.width > 0 && (
        <>
          <HeatMap name={`${map.value.statistic} of ${site}, a row per layer, a column per token`} grid={map.value.grid} scale={map.value.scale} unit={map.value.statistic}
            rowLabel={(at) => shortRow(map.value?.tensor.sites[at] ?? '')} rowName={(at) => rowName(map.value?.tensor.sites[at] ?? '')} columnName={token}
            missing={(cell) => map.value?.reason(cell.row, cell.column) ?? ''} cursor={inside} onCursor={(cell) => open(cell, true)} onOpen={(cell) => open(cell)} />
          <MissingLegend reasons={map.value.totals} />
        </>
      )}
      {map.value && map.value.grid.width === 0 && <p class="empty">No row of {site} was captured for this request.</p>}
      <Take python={`import dmi\ncache = dmi.open(${quote(path)}).cache(request=${quote(id)})\nrows = cache.stats(${quote(site)})  # a line per row; the column shown: ${quote(statistic)}`}
        cli={`dmi stats --store ${shell(path)} --request ${shell(id)} --site ${shell(site)} --per row`}
        file={{ name: `${id}.${site.replaceAll('*', 'N')}.stats.parquet`, path: '/stats', args: { request: id, site, format: 'parquet' } }} />
      {inside && chosen && <Vector key={`${id} ${chosen.site} ${chosen.position}`} request={r} site={chosen.site} position={chosen.position} reason={map.value?.reason(inside.row, inside.column) ?? ''} />}
      {inside && chosen && !map.value?.reason(inside.row, inside.column) && <Lens request={r} site={chosen.site} position={chosen.position} column={address.args['lens'] === 'column'} args={{ ...args, cell: address.args['cell'] ?? '' }} />}
    </section>
  );
}

export function parseCell(text: string | undefined): { site: string; position: number } | null {
  const at = text?.lastIndexOf(':') ?? -1;
  if (!text || at < 0) return null;
  const position = Number(text.slice(at + 1));
  return Number.isInteger(position) && position >= 0 ? { site: text.slice(0, at), position } : null;
}

const MOST_TOKENS = 512; // each is an element of the page

/** The text, each token on the colour of its value. */
function Tokens({ request, values, label, statistic, selected, onSelect }: {
  request: RequestInfo; values: Float32Array | null; label: string; statistic: string; selected: number | null; onSelect: (position: number) => void;
}) {
  const scale = useMemo(() => (values ? fit(values) : null), [values]);
  const colours = useMemo(() => (scale ? table(scale.map) : null), [scale]);
  const from = Math.max(0, Math.min(Math.floor((selected ?? 0) / MOST_TOKENS) * MOST_TOKENS, request.positions - MOST_TOKENS));
  const count = Math.min(request.positions, MOST_TOKENS);
  const known = request.tokens !== undefined || request.pieces !== undefined;
  return (
    <>
      <div class="tokens" aria-label="tokens" role="group">
        {Array.from({ length: count }, (_, i) => from + i).map((position) => {
          const value = values?.[position];
          const at = scale && value !== undefined && Number.isFinite(value) ? Math.round(place(scale, value) * 255) * 4 : -1;
          const background = at >= 0 && colours ? `rgb(${colours[at]}, ${colours[at + 1]}, ${colours[at + 2]})` : '';
          return (
            <button type="button" key={position} class="token" aria-pressed={position === selected} style={background ? { borderBottomColor: background } : {}}
              title={`token ${position}${request.tokens?.[position] !== undefined ? `, id ${request.tokens[position]}` : ''}${value !== undefined ? `, ${statistic} at ${label} ${shown(value)}` : ''}`}
              onClick={() => onSelect(position)}>{tokenText(request, position)}</button>
          );
        })}
      </div>
      {!known && <p class="quiet">The text of this request was not kept, or the token may not see it: tokens are shown by position.</p>}
      {request.positions > MOST_TOKENS && <p class="quiet">Tokens {from} to {from + count} of {request.positions} are written out; the map shows all.</p>}
    </>
  );
}
