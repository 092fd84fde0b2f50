import { useEffect, useState } from 'preact/hooks';
import type { EngineError } from '../engine';

export function Problem({ error, while: what }: { error: EngineError; while?: string }) {
  return (
    <div class="problem" role="alert">
      <strong>{what ? `${what}: ` : ''}{error.message}</strong>
      {error.hint && <p>{error.hint}</p>}
    </div>
  );
}

/** What is waited for; after a second, for how long already, and how many lines have come. */
export function Busy({ what, found }: { what: string; found?: number }) {
  const [seconds, tick] = useState(0);
  useEffect(() => {
    const timer = setInterval(() => tick((n) => n + 1), 1000);
    return () => clearInterval(timer);
  }, []);
  return <p class="busy"><span role="status">{what} …</span>{seconds > 0 && ` ${seconds} s${found ? `, ${found} lines so far` : ''}`}</p>;
}
