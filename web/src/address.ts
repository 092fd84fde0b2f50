// Where the page is: the fragment, as #/VIEW?name=value. It can be shared, and never reaches a server. A token is taken out of it at once.
import { useEffect, useState } from 'preact/hooks';

export interface Address {
  view: string;
  args: Record<string, string>;
}

export function parseAddress(fragment: string): Address {
  const [path = '', query = ''] = fragment.replace(/^#\/?/, '').split('?', 2);
  return { view: path || 'now', args: Object.fromEntries(new URLSearchParams(query)) };
}

export function formatAddress({ view, args }: Address): string {
  const given = Object.entries(args).filter(([, value]) => value !== '');
  const query = new URLSearchParams(given).toString().replaceAll('%2C', ',').replaceAll('%3A', ':').replaceAll('*', '*');
  return `#/${view}${query ? `?${query}` : ''}`;
}

/** Takes the token out of the fragment, if there is one: `#token=T`, or among a view's arguments. */
export function takeToken(): string {
  const fragment = location.hash;
  const bare = /^#token=([\x21-\x7e]+)$/.exec(fragment);
  if (bare) {
    history.replaceState(null, '', location.pathname);
    return decodeURIComponent(bare[1] ?? '');
  }
  const address = parseAddress(fragment);
  const token = address.args['token'] ?? '';
  if (token) {
    delete address.args['token'];
    history.replaceState(null, '', formatAddress(address));
  }
  return token;
}

/** Goes to another place; `quietly` replaces this one in the history (a cursor that moves). */
export function go(to: Address, quietly = false): void {
  const fragment = formatAddress(to);
  if (fragment === location.hash) return;
  if (quietly) history.replaceState(null, '', fragment);
  else history.pushState(null, '', fragment);
  dispatchEvent(new HashChangeEvent('hashchange'));
}

export function useAddress(): Address {
  const [address, set] = useState(() => parseAddress(location.hash));
  useEffect(() => {
    const changed = () => set(parseAddress(location.hash));
    addEventListener('hashchange', changed);
    addEventListener('popstate', changed);
    if (formatAddress(parseAddress(location.hash)) !== formatAddress(address)) changed(); // it moved before anybody listened
    return () => {
      removeEventListener('hashchange', changed);
      removeEventListener('popstate', changed);
    };
  }, []);
  return address;
}
