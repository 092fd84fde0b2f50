// What hundreds of open pages cost a model that has a core to itself, beside the engine and the pages on another; prints a list of figures, as JSON.
//   taskset -c 1 node bench/page/beside.mjs STORE READERS
// On a core that model and pages share they take each other's time, whatever the engine does (online.mjs has that). A page is what it is to the engine: a reader of /v1/live/map.
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { createInterface } from 'node:readline';
import { environment, startPage, root } from '../../web/test/world.mjs';

const [store, readers] = [process.argv[2], Number(process.argv[3])];
const TOKENS = 200;
const ROUNDS = 6;
const python = process.env.DMI_PYTHON ?? `${root}/.venv/bin/python`;
const talk = (child) => {
  const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
  return async () => JSON.parse((await lines.next()).value);
};
const median = (values) => values.sort((a, b) => a - b)[values.length >> 1];

const engine = spawn(`${root}/bin/dmi`, ['serve', '--store', store, '--exit-with-stdin', '--log-level', 'warning'], { env: environment, stdio: ['pipe', 'pipe', 'inherit'] });
await talk(engine)();
const model = spawn('taskset', ['-c', '0', python, `${root}/bench/page/online.py`, store], { env: environment, stdio: ['pipe', 'pipe', 'inherit'] });
const told = talk(model);
await told();
const page = await startPage(store);
let frames = 0;

/** A reader of the live map, until it is stopped. */
async function reader() {
  const stop = new AbortController();
  const answer = await fetch(`${page.base}/v1/live/map`, { headers: { Authorization: `Bearer ${page.token}` }, signal: stop.signal });
  const ended = (async () => {
    for await (const piece of answer.body) frames += piece.length > 0;
  })().catch(() => undefined);
  return () => (stop.abort(), ended);
}

const ratios = [];
const medians = { alone: [], watched: [] };
try {
  for (let round = 0; round < ROUNDS; round++) {
    for (const [name, count] of round % 2 ? [['watched', readers], ['alone', 0]] : [['alone', 0], ['watched', readers]]) {
      const stops = await Promise.all(Array.from({ length: count }, reader));
      model.stdin.write(`go ${TOKENS}\n`);
      const { forwards_ms } = await told();
      await Promise.all(stops.map((stop) => stop()));
      medians[name].push(median(forwards_ms.slice(20)));
    }
    ratios.push(medians.watched.at(-1) / medians.alone.at(-1));
    console.error(`forward: ${medians.alone.at(-1).toFixed(2)} ms, with ${readers} pages ${medians.watched.at(-1).toFixed(2)} ms`);
  }
  if (frames < readers) throw new Error(`${readers} readers were sent ${frames} pieces: nobody read`);
} finally {
  await page.stop();
  const ended = once(model, 'exit');
  model.stdin.end();
  await ended;
  engine.stdin.end();
}
console.log(JSON.stringify([
  { metric: `forward of a model with a core to itself, with ${readers} pages on another`, value: median(medians.watched), unit: 'ms', baseline: median(medians.alone) },
  { metric: 'the same, against the forward without them: median of rounds', value: median(ratios), unit: 'ratio', at_most: 1.01 },
]));
