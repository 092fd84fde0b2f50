// The engine's HTTP API (docs/api.md), asked with a token that stays in this tab.
import { floats } from './dtype';

const TOKEN = 'dmi.token';

export interface Coverage {
  rows: number;
  expired: number;
  complete: boolean;
  outcomes: Record<string, Record<string, number>>;
  ranges?: CoverageRange[];
}
export interface CoverageRange {
  request: string; site: string; first: number; count: number; stride: number; outcome: string; reason: string; level: string; policy: number; attempt: number;
  expired_unix_ns: number;
}
export interface RequestInfo {
  id: string; run: string; session: string; labels: Record<string, string>; tags: string[]; begun_unix_ns: number; ended_unix_ns: number; reason: string;
  positions: number; rows: number; bytes: number; tokens?: number[]; text?: string; pieces?: string[];
}
export interface SiteInfo {
  name: string; aliases: string[]; layer: number | null; axes: string[]; dtype: string; row_shape: number[] | null; rows: number; bytes: number;
}
export interface SessionInfo {
  id: string; number: number; mode: string; text: string; state: string; model: Record<string, unknown>; hooks: string[]; sites: number; begun_unix_ns: number; ended_unix_ns: number;
}
export interface StatsRow {
  request: string | null; site: string; layer: number | null; position: number | null; rows: number; mean: number | null; rms: number | null; min: number | null;
  max: number | null; absmax: number | null; l2: number | null; nonfinite: number; count: number;
}
export interface Occupancy { used: number; capacity: number }
export interface Attached {
  session: string; mode: string; model: string; attached: string; occupancy: Record<string, Occupancy>; steps: number; captured_rows: number; captured_bytes: number;
  other_rows: Record<string, number>; waits: number; wait_ns: number; lag_ns: number;
}
export interface Status {
  engine: { id: string; version: string; uptime_seconds: number; read_only: boolean };
  store: { path: string; segments: number; segment_bytes: number; buffer_bytes: Occupancy; written_bytes: number; durable_lag_seconds: number; disk_free_bytes: number; failure: string };
  books: Coverage; produced: number; rates: { rows_per_second: number; bytes_per_second: number; seconds: number }; bytes: Record<string, number>; attached: Attached[];
  live: { subscribers: number; event_subscribers: number; dropped_rows: number; dropped_events: number } | null;
}
export interface EngineEvent { id: number; time: string; level: string; code: string; session?: string; message: string; count?: number }

/** A tensor as it came. */
export interface Tensor {
  values: Float32Array; shape: number[]; axes: string[]; site: string; dtype: string; positions: [number, number][]; complete: boolean; missing: number; sites: string[];
}

/** What the engine refused, in its own words. */
export class EngineError extends Error {
  constructor(readonly status: number, readonly code: string, message: string, readonly hint: string, readonly coverage?: Coverage) {
    super(message);
  }
}

export type Args = Record<string, string | number | boolean | undefined>;

let token = '';
const refusals = new Set<() => void>();

export function rememberToken(given: string): void {
  if (given) sessionStorage.setItem(TOKEN, given);
  token = given || (sessionStorage.getItem(TOKEN) ?? '');
}

export function forgetToken(): void {
  sessionStorage.removeItem(TOKEN);
  token = '';
}

/** Calls when the engine does not know the token. */
export function onRefused(call: () => void): () => void {
  refusals.add(call);
  return () => refusals.delete(call);
}

export function query(args: Args): string {
  const given = Object.entries(args).filter(([, value]) => value !== undefined && value !== '');
  return new URLSearchParams(given.map(([name, value]) => [name, String(value)])).toString();
}

async function ask(path: string, args: Args, signal?: AbortSignal, accept = ''): Promise<Response> {
  const text = query(args);
  const shown = token;
  let answer: Response;
  try {
    answer = await fetch(`/v1${path}${text ? `?${text}` : ''}`, { headers: { Authorization: `Bearer ${shown}`, ...(accept ? { Accept: accept } : {}) }, signal: signal ?? null, cache: 'no-store' });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new EngineError(0, 'unreachable', 'The engine does not answer.', 'It may have stopped: start `dmi ui` again, and open the address that it prints.');
  }
  if (answer.ok) return answer;
  const body = (await answer.json().catch(() => ({}))) as { error?: { code: string; message: string; hint: string }; coverage?: Coverage };
  if (answer.status === 401 && shown === token) for (const call of refusals) call(); // not for a token that has been replaced meanwhile
  throw new EngineError(answer.status, body.error?.code ?? '', body.error?.message ?? `${path}: ${answer.status} ${answer.statusText}`, body.error?.hint ?? '', body.coverage);
}

/** How far a tool has come: a share of a stage, bytes read and lines found so far. */
export interface Far { stage: string; share: number; bytes: number; lines: number }

