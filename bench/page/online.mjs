// How far the page is behind a model of 1,000 tokens/s, and what hundreds of open pages cost that model; prints a list of figures, as JSON.
//   node bench/page/online.mjs STORE READERS
// The model embeds the time; the page is asked for the greatest embedding, which is that of the last token that it has drawn. The other pages are what a page is to the engine: a reader of /v1/live/map.
import { spawn } from 'node:child_process';
import { createInterface } from 'node:readline';
import { environment, launch, openTab, startPage, root } from '../../web/test/world.mjs';

const [store, readers] = [process.argv[2], Number(process.argv[3])];
const TOKENS = 380; // 19 ms each: the clock stays under 10 s
const ROUNDS = 3;
const python = process.env.DMI_PYTHON ?? `${root}/.venv/bin/python`;
const figures = [];
const note = (metric, value, unit, rest = {}) => {
  figures.push({ metric, value: Math.round(value * 100) / 100, unit, ...rest });
  console.error(`${metric}: ${value.toFixed(2)} ${unit}`);
};
const at = (sorted, share) => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];

const model = spawn(python, [`${root}/bench/page/online.py`, store], { env: environment, stdio: ['pipe', 'pipe', 'inherit'] });
const lines = createInterface({ input: model.stdout })[Symbol.asyncIterator]();
const told = async () => JSON.parse((await lines.next()).value);
await told();
const page = await startPage(store);
const browser = await launch();
let dropped = 0;

/** A reader of the live map, until it is stopped. */
function reader() {
  const stop = new AbortController();
  const answer = fetch(`${page.base}/v1/live/map`, { headers: { Authorization: `Bearer ${page.token}` }, signal: stop.signal });
  const ended = answer.then(async (response) => {
    let rest = '';
    for await (const piece of response.body.pipeThrough(new TextDecoderStream())) {
      const whole = (rest + piece).split('\n');
      rest = whole.pop();
      for (const line of whole) if (line.startsWith('data: ')) dropped += JSON.parse(line.slice(6)).dropped ?? 0;
    }
  }).catch(() => undefined);
  return { open: answer, stop: () => (stop.abort(), ended) };
}

try {
  const tab = await openTab(browser, page);
  await tab.visit('#/now?stat=max&site=hook_embed', '[data-following="true"]');
  const late = [];
  const forwards = { alone: [], watched: [] };
  const speeds = [];
  for (let round = 0; round < ROUNDS; round++) {
    for (const [name, count] of round % 2 ? [['watched', readers], ['alone', 0]] : [['alone', 0], ['watched', readers]]) {
      const others = Array.from({ length: count }, reader);
      await Promise.all(others.map((other) => other.open));
      await tab.evaluate(() => {
        globalThis.seen = [];
        const box = document.querySelector('main');
        globalThis.watch = new MutationObserver(() => {
          const found = / max = ([\d.]+)/.exec(document.querySelector('.readout')?.textContent ?? '');
          if (found && globalThis.seen.at(-1)?.[1] !== Number(found[1])) requestAnimationFrame(() => globalThis.seen.push([Date.now(), Number(found[1])]));
        });
        globalThis.watch.observe(box, { subtree: true, childList: true, characterData: true });
      });
      model.stdin.write(`go ${TOKENS}\n`);
      const { began_unix_ms, tokens_per_second, forwards_ms, outcomes } = await told();
      const seen = await tab.evaluate(() => (globalThis.watch.disconnect(), globalThis.seen));
      await Promise.all(others.map((other) => other.stop()));
      const lags = seen.map(([now, seconds]) => now - began_unix_ms - seconds * 1000).filter((lag) => lag > -5 && lag < 60_000);
      if (lags.length < 20) throw new Error(`the page drew ${lags.length} times: ${JSON.stringify(seen.slice(0, 5))}`);
      // Between two drawings the page shows what the one before showed: it is as far behind as just before the next.
      const held = seen.slice(1).map(([now], i) => now - began_unix_ms - seen[i][1] * 1000).filter((lag) => lag > 0 && lag < 60_000);
      console.error(`${name}: ${lags.length} drawings, the median ${at(lags.sort((a, b) => a - b), 0.5).toFixed(0)} ms after its token; ${tokens_per_second.toFixed(0)} tokens/s; ${JSON.stringify(outcomes)}`);
      if (name === 'alone') late.push(...held);
      forwards[name].push(...forwards_ms.slice(20));
      speeds.push(tokens_per_second);
    }
  }
  late.sort((a, b) => a - b);
  note('speed of the model', Math.min(...speeds), 'tokens/s', { at_least: 1000 });
  note('behind the model, just before each drawing: median', at(late, 0.5), 'ms', { at_most: 250 });
  note('behind the model, just before each drawing: p99', at(late, 0.99), 'ms', { at_most: 250 });
  const [alone, watched] = ['alone', 'watched'].map((name) => at(forwards[name].sort((a, b) => a - b), 0.5));
  note(`forward of the model with ${readers} more pages`, watched, 'ms', { baseline: alone });
  note('rows that readers were too slow for, dropped and counted', dropped, 'rows');
} finally {
  await browser.close();
  await page.stop();
  model.stdin.end();
}
console.log(JSON.stringify(figures));
