// What surrounds every view: where one can go, what runs, light or dark, and the way in for those who have no token yet.
import { useEffect, useErrorBoundary, useState } from 'preact/hooks';
import { formatAddress, useAddress, type Address } from './address';
import { forgetToken, getJSON, onRefused, rememberToken, setCapturing, type Status } from './engine';
import { useAsked } from './parts/asked';
import { Problem } from './parts/Problem';
import { StoreContext } from './parts/store';
import { Attention } from './views/Attention';
import { Compare } from './views/Compare';
import { Now } from './views/Now';
import { Request } from './views/Request';
import { Requests } from './views/Requests';
import { Statistics } from './views/Statistics';
import { Structure } from './views/Structure';

const views: { name: string; title: string; key: string; show: (address: Address) => preact.JSX.Element; carries: boolean }[] = [
  { name: 'now', title: 'Now', key: 'n', show: (address) => <Now address={address} />, carries: false },
  { name: 'requests', title: 'Requests', key: 'l', show: () => <Requests />, carries: false },
  { name: 'request', title: 'Request', key: 'r', show: (address) => <Request address={address} />, carries: true },
  { name: 'attention', title: 'Attention', key: 'a', show: (address) => <Attention address={address} />, carries: true },
  { name: 'statistics', title: 'Statistics', key: 's', show: (address) => <Statistics address={address} />, carries: true },
  { name: 'structure', title: 'Structure', key: 't', show: (address) => <Structure address={address} />, carries: true },
  { name: 'compare', title: 'Compare', key: 'c', show: (address) => <Compare address={address} />, carries: true },
];

export function Shell() {
  const address = useAddress();
  const [refused, setRefused] = useState(false);
  const [attempt, setAttempt] = useState(0);
  useEffect(() => onRefused(() => setRefused(true)), []);
  const status = useAsked((signal) => getJSON<Status>('/status', {}, signal), [attempt], 2000);
  useEffect(() => {
    if (status.value) setCapturing(status.value.attached.length > 0);
  }, [status.value]);
  const view = views.find((v) => v.name === address.view) ?? views[0];
  useEffect(() => {
    if (view) document.title = `${view.title} · DMI`;
  }, [view]);
  useEffect(() => {
    const keyed = (event: KeyboardEvent) => {
      const target = event.target as HTMLElement;
      if (event.ctrlKey || event.metaKey || event.altKey || ['INPUT', 'SELECT', 'TEXTAREA'].includes(target.tagName)) return;
      const to = views.find((v) => v.key === event.key);
      if (to) document.querySelector<HTMLAnchorElement>(`nav a[data-view="${to.name}"]`)?.click();
    };
    addEventListener('keydown', keyed);
    return () => removeEventListener('keydown', keyed);
  }, []);
  if (refused) return <Door onToken={(token) => { rememberToken(token); setRefused(false); setAttempt((n) => n + 1); }} />;
  return (
    <StoreContext.Provider value={status.value}>
      <a class="skip" href="#main" onClick={(event) => { event.preventDefault(); document.getElementById('main')?.focus(); }}>Skip to the view</a>
      <header>
        <h1>DMI</h1>
        <nav aria-label="views">
          {views.map((v) => (
            <a key={v.name} data-view={v.name} href={formatAddress({ view: v.name, args: v.carries && address.args['id'] ? { id: address.args['id'] } : {} })} aria-current={v === view ? 'page' : undefined}
              title={`key: ${v.key}`} aria-keyshortcuts={v.key}>{v.title}</a>
          ))}
        </nav>
        <span class="quiet state" data-state={status.error ? 'broken' : status.value?.attached.length ? 'live' : 'stored'}>
          {status.error ? 'no answer' : status.value?.attached.length ? `live: ${status.value.attached.length} ${status.value.attached.length === 1 ? 'session' : 'sessions'}` : status.value ? 'stored' : ''}
        </span>
        <Theme />
      </header>
      <main id="main" tabIndex={-1}>
        {status.error && <Problem error={status.error} while="Ask the engine" />}
        {status.value?.store.failure && <p class="problem" role="alert">The store has a problem: {status.value.store.failure}</p>}
        {view && <Boundary key={[view.name, attempt, ...['id', 'run', 'a', 'b'].map((name) => address.args[name])].join(' ')}>{view.show(address)}</Boundary>}
      </main>
      <footer class="quiet">Keys: {views.map((v, i) => <span key={v.name}>{i ? ', ' : ''}<kbd>{v.key}</kbd> {v.title}</span>)}; in maps arrows, <kbd>Enter</kbd>, <kbd>+</kbd> and <kbd>-</kbd>.</footer>
    </StoreContext.Provider>
  );
}

/** A view that fails takes nothing else with it. */
function Boundary({ children }: { children: preact.ComponentChildren }) {
  const [error, reset] = useErrorBoundary();
  if (error) return <div class="problem" role="alert"><strong>This view failed: {String(error)}</strong><p><button type="button" onClick={reset}>Try again</button></p></div>;
  return <>{children}</>;
}

function Theme() {
  const [theme, set] = useState(() => localStorage.getItem('dmi.theme') ?? '');
  useEffect(() => {
    document.documentElement.dataset['theme'] = theme;
    if (theme) localStorage.setItem('dmi.theme', theme);
    else localStorage.removeItem('dmi.theme');
    dispatchEvent(new Event('dmi-theme'));
  }, [theme]);
  return (
    <label class="theme">colours
      <select value={theme} onChange={(event) => set(event.currentTarget.value)}>
        <option value="">as the system</option><option value="light">light</option><option value="dark">dark</option>
      </select>
    </label>
  );
}

function Door({ onToken }: { onToken: (token: string) => void }) {
  const [text, setText] = useState('');
  useEffect(forgetToken, []);
  return (
    <main class="door">
      <h1>DMI</h1>
      <p>This page needs a token: open the address that <code>dmi ui</code> printed, or paste its token. (The store's own token, for an engine that serves this page itself, is in the file <code>token</code> of the store.)</p>
      <form onSubmit={(event) => { event.preventDefault(); if (text.trim()) onToken(text.trim()); }}>
        <label>token <input type="password" autocomplete="off" value={text} onInput={(event) => setText(event.currentTarget.value)} /></label>
        <button type="submit">Open</button>
      </form>
    </main>
  );
}