/** The lines of a tool that takes a while, which tells meanwhile how far it has come. */
async function find<T>(path: string, args: Args, tell: (far: Far) => void, signal?: AbortSignal): Promise<T[]> {
  const lines: T[] = [];
  let whole = false;
  await readEvents(await ask(path, args, signal, 'text/event-stream'), (name, data) => {
    if (name === 'items') for (const line of data as T[]) lines.push(line);
    else if (name === 'progress') tell({ ...(data as Omit<Far, 'lines'>), lines: lines.length });
    else if (name === 'result') whole = true;
    else if (name === 'error') {
      const failed = data as { code: string; message: string; hint: string };
      throw new EngineError(500, failed.code, failed.message, failed.hint);
    }
  });
  if (!whole) throw new EngineError(0, 'ended', `${path}: the answer broke off.`, 'The engine may have stopped; ask again.');
  return lines;
}

export async function getJSON<T>(path: string, args: Args = {}, signal?: AbortSignal): Promise<T> {
  return (await ask(path, args, signal)).json() as Promise<T>;
}

/** Answers of tools that read a whole run, the latest last. While nothing is captured they stay the same; a reload asks again. */
const remembered = new Map<string, unknown[]>();
const MOST_REMEMBERED = 64;

let capturing = true;

/** Says whether any session is attached: what was remembered of one that was is no longer true. */
export function setCapturing(now: boolean): void {
  if (now !== capturing) remembered.clear();
  capturing = now;
}

/** As getList, from memory where it was asked before and nothing has been captured since; who gives `tell` hears how far it has come. */
export async function getListOnce<T>(path: string, args: Args, signal?: AbortSignal, tell?: (far: Far) => void): Promise<T[]> {
  const key = `${path}?${query(args)}`;
  const known = remembered.get(key) as T[] | undefined;
  if (known) return known;
  const before = capturing;
  const list = await (tell ? find<T>(path, args, tell, signal) : getList<T>(path, args, signal));
  if (!before && !capturing) {
    remembered.set(key, list);
    for (const oldest of remembered.keys()) if (remembered.size > MOST_REMEMBERED) remembered.delete(oldest);
  }
  return list;
}

export async function getList<T>(path: string, args: Args = {}, signal?: AbortSignal): Promise<T[]> {
  const all: T[] = [];
  for (let after = ''; ; ) {
    const page = (await (await ask(path, { ...args, after: after || undefined }, signal)).json()) as { items: T[]; next: string | null };
    all.push(...page.items);
    if (!page.next) return all;
    after = page.next;
  }
}

export async function getTensor(path: string, args: Args, signal?: AbortSignal): Promise<Tensor> {
  const answer = await ask(path, args, signal);
  const header = (name: string) => answer.headers.get(name) ?? '';
  const dtype = header('Dmi-Dtype');
  return {
    values: floats(dtype, await answer.arrayBuffer()), dtype, site: header('Dmi-Site'), complete: header('Dmi-Complete') !== 'false', missing: Number(header('Dmi-Missing')),
    shape: header('Dmi-Shape').split(',').filter(Boolean).map(Number), axes: header('Dmi-Axes').split(',').filter(Boolean),
    positions: header('Dmi-Positions').split(',').filter(Boolean).map((part) => part.split(':').map(Number) as [number, number]),
    sites: header('Dmi-Sites').split(',').filter(Boolean).map(decodeURIComponent),
  };
}

/** What a download needs: the bytes, as the engine sends them. */
export async function getBlob(path: string, args: Args): Promise<Blob> {
  return (await ask(path, args)).blob();
}

/** Follows Server-Sent Events until the signal, again after a break; `broken` is told why, and null when it goes on. */
export async function follow(path: string, args: Args, each: (name: string, data: unknown) => void, broken: (why: EngineError | null) => void, signal: AbortSignal): Promise<void> {
  for (let wait = 250; !signal.aborted; wait = Math.min(wait * 2, 5000)) {
    try {
      const answer = await ask(path, args, signal);
      broken(null);
      wait = 250;
      await readEvents(answer, each);
      broken(new EngineError(0, 'ended', 'The stream has ended.', 'The engine has stopped; what it stored can still be looked at.'));
    } catch (error) {
      if (signal.aborted) return;
      broken(error instanceof EngineError ? error : new EngineError(0, 'unreachable', 'The stream broke off.', ''));
    }
    await new Promise((done) => setTimeout(done, wait));
  }
}

async function readEvents(answer: Response, each: (name: string, data: unknown) => void): Promise<void> {
  const reader = answer.body?.pipeThrough(new TextDecoderStream()).getReader();
  if (!reader) return;
  let rest = '';
  let name = '';
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split('\n');
      rest = lines.pop() ?? '';
      for (const line of lines) {
        if (line.startsWith('event: ')) name = line.slice(7);
        else if (line.startsWith('data: ')) each(name, JSON.parse(line.slice(6)));
      }
    }
  } finally {
    void reader.cancel().catch(() => undefined); // where `each` has had enough
  }
}
