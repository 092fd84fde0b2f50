// What the page's tests share: a model that runs, the page's address, a browser, and ways to look at what was drawn.
import { spawn, spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { delimiter, dirname, join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { chromium } from 'playwright-core';

export const root = join(dirname(fileURLToPath(import.meta.url)), '..', '..');
export const dmi = process.env.DMI_BIN ?? join(root, 'bin', 'dmi');
const python = process.env.DMI_PYTHON ?? join(root, '.venv', 'bin', 'python');
export const environment = { ...process.env, PYTHONPATH: join(root, 'python', 'src'), DMI_BIN: dmi, HF_HUB_OFFLINE: '1', PATH: `${dirname(dmi)}:${process.env.PATH}` };
const screenshots = process.env.DMI_SCREENSHOTS;
const patience = 120_000; // ms, with what takes a moment

/** Why these tests cannot run here, or ''. */
export function unable() {
  if (!browserPath()) return 'no Chromium on PATH: apt-get install chromium, or set CHROMIUM to the path of one';
  if (!existsSync(dmi)) return `${dmi} is not built: make setup`;
  return '';
}

const browserPath = () => {
  const onPath = ['chromium', 'chromium-browser', 'google-chrome'].flatMap((name) => (process.env.PATH ?? '').split(delimiter).map((dir) => join(dir, name)));
  return [process.env.CHROMIUM, ...onPath].find((path) => path && existsSync(path));
};

export const launch = () => chromium.launch({ executablePath: browserPath(), args: ['--no-sandbox', '--use-gl=angle', '--use-angle=swiftshader', '--enable-unsafe-swiftshader'] });

export function folder() {
  const dir = mkdtempSync(join(tmpdir(), 'dmi-page-'));
  return { dir, remove: () => rmSync(dir, { recursive: true, force: true }) };
}

/** A program that answers each line it is told with a line of JSON. */
class Conversation {
  constructor(command, args) {
    this.child = spawn(command, args, { env: environment, stdio: ['pipe', 'pipe', 'pipe'] });
    this.errors = '';
    this.child.stderr.on('data', (text) => (this.errors += text));
    this.lines = createInterface({ input: this.child.stdout })[Symbol.asyncIterator]();
    this.ended = new Promise((done) => this.child.on('exit', done));
  }
  async read() {
    const { value, done } = await this.lines.next();
    if (done) throw new Error(`${this.child.spawnargs.join(' ')} ended:\n${this.errors}`);
    return JSON.parse(value);
  }
  async tell(line) {
    this.child.stdin.write(`${line}\n`);
    return this.read();
  }
  async end() {
    this.child.stdin.end();
    await this.ended;
  }
}

/** A small model attached to a store; see session.py for what it can be told. */
export async function startModel(store) {
  const model = new Conversation(python, [join(root, 'web', 'test', 'session.py'), store]);
  const ready = await model.read();
  return Object.assign(model, { session: ready.session });
}

/** `dmi ui` over a store: its address, and the API behind it, asked without the page. */
export async function startPage(store) {
  const child = new Conversation(dmi, ['ui', store, '--json']);
  const door = await child.read();
  const ask = async (path) => {
    const answer = await fetch(`${door.base}/v1${path}`, { headers: { Authorization: `Bearer ${door.token}` } });
    if (!answer.ok) throw new Error(`${path}: ${answer.status} ${await answer.text()}`);
    return answer;
  };
  return {
    ...door, log: () => child.errors,
    json: async (path) => (await ask(path)).json(),
    list: async (path) => (await (await ask(path)).json()).items,
    floats: async (path) => {
      const answer = await ask(path);
      return { shape: answer.headers.get('Dmi-Shape').split(',').map(Number), values: new Float32Array(await answer.arrayBuffer()) };
    },
    stop: async () => {
      child.child.kill('SIGTERM');
      await child.ended;
    },
  };
}

/** A tab that has come in with the token, and notes whatever goes wrong in it. */
export async function openTab(browser, page, options = {}) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 900 }, ...options });
  context.setDefaultTimeout(patience);
  const tab = await context.newPage();
  const wrong = [];
  tab.on('console', (message) => message.type() === 'error' && wrong.push(message.text()));
  tab.on('pageerror', (error) => wrong.push(String(error)));
  tab.on('request', (request) => !/^(data|blob):/.test(request.url()) && !request.url().startsWith(`${page.base}/`) && wrong.push(`asked outside: ${request.url()}`));
  await tab.goto(page.address);
  const visit = async (fragment, ready) => {
    await tab.goto(`${page.base}/${fragment}`);
    await tab.waitForSelector(ready);
  };
  return Object.assign(tab, { wrong, visit });
}

