// An answer that a view waits for. What was there before stays on the screen until the next has come.
import { useEffect, useState } from 'preact/hooks';
import { EngineError, type Far } from '../engine';

export interface Asked<T> {
  value: T | null;
  error: EngineError | null;
  busy: boolean;
  far: Far | null; // how far the engine has come, while the answer is on its way and that is known
}

export function useAsked<T>(ask: (signal: AbortSignal, tell: (far: Far) => void) => Promise<T>, inputs: unknown[], every = 0): Asked<T> {
  const [state, set] = useState<Asked<T>>({ value: null, error: null, busy: true, far: null });
  useEffect(() => {
    const abort = new AbortController();
    let timer = 0;
    const once = async () => {
      set((s) => ({ ...s, busy: true, far: null }));
      try {
        const value = await ask(abort.signal, (far) => { if (!abort.signal.aborted) set((s) => ({ ...s, far })); });
        if (!abort.signal.aborted) set({ value, error: null, busy: false, far: null });
      } catch (error) {
        if (abort.signal.aborted) return;
        const said = error instanceof EngineError ? error : new EngineError(0, 'page', String(error), 'This is a bug of the page.');
        set((s) => ({ value: every ? s.value : null, error: said, busy: false, far: null }));
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
