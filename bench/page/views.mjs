// Opens every view of a store that main.go made, cold and warm, and prints how long each took until it was drawn: a list of figures, as JSON.
//   node bench/page/views.mjs STORE LONG_REQUEST SHORT_REQUEST_PREFIX ATTENDED_REQUEST TOKENS ATTENDED
import { launch, openTab, startPage } from '../../web/test/world.mjs';

const [store, long, short, looking] = process.argv.slice(2);
const [tokens, attended] = process.argv.slice(6).map(Number); // of the long request, and of that with attention
const [run, lookingRun] = [long, looking].map((id) => id.split('.')[0]);
const figures = [];
const note = (metric, value, unit, goal = {}) => {
  figures.push({ metric, value: Math.round(value * 10) / 10, unit, ...goal });
  console.error(`${metric}: ${value.toFixed(1)} ${unit}`);
};

// What stands on the screen when a view is complete.
const map = (columns, word = '') => `document.querySelector('.heat-cells[data-columns="${columns}"]') && document.querySelector('.legend').textContent.includes('${word}')`;
const views = [
  ['requests', '#/requests', `document.querySelectorAll('tbody tr').length === 100`],
  [`request of ${tokens.toLocaleString('en')} tokens`, `#/request?id=${long}&stat=l2`, map(tokens, 'l2')],
  ['the same, another statistic', `#/request?id=${long}&stat=absmax`, map(tokens, 'absmax')],
  ['a cell of it', `#/request?id=${long}&stat=absmax&cell=blocks.20.hook_resid_post:${tokens >> 1}`, `document.querySelector('.vector [data-norm]')`],
  ['one of 10,000 requests', `#/request?id=${short}77`, map(4)],
  ['statistics of the run', `#/statistics?run=${run}`, `document.querySelector('dd[data-norm]') && document.body.textContent.includes('dead') && document.querySelector('[data-turn]')`],
  ['structure of the run', `#/structure?run=${run}`, `document.querySelector('.heat-cells[data-columns="36"]')`],
  [`attention of 36 x 32 heads, ${attended} tokens`, `#/attention?id=${looking}&layer=20&head=3`, `document.querySelector('.heat-cells[data-columns="${attended}"]') && document.querySelector('.thumbs-canvas') && document.querySelector('[data-kind]').textContent.includes('score')`],
  ['kinds of 36 x 32 heads', `#/structure?run=${lookingRun}`, `document.querySelector('.split .heat-cells[data-columns="32"]') && document.querySelector('[data-head]')`],
  ['two requests compared', `#/compare?a=${short}1&b=${short}2`, map(4)],
  ['now', '#/now', `document.body.textContent.includes('No model is attached')`],
];

/** Milliseconds from `from` (0: the navigation) until a condition holds and a frame with it was drawn. */
const drawn = (tab, hash, ready) => tab.evaluate(({ hash, ready }) => new Promise((done, fail) => {
  const begun = hash ? performance.now() : 0;
  if (hash) location.hash = hash;
  const holds = new Function(`return Boolean(${ready})`);
  const look = () => {
    if (performance.now() - begun > 300_000) fail(new Error(`not drawn: ${ready}: ${document.body.innerText.slice(0, 500)}`));
    else if (holds()) requestAnimationFrame(() => setTimeout(() => done(performance.now() - begun)));
    else requestAnimationFrame(look);
  };
  requestAnimationFrame(look);
}), { hash, ready });

const browser = await launch();
const page = await startPage(store);
try {
  let tab = await openTab(browser, page);
  note('first view, engine just started', await drawn(tab, '', `document.body.textContent.includes('No model is attached')`), 'ms', { at_most: 1000 });
  for (const [name, hash, ready] of views.slice(0, -1)) note(`${name}, the engine's first time`, await drawn(tab, hash, ready), 'ms');
  await tab.close();
  tab = await openTab(browser, page);
  await drawn(tab, '', `document.querySelector('h2')`);
  for (const [name, hash, ready] of views) {
    const took = [];
    for (let i = 0; i < 5; i++) {
      await drawn(tab, '#/requests', views[0][2]);
      if (name === 'requests') await drawn(tab, '#/now', views.at(-1)[2]);
      took.push(await drawn(tab, hash, ready));
    }
    note(`${name}, warm, median of 5`, took.sort((a, b) => a - b)[2], 'ms', { at_most: 300 });
  }
  // Panning: as many wheel events as there are frames, each of which must move the map.
  await drawn(tab, views[1][1], views[1][2]);
  const { frames, moved, seconds } = await tab.evaluate(() => new Promise((done) => {
    const box = document.querySelector('.heat-box');
    const cells = document.querySelector('.heat-cells');
    for (let i = 0; i < 3; i++) box.dispatchEvent(new KeyboardEvent('keydown', { key: '+', bubbles: true }));
    const begun = performance.now();
    let [frames, moved, last, way] = [0, 0, '', 40];
    const frame = () => {
      frames++;
      if (cells.dataset.x0 !== last) moved++;
      else if (frames > 2) way = -way;
      last = cells.dataset.x0;
      box.dispatchEvent(new WheelEvent('wheel', { deltaX: way, bubbles: true, cancelable: true }));
      if (performance.now() - begun < 5000) requestAnimationFrame(frame);
      else done({ frames, moved, seconds: (performance.now() - begun) / 1000 });
    };
    requestAnimationFrame(frame);
  }));
  note(`panning over 36 layers x ${tokens.toLocaleString('en')} tokens, software rendering`, Math.min(frames, moved + 10) / seconds, 'frames/s', { at_least: 30 });
  const wrong = tab.wrong.filter((text) => !text.includes('404')); // this store has no unembedding for the logit lens, which the page then says
  if (wrong.length) throw new Error(wrong.join('\n'));
} finally {
  await browser.close();
  await page.stop();
}
console.log(JSON.stringify(figures));