/** Colours [r, g, b] at cells [row, column] of the heat map that a selector finds. */
export function pixels(tab, cells, within = '') {
  return tab.evaluate(({ cells, within }) => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => {
    const canvas = document.querySelector(`${within} .heat-cells`);
    const { rows, x0, x1 } = canvas.dataset;
    const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext('2d');
    copy.drawImage(canvas, 0, 0);
    done(cells.map(([row, column]) => {
      const x = ((column + 0.5 - x0) / (x1 - x0)) * canvas.width;
      const y = ((row + 0.5) / rows) * canvas.height;
      return [...copy.getImageData(Math.floor(x), Math.floor(y), 1, 1).data].slice(0, 3);
    }));
  }))), { cells, within });
}

/** What the legend beside a map says. */
export async function legend(tab, within = '') {
  return tab.evaluate((within) => {
    const box = document.querySelector(`${within} .legend`);
    return { low: Number(box.querySelector('[data-low]').dataset.low), high: Number(box.querySelector('[data-high]').dataset.high), log: box.textContent.includes('logarithmic') };
  }, within);
}

// Viridis and the signed map again, written independently of the page: from the published colours at ten and nine places.
const stops = {
  amount: ['440154', '482878', '3e4a89', '31688e', '26828e', '1f9e89', '35b779', '6ece58', 'b5de2b', 'fde725'],
  signed: ['053061', '2166ac', '4393c3', '92c5de', 'e8edf0', 'f4a582', 'd6604d', 'b2182b', '67001f'],
};

/** The colour that a value should have. */
export function colourOf(value, { low, high, log }) {
  const map = low < 0 ? stops.signed : stops.amount;
  const f = log ? Math.log : (v) => v;
  const share = Math.min(1, Math.max(0, (f(value) - f(low)) / (f(high) - f(low))));
  const at = share * (map.length - 1);
  const from = Math.min(Math.floor(at), map.length - 2);
  return [0, 2, 4].map((c) => {
    const [a, b] = [map[from], map[from + 1]].map((hex) => parseInt(hex.slice(c, c + 2), 16));
    return a + (b - a) * (at - from);
  });
}

export const near = (a, b, by = 6) => a.every((v, i) => Math.abs(v - b[i]) <= by);

/** Waits until checks pass; after two minutes their last failure counts. */
export async function soon(checks) {
  for (const end = Date.now() + patience; ; await new Promise((done) => setTimeout(done, 50))) {
    try {
      return await checks();
    } catch (error) {
      if (Date.now() > end) throw error;
    }
  }
}

export async function picture(tab, name) {
  if (!screenshots) return;
  mkdirSync(screenshots, { recursive: true });
  await tab.screenshot({ path: join(screenshots, `${name}.png`), fullPage: true });
}

/** Runs a command line or a Python text that the page gave, and returns what it printed. */
export function perform(kind, text, cwd, input = '') {
  const run = spawnSync(...(kind === 'cli' ? ['bash', ['-c', text]] : [python, ['-c', text]]), { cwd, env: environment, encoding: 'utf8', input, maxBuffer: 64 << 20 });
  if (run.status !== 0) throw new Error(`${kind} failed with ${run.status}:\n${text}\n${run.stdout}\n${run.stderr}`);
  return run.stdout;
}

/** What an expression is after each Python text, run by itself in a namespace of its own. */
export const evaluate = (all) => JSON.parse(perform('python', `
import json, sys
answers = []
for each in json.load(sys.stdin):
    names = {}
    exec(each["text"], names)
    answers.append(eval(each["expression"], names))
print(json.dumps(answers))`, undefined, JSON.stringify(all)));

/** Runs a command line, or a Python text, meanwhile; ends it when it has printed so many lines, where that is said. */
export function start(kind, text, lines = Infinity) {
  const child = spawn('timeout', ['600', ...(kind === 'cli' ? ['bash', '-c', text] : [python, '-c', text])], { env: environment, stdio: ['ignore', 'pipe', 'pipe'] });
  let [said, complaints] = ['', ''];
  child.stdout.on('data', (text) => {
    said += text;
    if (said.split('\n').length > lines) child.kill();
  });
  child.stderr.on('data', (text) => (complaints += text));
  return new Promise((done) => child.on('exit', () => { if (!said) console.error(complaints); done(said); }));
}
