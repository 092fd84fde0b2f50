// Every view of a live session, then of the same store when the session has ended, held against the API's own numbers.
import assert from 'node:assert/strict';
import { existsSync, readdirSync, readFileSync, renameSync } from 'node:fs';
import { join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import axe from 'axe-core';
import { colourOf, dmi, environment, evaluate, folder, launch, legend, near, openTab, perform, picture, pixels, root, soon, start, startModel, startPage, unable } from './world.mjs';
import { spawnSync } from 'node:child_process';

const skip = unable();

async function accessible(tab, what) {
  await tab.evaluate(axe.source);
  const { violations } = await tab.evaluate(() => globalThis.axe.run(document, { resultTypes: ['violations'] }));
  assert.deepEqual(violations.map((v) => `${what}: ${v.id}: ${v.nodes.map((n) => n.html.slice(0, 120)).join(' | ')}`), []);
}

/** What "copy" puts on the clipboard, and the file. */
async function take(tab, within = 'main > section > .take') {
  const taken = {};
  for (const [kind, name] of [['python', 'Copy as Python'], ['cli', 'Copy as CLI']]) {
    await tab.locator(within).getByRole('button', { name }).click();
    taken[kind] = await tab.locator(`${within} [data-take="${kind}"]`).innerText();
    await tab.locator(within).getByText('Copied.').waitFor();
    assert.equal(await tab.evaluate(() => navigator.clipboard.readText()), taken[kind]);
  }
  const coming = tab.waitForEvent('download');
  await tab.locator(within).getByRole('button', { name: 'Download the numbers' }).click();
  taken.file = readFileSync(await (await coming).path());
  return taken;
}

describe('the page', { skip: skip || false, timeout: 1_800_000 }, () => {
  let browser, model, page, tab, store, request, repeated, hurt;
  before(async () => {
    store = folder();
    browser = await launch();
    model = await startModel(join(store.dir, 's'));
    page = await startPage(join(store.dir, 's'));
    tab = await openTab(browser, page, { acceptDownloads: true, permissions: ['clipboard-read', 'clipboard-write'] });
  });
  after(async () => {
    await browser?.close();
    await model?.end();
    await page?.stop();
    store?.remove();
  });

  it('takes the token out of the address and keeps it out of paths and logs', async () => {
    await tab.waitForSelector('h2');
    assert.ok(!tab.url().includes(page.token));
    assert.ok(!page.log().includes(page.token));
    const stranger = await browser.newPage();
    await stranger.goto(`${page.base}/#/now`);
    await stranger.waitForSelector('.door');
    await accessible(stranger, 'the door');
    await stranger.getByLabel('token').fill(page.token);
    await stranger.getByRole('button', { name: 'Open' }).click();
    await stranger.waitForSelector('h2:has-text("Now")');
    await stranger.close();
  });

  it('says that nothing was captured yet', async () => {
    await tab.visit('#/requests', '.empty');
    assert.match(await tab.locator('.empty').innerText(), /Nothing was captured yet/);
  });

  it('now: moves as tokens arrive', async (t) => {
    await tab.visit('#/now', '[data-following="true"]');
    await model.tell('forward 6');
    await tab.waitForSelector('.heat-cells[data-rows="4"]');
    // When a forward has ended after silence, and when the page has drawn it; both clocks are this machine's.
    await tab.evaluate(() => {
      globalThis.drawn = [];
      const box = document.querySelector('[data-behind]');
      new MutationObserver(() => requestAnimationFrame(() => globalThis.drawn.push(Date.now()))).observe(box, { attributes: true, attributeFilter: ['data-behind'] });
    });
    const late = [];
    for (let i = 0; i < 8; i++) {
      await new Promise((done) => setTimeout(done, 700));
      const { at, done } = await model.tell('forward 1');
      const first = await tab.waitForFunction((at) => globalThis.drawn.find((when) => when >= at), at / 1e6 - 1); // an earlier forward may still be drawn
      late.push((await first.jsonValue()) - done / 1e6);
    }
    late.sort((a, b) => a - b);
    t.diagnostic(`from the end of a forward to its drawing, ms: median ${late[4].toFixed(0)}, worst ${late[7].toFixed(0)}`); // the goal of 250 is a benchmark's to hold: this machine may be busy
    // What is drawn is, soon, what the engine says of the last row: a forward may come in two parts.
    const [latest] = await page.list('/requests?latest=1');
    const lines = await page.list(`/stats?request=${latest.id}&site=blocks.*.hook_resid_post`);
    assert.equal(lines.length, 4);
    await soon(async () => {
      const scale = await legend(tab);
      assert.equal(await tab.evaluate(() => document.querySelector('.heat-cells').dataset.columns), '5'); // four layers, and the logits
      assert.ok(scale.log, 'whatever came first, kinds of sites that differ this much are told apart'); // of one token every pattern is 1
      const drawn = await pixels(tab, lines.map((line) => [2, line.layer]));
      for (const [i, line] of lines.entries()) assert.ok(near(drawn[i], colourOf(line.rms, scale)), `layer ${line.layer}: ${drawn[i]} for rms ${line.rms} on ${JSON.stringify(scale)}`);
    });
    await accessible(tab, 'now');
    // The live map as a file, and from the command and the Python as they were copied: each says of a site what some request of one token has there.
    const { python, cli, file } = await take(tab, '.livemap .take');
    const csv = file.toString().split('\n').map((line) => line.split(','));
    assert.deepEqual(Object.fromEntries(csv.slice(1).map((line) => [line[0], line[csv[0].indexOf('rms')]])), Object.fromEntries((await page.list(`/stats?request=${latest.id}`)).map((line) => [line.site, String(line.rms)])));
    let over = 0;
    const ended = (said) => (over++, said);
    const [maps, printed] = [start('cli', `${cli} --json -n 3`).then(ended), start('python', python, 2).then(ended)];
    while (over < 2) await model.tell('forward 1'); // until they have come in and seen enough
    const known = new Map();
    for (const { id } of await page.list('/requests')) for (const line of await page.list(`/stats?request=${id}`)) known.set(line.site, (known.get(line.site) ?? new Set()).add(line.rms));
    const seen = (await maps).trim().split('\n').map((text) => JSON.parse(text));
    assert.equal(seen.length, 3);
    for (const { session, sites } of seen) {
      assert.equal(session, model.session);
      for (const line of sites.filter((l) => l.rows === 1)) assert.ok(known.get(line.site).has(line.rms), `${line.site}: no request has rms ${line.rms}`);
    }
    assert.ok(seen.some(({ sites }) => sites.some((line) => line.rows === 1)));
    const last = JSON.parse((await printed).split('\n')[1].replaceAll("'", '"'));
    assert.deepEqual(Object.keys(last).filter((site) => !known.has(site)), []);
    assert.ok(Object.keys(last).length >= 4 && Object.entries(last).some(([site, rms]) => known.get(site).has(rms)), JSON.stringify(last));
    // What is around the map: rates, books, events.
    const whole = await take(tab);
    const { status, per_second } = JSON.parse(whole.file);
    assert.ok(status.attached[0].session === model.session && per_second.tokens[0].values.length > 0);
    const [top, events] = whole.cli.split('# and: ');
    perform('cli', `${top} --once`, store.dir);
    assert.match(perform('cli', `${events} --json -n 1`, store.dir), /"code":"attach"/);
    assert.equal(evaluate([{ text: whole.python, expression: 'status' }])[0].attached[0].session, model.session);
    await picture(tab, 'now');
  });

  it('request: every cell has the colour of its value', async () => {
    ({ request } = await model.tell('generate 24'));
    await tab.visit(`#/request?id=${request}`, '.heat-cells');
    for (const statistic of ['l2', 'mean']) {
      await tab.getByLabel('statistic').selectOption(statistic);
      await tab.waitForFunction((s) => document.querySelector('.legend b')?.textContent === s, statistic);
      const lines = await page.list(`/stats?request=${request}&site=blocks.*.hook_resid_post`);
      assert.equal(lines.length, 4 * 32);
      const scale = await legend(tab);
      const drawn = await pixels(tab, lines.map((l) => [l.layer, l.position]));
      for (const [i, line] of lines.entries()) {
        assert.ok(near(drawn[i], colourOf(line[statistic], scale)), `${statistic} layer ${line.layer} token ${line.position}: ${drawn[i]} for ${line[statistic]} on ${JSON.stringify(scale)}`);
      }
    }
    const { tokens } = await page.json(`/requests/${request}`);
    assert.deepEqual(await tab.locator('.tokens .token').allInnerTexts(), tokens.slice(0, 32).map((id) => `␣w${id}`));
  });

  it('request: a cell opens its vector, by keys alone', async () => {
    await tab.visit(`#/request?id=${request}&site=blocks.*.hook_mlp_out`, '.heat-cells');
    await tab.locator('.heat-box').focus();
    for (const key of ['ArrowRight', 'ArrowRight', 'ArrowDown', 'Enter']) await tab.keyboard.press(key);
    await tab.waitForSelector('.vector [data-norm]');
    assert.match(tab.url(), /cell=blocks\.1\.hook_mlp_out:2/);
    const { values, shape } = await page.floats(`/tensor?request=${request}&site=blocks.1.hook_mlp_out&tokens=2&as=F32`);
    assert.deepEqual(shape, [1, 64]);
    const norm = Math.sqrt(values.reduce((sum, v) => sum + v * v, 0));
    assert.ok(Math.abs(Number(await tab.locator('[data-norm]').getAttribute('data-norm')) / norm - 1) < 1e-6);
    const order = [...values.keys()].sort((a, b) => Math.abs(values[b]) - Math.abs(values[a]));
    assert.deepEqual(await tab.locator('[data-dim]').evaluateAll((rows) => rows.map((r) => Number(r.dataset.dim))), order.slice(0, 12));
    assert.match(await tab.locator('.readout').innerText(), /token 2/);
    const { tokens } = await page.json(`/requests/${request}`);
    assert.equal(await tab.locator('.facts div:has-text("the real next token") dd').innerText(), `␣w${tokens[3]}`);
    await accessible(tab, 'request');
    await picture(tab, 'request');
  });

  it('request: the logit lens of a cell, and of its column', async () => {
    const held = async (lines) => {
      const drawn = await tab.locator('.lens tbody tr').evaluateAll((rows) => rows.map((r) => [r.dataset.layer, r.dataset.token, r.dataset.rank, ...[...r.cells].map((c) => c.innerText)]));
      lines.sort((a, b) => b.layer - a.layer);
      assert.equal(drawn.length, lines.length);
      for (const [i, line] of lines.entries()) {
        const [layer, token, rank, first, word, odds, then, entropy] = drawn[i];
        assert.deepEqual([layer, token, rank, first], [line.layer, line.top[0].token, line.next_rank, line.layer].map(String));
        assert.ok(word.includes(`␣w${line.top[0].token}`) && then === line.top.slice(1, 4).map((c) => `␣w${c.token}`).join(' '), `${word}, ${then}`);
        assert.ok(Math.abs(Number(odds) / line.top[0].probability - 1) < 1e-3 && Math.abs(Number(entropy) / line.entropy - 1) < 1e-3, `${odds}, ${entropy}`);
      }
    };
    await tab.visit(`#/request?id=${request}&site=blocks.*.hook_resid_post&cell=blocks.1.hook_resid_post:12`, '.lens[data-lens="cell"] tbody tr');
    await held(await page.list(`/inspect/lens?request=${request}&site=blocks.1.hook_resid_post&tokens=12:13`));
    await tab.getByRole('button', { name: 'After every layer' }).click();
    await tab.waitForSelector('.lens[data-lens]:not([data-lens="cell"]) tbody tr:nth-child(4)');
    const column = await page.list(`/inspect/lens?request=${request}&tokens=12:13`);
    await held(column);
    const { tokens } = await page.json(`/requests/${request}`);
    assert.deepEqual(column.map((line) => [line.next, line.next_text]), column.map(() => [tokens[13], ` w${tokens[13]}`]));
    const wrong = column.findIndex((line) => line.next_rank !== 1); // the column is sorted from the last layer back
    assert.equal(await tab.locator('.lens').getAttribute('data-lens'), wrong === 0 ? '' : String(column[(wrong < 0 ? column.length : wrong) - 1].layer));
    const { python, cli, file } = await take(tab, '.lens .take');
    assert.deepEqual(JSON.parse(file).items.map((line) => line.layer), [0, 1, 2, 3]);
    assert.deepEqual(JSON.parse(perform('cli', `${cli} --json`, store.dir)), JSON.parse(file).items);
    assert.deepEqual(evaluate([{ text: python, expression: 'lens' }])[0], JSON.parse(file).items);
    await accessible(tab, 'the lens');
    await picture(tab, 'lens');
  });

  it('request: shows in another tab what its address says', async () => {
    const other = await openTab(browser, page);
    await other.visit(tab.url().slice(page.base.length + 1), '.vector [data-norm]');
    assert.equal(await other.locator('.vector h3').innerText(), await tab.locator('.vector h3').innerText());
    assert.deepEqual(other.wrong, []);
    await other.close();
  });

  it('request: what was not computed or was dropped is drawn as missing, with its reason', async () => {
    await tab.visit(`#/request?id=${request}&site=unembed.hook_out`, '[data-missing]');
    assert.match(await tab.locator('[data-missing]').innerText(), /not_computed \(engine\): 8 rows/); // of the prompt's 9 only the last
    ({ request: hurt } = await model.tell('drops'));
    if (!hurt) assert.fail('the ring was large enough: nothing was dropped');
    await tab.visit(`#/request?id=${hurt}&site=blocks.*.hook_resid_post&stat=rms`, '[data-missing]');
    const coverage = await page.json(`/coverage?request=${hurt}&site=blocks.*.hook_resid_post`);
    const said = await tab.locator('[data-missing]').innerText();
    for (const [outcome, reasons] of Object.entries(coverage.outcomes)) {
      if (outcome === 'captured') continue;
      for (const [reason, rows] of Object.entries(reasons)) assert.ok(said.includes(`${outcome} (${reason}): ${rows} row`), `${said}: ${outcome} ${reason} ${rows}`);
    }
    const gap = coverage.ranges.find((range) => range.outcome !== 'captured');
    await tab.visit(`#/request?id=${hurt}&site=blocks.*.hook_resid_post&stat=rms&cell=${gap.site}:${gap.first}`, '.vector .problem');
    assert.ok((await tab.locator('.vector .problem').innerText()).includes(`${gap.outcome} (${gap.reason})`));
    await picture(tab, 'missing');
  });

  it('attention: weights are drawn, and read out', async () => {
    await tab.visit(`#/attention?id=${request}&layer=2&head=1&q=20`, '.heat-cells');
    const { values, shape } = await page.floats(`/tensor?request=${request}&site=blocks.2.attn.hook_pattern&heads=1&as=F32`);
    assert.deepEqual(shape, [1, 32, 32]);
    const cells = [];
    for (let query = 0; query < 32; query += 3) for (let key = 0; key <= query; key += 2) cells.push([query, key]);
    const drawn = await pixels(tab, cells);
    for (const [i, [query, key]] of cells.entries()) assert.ok(near(drawn[i], colourOf(values[query * 32 + key], { low: 0, high: 1 })), `query ${query} key ${key}: ${drawn[i]} for ${values[query * 32 + key]}`);
    const row = [...values.slice(20 * 32, 20 * 32 + 21)];
    const best = row.indexOf(Math.max(...row));
    assert.equal(await tab.locator('[data-key]').first().getAttribute('data-key'), String(best));
    // A thumbnail's pixel is the square root of the weight; of 32 tokens each has its own.
    const thumb = await tab.evaluate(() => {
      const canvas = document.querySelector('.thumbs-canvas');
      const { side, scale, gap, label } = Object.fromEntries(Object.entries(canvas.dataset).map(([k, v]) => [k, Number(v)]));
      const pitch = side * scale + gap;
      return [...canvas.getContext('2d').getImageData(label + 1 * pitch, 2 * pitch, side * scale, side * scale).data];
    });
    const at = (query, key) => thumb.slice(4 * (query * 32 + key), 4 * (query * 32 + key) + 3);
    for (const [query, key] of cells) assert.ok(near(at(query, key), colourOf(Math.sqrt(values[query * 32 + key]), { low: 0, high: 1 })), `thumbnail ${query} ${key}`);
    const head = (await page.list(`/inspect/heads?request=${request}`)).find((h) => h.layer === 1 && h.head === 0);
    assert.equal(head.kind, 'previous-token');
    await tab.locator('.thumbs-box').focus();
    await tab.keyboard.press('ArrowRight');
    await tab.keyboard.press('ArrowUp');
    await tab.waitForFunction(() => location.hash.includes('layer=1') && location.hash.includes('head=2'));
    await tab.keyboard.press('ArrowLeft');
    await tab.keyboard.press('ArrowLeft');
    await tab.waitForSelector(`[data-kind]:has-text("previous-token, score ${Number(head.score.toPrecision(4))}")`);
    await accessible(tab, 'attention');
    await picture(tab, 'attention');
  });

  it('statistics: as the engine computes them', async () => {
    const run = request.split('.')[0];
    await tab.visit(`#/statistics?run=${run}&layer=1`, '[data-norm]');
    const line = (await page.list(`/inspect/stats?run=${run}&site=blocks.1.hook_resid_post`))[0];
    assert.equal(Number(await tab.locator('dd[data-norm]').getAttribute('data-norm')), line.norm);
    assert.equal(await tab.locator('dd[data-rows]').getAttribute('data-rows'), String(line.rows));
    await tab.waitForSelector('text=Dimensions that stand out');
    // From layer to layer: the least cosine of two that follow each other.
    const steps = (await page.list(`/inspect/similarity?run=${run}&site=blocks.*.hook_resid_post`)).filter((p) => p.layer_b === p.layer_a + 1).sort((a, b) => a.cosine - b.cosine);
    assert.equal(steps.length, 3);
    await tab.waitForSelector(`[data-turn="${steps[0].layer_b}"]`);
    assert.ok((await tab.locator('[data-turn]').innerText()).includes(String(Number(steps[0].cosine.toPrecision(4)))));
    await accessible(tab, 'statistics');
    await picture(tab, 'statistics');
  });

  it('statistics: how a mixture shares its tokens among experts', async () => {
    const { request: mixed } = await model.tell('mixture');
    const run = mixed.split('.')[0];
    await tab.visit(`#/statistics?run=${run}`, '.router .heat-cells');
    const loads = await page.list(`/inspect/router?run=${run}`);
    assert.equal(loads.filter((l) => l.layer === 0).reduce((sum, l) => sum + l.tokens, 0), 2 * 20); // each token has two
    assert.ok(new Set(loads.map((l) => l.load)).size > 4);
    const scale = await legend(tab, '.router');
    const drawn = await pixels(tab, loads.map((l) => [l.layer, l.expert]), '.router');
    for (const [i, l] of loads.entries()) assert.ok(near(drawn[i], colourOf(l.load, scale)), `layer ${l.layer} expert ${l.expert}: ${drawn[i]} for ${l.load} on ${JSON.stringify(scale)}`);
    const { python, cli, file } = await take(tab);
    assert.deepEqual(JSON.parse(file).router, loads);
    assert.deepEqual(JSON.parse(perform('cli', `${cli.split('# and: ').at(-1)} --json`, store.dir)), loads);
    assert.deepEqual(evaluate([{ text: python, expression: 'router' }])[0], loads);
    await accessible(tab, 'statistics of a mixture');
    await picture(tab, 'statistics-mixture');
  });

  it('structure: heads have the colour of their score', async () => {
    ({ request: repeated } = await model.tell('repeat 20'));
    const run = repeated.split('.')[0];
    await tab.visit(`#/structure?run=${run}&kind=previous-token`, '.split .heat-cells');
    const heads = await page.list(`/inspect/heads?run=${run}`);
    assert.equal(heads.length, 16);
    const drawn = await pixels(tab, heads.map((h) => [h.layer, h.head]), '.split');
    for (const [i, h] of heads.entries()) assert.ok(near(drawn[i], colourOf(h.previous_token, { low: 0, high: 1 })), `layer ${h.layer} head ${h.head}: ${drawn[i]} for ${h.previous_token}`);
    const looking = heads.filter((h) => h.kind === 'previous-token').sort((a, b) => b.score - a.score).slice(0, 12);
    assert.equal(`${looking[0]?.layer}.${looking[0]?.head}`, '1.0'); // as session.py built it
    assert.deepEqual(await tab.locator('[data-head]').evaluateAll((rows) => rows.map((r) => r.dataset.head)), looking.map((h) => `${h.layer}.${h.head}`));
    await tab.waitForSelector('section > .heat .heat-cells');
    const pairs = await page.list(`/inspect/similarity?run=${run}&site=blocks.*.hook_resid_post`);
    const scale = await legend(tab, 'section > .heat');
    const alike = await pixels(tab, pairs.map((p) => [p.layer_a, p.layer_b]), 'section > .heat');
    for (const [i, p] of pairs.entries()) assert.ok(near(alike[i], colourOf(p.cosine, { ...scale, low: scale.low })), `layers ${p.layer_a} and ${p.layer_b}: ${alike[i]} for ${p.cosine}`);
    await tab.locator('section > .heat .heat-box').focus(); // and can be read without a mouse
    for (const key of ['ArrowRight', 'ArrowRight', 'ArrowDown']) await tab.keyboard.press(key);
    const [third] = pairs.filter((p) => p.layer_a === 1 && p.layer_b === 2);
    assert.equal(await tab.locator('section > .heat .readout').innerText(), `layer 1, layer 2: cosine = ${Number(third.cosine.toPrecision(4))}`);
    // Against another run: score by score.
    const other = request.split('.')[0];
    await tab.getByLabel('against').selectOption(other);
    await tab.waitForSelector('[data-changes] .heat-cells');
    const before = await page.list(`/inspect/heads?run=${other}`);
    const was = (h) => before.find((o) => o.layer === h.layer && o.head === h.head);
    assert.equal(Number(await tab.locator('[data-changes]').getAttribute('data-changes')), heads.filter((h) => was(h).kind !== h.kind).length);
    const span = await legend(tab, '[data-changes]');
    const moved = await pixels(tab, heads.map((h) => [h.layer, h.head]), '[data-changes]');
    for (const [i, h] of heads.entries()) assert.ok(near(moved[i], colourOf(h.previous_token - was(h).previous_token, span)), `layer ${h.layer} head ${h.head}: ${moved[i]} for ${h.previous_token} against ${was(h).previous_token}`);
    // And by layer: which heads have become another kind, and how much more or less alike a layer is to the one before.
    await tab.waitForSelector('.alike-changes .heat-cells');
    const pairsBefore = await page.list(`/inspect/similarity?run=${other}&site=blocks.*.hook_resid_post`);
    const change = (a, b) => pairs.find((q) => q.layer_a === a && q.layer_b === b).cosine - pairsBefore.find((q) => q.layer_a === a && q.layer_b === b).cosine;
    const alikeSpan = await legend(tab, '.alike-changes');
    const turned = await pixels(tab, pairs.map((q) => [q.layer_b, q.layer_a]), '.alike-changes');
    for (const [i, q] of pairs.entries()) assert.ok(near(turned[i], colourOf(change(q.layer_a, q.layer_b), alikeSpan)), `layers ${q.layer_a} and ${q.layer_b}: ${turned[i]} for a change of ${change(q.layer_a, q.layer_b)}`);
    const byLayer = await tab.locator('[data-layer-changes]').evaluateAll((rows) => rows.map((r) => [r.dataset.layerChanges, r.dataset.turned, r.dataset.step].map(Number)));
    assert.deepEqual(byLayer, [0, 1, 2, 3].map((layer) => [layer, heads.filter((h) => h.layer === layer && was(h).kind !== h.kind).length, layer ? change(layer - 1, layer) : 0]));
    await accessible(tab, 'structure');
    await picture(tab, 'structure');
  });

  it('requests: by labels, model and words', async () => {
    await tab.visit('#/requests', 'tbody tr');
    const row = (id) => tab.locator('tbody tr', { has: tab.locator(`a[href="#/request?id=${id}"]`) });
    const { text, tokens } = await page.json(`/requests/${request}`);
    const words = text ?? tokens.map((id) => ` w${id}`).join('');
    await soon(async () => assert.ok((await row(request).innerText()).includes(words.slice(-40).trim()), await row(request).innerText()));
    assert.match(await row(request).innerText(), /LlamaForCausalLM, float32/);
    assert.match(await row(repeated).innerText(), /what: repeated/);
  });

  it('compare: where two requests part', async () => {
    const { request: again } = await model.tell('generate 24');
    await tab.visit(`#/compare?a=${request}&b=${again}`, '.heat-cells');
    const rows = await page.list(`/inspect/compare?a=${request}&b=${again}&site=blocks.*.hook_resid_post&per=row`);
    const scale = await legend(tab);
    const drawn = await pixels(tab, rows.map((r) => [r.layer, r.position]));
    for (const [i, r] of rows.entries()) assert.ok(near(drawn[i], colourOf(r.relative, scale)), `layer ${r.layer} token ${r.position}: ${drawn[i]} for ${r.relative} on ${JSON.stringify(scale)}`);
    const [x, y] = await Promise.all([request, again].map((id) => page.json(`/requests/${id}`)));
    const parts = x.tokens.findIndex((id, i) => id !== y.tokens[i]);
    assert.equal(await tab.locator('[data-parts]').getAttribute('data-parts'), String(parts));
    assert.match(await tab.locator('[data-models]').innerText(), /^Both of .*LlamaForCausalLM, float32\.$/);
    await accessible(tab, 'compare');
    await picture(tab, 'compare');
    // Rows that one of the two lacks say why: they were dropped, or it is shorter.
    await tab.visit(`#/compare?a=${hurt}&b=${request}&site=blocks.*.hook_resid_post`, '[data-missing]');
    const { ranges } = await page.json(`/coverage?request=${hurt}&site=blocks.*.hook_resid_post`);
    const expected = new Map();
    for (const range of ranges) {
      for (let i = 0; i < range.count; i++) {
        const why = [...(range.outcome === 'captured' ? [] : [`missing in a (${hurt}): ${range.outcome} (${range.reason})`]), ...(range.first + i * range.stride < 32 ? [] : [`missing in b (${request}): ends before`])].join('; ');
        if (why) expected.set(why, (expected.get(why) ?? 0) + 1);
      }
    }
    await soon(async () => {
      const said = await tab.locator('[data-missing]').innerText();
      for (const [why, rows] of expected) assert.ok(said.includes(`${why}: ${rows} row`), `${said}: ${why} ${rows}`);
    });
    await picture(tab, 'compare-missing');
    // A site that one of the two lacks altogether: on which side, and why.
    const { request: fewer } = await model.tell('fewer');
    for (const [a, b, side] of [[request, fewer, 'b'], [fewer, request, 'a']]) {
      await tab.visit(`#/compare?a=${a}&b=${b}&site=blocks.*.hook_mlp_out`, '[data-site="blocks.2.hook_mlp_out"]');
      const said = await tab.locator('[data-site="blocks.2.hook_mlp_out"]').innerText();
      assert.match(said, new RegExp(`cannot be compared.*: missing in ${side} \\(${fewer}\\): its session does not capture this site`, 's'));
      assert.ok(!said.includes('nowhere'), said);
      const rows = said.match(/(\d+) rows?: missing/g).reduce((n, text) => n + parseInt(text), 0);
      assert.equal(rows, Number(await tab.locator('.heat-cells').getAttribute('data-columns')));
    }
    await picture(tab, 'compare-lacking');
  });

  it('goes on when the session has ended: every view, light and dark', async () => {
    await model.end();
    await tab.waitForSelector('[data-state="stored"]');
    for (const colorScheme of ['light', 'dark']) {
      const finished = await openTab(browser, page, { colorScheme });
      for (const [name, address, ready] of views()) {
        await finished.visit(address, ready);
        await accessible(finished, `${name}, ${colorScheme}`);
        assert.equal(await finished.locator('.problem').count(), 0, `${name}: ${await finished.locator('.problem').allInnerTexts()}`);
        if (colorScheme === 'dark') await picture(finished, `${name}-dark`);
      }
      assert.deepEqual(finished.wrong, []);
      await finished.close();
    }
    assert.deepEqual(tab.wrong.filter((text) => !/ERR_INCOMPLETE_CHUNKED|503|404/.test(text)), []); // the engine left while streams were open
  });

  const views = () => {
    const [run, other] = [request, repeated].map((id) => id.split('.')[0]);
    return [['now', '#/now', 'text=No model is attached'], ['requests', '#/requests', 'tbody tr'], ['request', `#/request?id=${request}&stat=rms&cell=blocks.3.hook_resid_post:5`, '.vector [data-norm]'],
      ['attention', `#/attention?id=${request}&layer=2&head=1`, '.heat-cells'], ['statistics', `#/statistics?run=${run}`, '[data-turn]'],
      ['structure', `#/structure?run=${run}&against=${other}`, '.alike-changes .heat-cells'], ['compare', `#/compare?a=${request}&b=${repeated}`, '.heat-cells']];
  };

  it('gives the numbers that it shows: as Python, as a command, as a file', async () => {
    const [run, other] = [request, repeated].map((id) => id.split('.')[0]);
    const [vector, weights] = await Promise.all([page.floats(`/tensor?request=${request}&site=blocks.3.hook_resid_post&tokens=5&as=F32`), page.floats(`/tensor?request=${request}&site=blocks.2.attn.hook_pattern&heads=1&as=F32`)]);
    const api = { // of each view the numbers that were held against its drawing above, by the names that its Python gives them; the first are what its file holds
      requests: { rows: '/requests?latest=100' }, request: { rows: `/stats?request=${request}&site=blocks.*.hook_resid_post` },
      statistics: { rows: `/inspect/stats?run=${run}&site=blocks.*.hook_resid_post`, outliers: `/inspect/outliers?run=${run}&site=blocks.*.hook_resid_post`, alike: `/inspect/similarity?run=${run}&site=blocks.*.hook_resid_post` },
      structure: { heads: `/inspect/heads?run=${run}`, others: `/inspect/heads?run=${other}`, alike: `/inspect/similarity?run=${run}`, others_alike: `/inspect/similarity?run=${other}` },
      compare: { rows: `/inspect/compare?a=${request}&b=${repeated}&site=blocks.*.hook_resid_post&per=row` },
    };
    const pythons = [];
    const work = folder();
    const own = await openTab(browser, page, { acceptDownloads: true, permissions: ['clipboard-read', 'clipboard-write'] });
    try {
      for (const [name, address, ready] of views()) {
        await own.visit(address, ready);
        if (api[name]) {
          const { python, cli, file } = await take(own);
          const expected = Object.fromEntries(await Promise.all(Object.entries(api[name]).map(async ([variable, path]) => [variable, await page.list(path)])));
          assert.ok(Object.values(expected)[0].length > 1, name);
          pythons.push({ name, text: python, expression: `{${Object.keys(expected).map((variable) => `"${variable}": ${variable}`)}}`, expected });
          const lines = cli.split('# and: ');
          assert.equal(lines.length, Object.keys(expected).length, cli);
          for (const [i, line] of lines.entries()) assert.deepEqual(JSON.parse(perform('cli', `${line.trim()} --json`, work.dir)), Object.values(expected)[i], `${name}: ${line}`);
          if (name === 'request') assert.deepEqual(JSON.parse(perform('python', `import sys, io, json, pyarrow.parquet as p\nprint(json.dumps(p.read_table(io.BytesIO(sys.stdin.buffer.read()), use_threads=False, pre_buffer=False).column("rms").to_pylist()))`, work.dir, file)), expected.rows.map((r) => r.rms));
          else if (['statistics', 'structure'].includes(name)) for (const [variable, lines] of Object.entries(expected)) assert.deepEqual(JSON.parse(file)[variable], lines, `${name}: ${variable} in the file`);
          else assert.deepEqual(JSON.parse(file).items, Object.values(expected)[0], `${name}: the file`);
        }
        for (const [of, within, variable, { values, shape }] of [['request', '.vector .take', 'vector', vector], ['attention', '.split .take', 'weights', weights]]) {
          if (of !== name) continue;
          const { python, cli, file } = await take(own, within);
          assert.deepEqual(new Float32Array(file.buffer, file.byteOffset, file.length / 4), values, `${name}: the file`);
          pythons.push({ name: `${name}, ${variable}`, text: python, expression: `${variable}.float().flatten().tolist()`, expected: [...values] });
          perform('cli', cli, work.dir);
          const read = JSON.parse(perform('python', `import json, numpy\na = numpy.load("${variable}.npy")\nprint(json.dumps([list(a.shape), a.astype("float64").flatten().tolist()]))`, work.dir));
          assert.deepEqual(read, [shape, [...values]], `${name}: ${cli}`);
        }
      }
      const found = evaluate(pythons);
      for (const [i, { name, expected }] of pythons.entries()) assert.deepEqual(found[i], expected, `${name} in Python`);
    } finally {
      await own.close();
      work.remove();
    }
  });

  it('leads from a store at rest to what is in it', async () => {
    await tab.visit('#/now', 'text=No model is attached');
    const [{ id }] = await page.list('/requests?latest=1');
    await soon(async () => assert.deepEqual(await tab.locator('main p a').evaluateAll((links) => links.map((a) => a.getAttribute('href'))), ['#/requests', ...['request', 'attention', 'statistics', 'structure'].map((view) => `#/${view}?id=${id}`)]));
    await tab.getByRole('link', { name: 'what the heads do' }).click();
    await tab.waitForSelector('nav a[aria-current]:has-text("Structure")');
    const own = await openTab(browser, page);
    await own.visit('#/now', 'text=No model is attached');
    assert.equal(await own.locator('.chart').count(), 0); // nothing has moved since it was opened
    await own.close();
  });

  it('lets nothing in from outside', async () => {
    await tab.visit('#/requests', 'tbody tr');
    const stopped = await tab.evaluate(async () => {
      const found = [];
      document.addEventListener('securitypolicyviolation', (event) => found.push(event.effectiveDirective));
      await fetch('http://127.0.0.1:9/').catch(() => undefined);
      for (const [kind, address] of [['script', 'src'], ['img', 'src'], ['iframe', 'src']]) document.body.appendChild(Object.assign(document.createElement(kind), { [address]: 'http://127.0.0.1:9/' }));
      const inline = document.body.appendChild(document.createElement('script'));
      inline.textContent = 'globalThis.ran = true';
      document.body.appendChild(inline);
      for (const end = Date.now() + 60_000; new Set(found).size < 4 && Date.now() < end; ) await new Promise((done) => setTimeout(done, 50));
      await new Promise((done) => setTimeout(done, 200)); // what may come beyond these
      return { found, ran: globalThis.ran === true };
    });
    assert.deepEqual([...new Set(stopped.found)].sort(), ['connect-src', 'frame-src', 'img-src', 'script-src-elem']);
    assert.ok(!stopped.ran);
  });

  it('has a keyboard path to everything in every view', async () => {
    const own = await openTab(browser, page);
    for (const [name, address, ready] of views()) {
      await own.visit(address, ready);
      const wanted = new Set(await own.evaluate(() => [...document.querySelectorAll('main :is(a, button, select, input, .heat-box, .thumbs-box)')].filter((e) => !e.disabled).map((e, i) => (e.dataset.stop = String(i)))));
      assert.ok(wanted.size >= 3, name);
      await own.locator('.skip').focus();
      for (let presses = 0; wanted.size > 0 && presses < 300; presses++) {
        await own.keyboard.press('Tab');
        wanted.delete(await own.evaluate(() => (document.activeElement.matches(':focus-visible') ? document.activeElement.dataset.stop : undefined)));
      }
      assert.equal(wanted.size, 0, `${name}: Tab never reaches ${await own.evaluate((all) => all.map((i) => document.querySelector(`[data-stop="${i}"]`)?.outerHTML.slice(0, 100)), [...wanted])}`);
    }
    await own.close();
  });

  it('views are a key away', async () => {
    await tab.visit('#/requests', 'tbody tr');
    for (const [key, title] of [['a', 'Attention'], ['t', 'Structure'], ['s', 'Statistics'], ['c', 'Compare'], ['n', 'Now'], ['r', 'Request']]) {
      await tab.keyboard.press(key);
      await tab.waitForSelector(`nav a[aria-current]:has-text("${title}")`);
    }
  });
});

describe('stores that are not well', { skip: skip || false, timeout: 900_000 }, () => {
  it('an empty store says so', async () => {
    const store = folder();
    const browser = await launch();
    const dir = join(store.dir, 's');
    const engine = spawnSync('bash', ['-c', '"$0" serve --store "$1" --exit-with-stdin < /dev/null', dmi, dir], { env: environment, encoding: 'utf8' });
    assert.ok(existsSync(join(dir, 'dmi.json')), engine.stderr);
    const page = await startPage(dir);
    try {
      const tab = await openTab(browser, page);
      for (const view of ['now', 'requests', 'request', 'attention', 'statistics', 'structure', 'compare']) {
        await tab.visit(`#/${view}`, '.empty');
        await accessible(tab, `${view} of an empty store`);
      }
      assert.deepEqual(tab.wrong, []);
      // Broken while it is open: the page says what the engine says.
      renameSync(join(dir, 'dmi.json'), join(dir, 'elsewhere.json'));
      renameSync(join(dir, 'catalogue.sqlite'), join(dir, 'elsewhere.sqlite'));
      await tab.waitForSelector('.problem');
      assert.match(await tab.locator('.problem').first().innerText(), /store|dmi\.json/);
      await accessible(tab, 'a broken store');
    } finally {
      await browser.close();
      await page.stop();
      store.remove();
    }
  });

  it('one request alone has nothing to be compared with, and is not', async () => {
    const store = folder();
    const browser = await launch();
    const dir = join(store.dir, 's');
    const model = await startModel(dir);
    await model.tell('forward 6');
    await model.end();
    const page = await startPage(dir);
    try {
      const tab = await openTab(browser, page);
      await tab.visit('#/compare', '.empty');
      assert.match(await tab.locator('.empty').innerText(), /only one request/);
      assert.deepEqual([await tab.locator('.take').count(), await tab.getByLabel('b', { exact: true }).count()], [0, 0]);
      await accessible(tab, 'nothing to compare');
      await tab.visit('#/requests', 'tbody tr');
      assert.match(await tab.locator('main').innerText(), /The only one\./);
      assert.deepEqual(tab.wrong, []);
    } finally {
      await browser.close();
      await page.stop();
      store.remove();
    }
  });

  it('a store that cannot be opened is said before there is a page', () => {
    const store = folder();
    const refused = spawnSync(dmi, ['ui', store.dir], { env: environment, encoding: 'utf8' });
    store.remove();
    assert.equal(refused.status, 5);
    assert.match(refused.stderr, /store/);
  });

  it('the build holds no address of another server', () => {
    const assets = join(root, 'web', 'dist', 'assets');
    for (const name of readdirSync(assets).filter((n) => /\.(js|css)$/.test(n))) {
      const found = readFileSync(join(assets, name), 'utf8').match(/https?:\/\/[^\s"'`)]+/g) ?? [];
      assert.deepEqual(found.filter((url) => !/^http:\/\/www\.w3\.org\//.test(url)), [], name);
    }
  });
});
