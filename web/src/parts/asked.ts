// An answer that a view waits for. What was there before stays on the screen until the next has come.
import { useEffect, useState } from 'preact/hooks';
import { EngineError } from '../engine';

export interface Asked<T> {
  value: T | null;
  error: EngineError | null;
  busy: boolean;
  found: number; // lines of the answer that have come, while it is on its way
}

export function useAsked<T>(ask: (signal: AbortSignal, found: (lines: number) => void) => Promise<T>, inputs: unknown[], every = 0): Asked<T> {
  const [state, set] = useState<Asked<T>>({ value: null, error: null, busy: true, found: 0 });
  useEffect(() => {
    const abort = new AbortController();
    let timer = 0;
    const once = async () => {
      set((s) => ({ ...s, busy: true, found: 0 }));
      try {
        const value = await ask(abort.signal, (found) => { if (!abort.signal.aborted) set((s) => ({ ...s, found })); });
        if (!abort.signal.aborted) set({ value, error: null, busy: false, found: 0 });
      } catch (error) {
        if (abort.signal.aborted) return;
        const said = error instanceof EngineError ? error : new EngineError(0, 'page', String(error), 'This is a bug of the page.');
        set((s) => ({ value: every ? s.value : null, error: said, busy: false, found: 0 }));
      }
      if (every && !abort.signal.aborted) timer = window.setTimeout(once, every);
    };
    void once();
    return () => {
      abort.abort();
      clearTimeout(timer);
    };
  }, inputs);
  return state;
}
