import { useEffect, useState } from 'preact/hooks';
import type { EngineError, Far } from '../engine';

export function Problem({ error, while: what }: { error: EngineError; while?: string }) {
  return (
    <div class="problem" role="alert">
      <strong>{what ? `${what}: ` : ''}{error.message}</strong>
      {error.hint && <p>{error.hint}</p>}
    </div>
  );
}

/** What is waited for; after a second, for how long already, and how far it is. */
export function Busy({ what, far }: { what: string; far?: Far | null }) {
  const [seconds, tick] = useState(0);
  useEffect(() => {
    const timer = setInterval(() => tick((n) => n + 1), 1000);
    return () => clearInterval(timer);
  }, []);
  return (
    <p class="busy"><span role="status">{what} …</span>{seconds > 0 && ` ${seconds} s`}
      {seconds > 0 && far?.stage && (
        <>{', '}<progress max={1} value={far.share} aria-label={`${what}: ${far.stage}`} data-share={far.share} /> {far.stage} {Math.floor(100 * far.share)} %, {size(far.bytes)}{far.lines > 0 && `, ${far.lines} lines so far`}</>
      )}
    </p>
  );
}

export function size(bytes: number): string {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
  let at = 0;
  for (; bytes >= 1024 && at < units.length - 1; at++) bytes /= 1024;
  return `${at ? bytes.toFixed(1) : Math.round(bytes)} ${units[at]}`;
}
