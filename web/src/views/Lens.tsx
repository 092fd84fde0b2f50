// The logit lens of a token: what the model would say if it stopped after a layer, and from which layer on it says what really followed.
import { go } from '../address';
import { shown } from '../colour';
import { getListOnce, type RequestInfo } from '../engine';
import { useAsked } from '../parts/asked';
import { Busy, Problem } from '../parts/Problem';
import { usePath } from '../parts/store';
import { quote, shell, Take } from '../parts/Take';
import { visible } from '../words';

interface Candidate { token: number; probability: number | null; text: string | null }
interface LensRow { site: string; layer: number | null; position: number; top: Candidate[]; entropy: number | null; next: number | null; next_text: string | null; next_rank: number | null; next_probability: number | null }

/** How a token is written: by the vocabulary, else where the request itself has it, else its id. */
function word(request: RequestInfo, id: number, text: string | null): string {
  const at = text === null ? (request.tokens?.indexOf(id) ?? -1) : -1;
  const piece = text ?? request.pieces?.[at];
  return piece === undefined ? `id ${id}` : visible(piece);
}

/** At the chosen cell, or over all layers: that takes a product with the whole unembedding each, so it is asked for. */
export function Lens({ request, site, position, column, args }: { request: RequestInfo; site: string; position: number; column: boolean; args: Record<string, string> }) {
  const path = usePath();
  const asked = { request: request.id, tokens: `${position}:${position + 1}`, ...(column ? {} : { site }) };
  const { value, error, busy, far } = useAsked((signal, tell) => getListOnce<LensRow>('/inspect/lens', asked, signal, tell), [request.id, site, position, column]);
  if (error?.status === 404 || error?.status === 400) return <p class="quiet" data-lens="none">No logit lens here: {error.message}. {error.hint}</p>;
  if (error) return <Problem error={error} while="Compute the logit lens" />;
  if (!value) return busy ? <Busy what="Computing the logit lens" far={far} /> : null;
  const rows = value.toSorted((a, b) => (b.layer ?? 0) - (a.layer ?? 0));
  const last = rows[0];
  if (!last) return <p class="quiet" data-lens="none">No logit lens here: no row of the residual stream was captured for this token.</p>;
  // From the last layer back, as long as the real next token comes first.
  const stays = rows.findIndex((r) => r.next_rank !== 1);
  const knows = stays === 0 ? null : (rows[(stays < 0 ? rows.length : stays) - 1] ?? null);
  const next = last.next === null ? null : <q>{word(request, last.next, last.next_text)}</q>;
  const where = column ? '' : `, site=${quote(site)}`;
  return (
    <section aria-label="logit lens" class="lens" data-lens={column ? (knows?.layer ?? '') : 'cell'} aria-busy={busy}>
      <h3>Logit lens: what the model would say {column ? 'after each layer' : 'if it stopped here'}</h3>
      {next && column && <p>{knows ? <>The real next token {next} is the likeliest from layer <b>{knows.layer}</b> on.</> : <>The model itself does not put the real next token {next} first.</>}</p>}
      <table class="list">
        <thead><tr><th scope="col">after layer</th><th scope="col">likeliest</th><th scope="col">probability</th><th scope="col">then</th><th scope="col">entropy</th><th scope="col">rank of {next ?? 'the next'}</th><th scope="col">its probability</th></tr></thead>
        <tbody>{rows.map((r) => (
          <tr key={r.site} data-layer={r.layer} data-token={r.top[0]?.token} data-rank={r.next_rank}>
            <td class="number">{r.layer}</td><td>{r.top[0] ? <q>{word(request, r.top[0].token, r.top[0].text)}</q> : 'not finite'}</td><td class="number">{shown(r.top[0]?.probability ?? NaN)}</td>
            <td class="quiet">{r.top.slice(1, 4).map((c) => word(request, c.token, c.text)).join(' ')}</td><td class="number">{r.entropy === null ? '' : shown(r.entropy)}</td>
            <td class="number">{r.next_rank ?? ''}</td><td class="number">{r.next_probability === null ? '' : shown(r.next_probability)}</td>
          </tr>
        ))}</tbody>
      </table>
      <p><button type="button" onClick={() => go({ view: 'request', args: { ...args, lens: column ? '' : 'column' } }, true)}>{column ? 'Only the chosen layer' : 'After every layer'}</button></p>
      <Take python={`import dmi\nstore = dmi.open(${quote(path)})\nlens = store.inspect.lens(request=${quote(request.id)}, tokens=${position}${where})`}
        cli={`dmi inspect lens --store ${shell(path)} --request ${shell(request.id)} --tokens ${position}:${position + 1}${column ? '' : ` --site ${shell(site)}`}`} file={{ name: `${request.id}.lens.${position}.json`, path: '/inspect/lens', args: asked }} />
    </section>
  );
}
