// Uses the chat page of `ortlm serve` as people do. Each function of `checks` gets a page and fails by throwing.
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { readFileSync, writeFileSync } from 'node:fs';
import http from 'node:http';
import { createRequire } from 'node:module';
import { chromium } from 'playwright-core';

const [given, answers] = process.argv.slice(2);
const { url, closed, browserPath, image, attack, shots, only } = JSON.parse(readFileSync(given, 'utf8'));
const AXE = readFileSync(createRequire(import.meta.url).resolve('axe-core/axe.min.js'), 'utf8');
const WIDE = { viewport: { width: 1280, height: 800 } };
const PHONE = { viewport: { width: 390, height: 844 }, hasTouch: true, isMobile: true };

const loaded = (page) => page.waitForFunction(() => document.querySelector('#model').options.length > 0);
const idle = (page) => page.waitForSelector('#send:visible', { timeout: 60_000 });
const count = (page, selector) => page.locator(selector).count();
const text = (page, selector) => page.locator(selector).last().textContent();
/** Wait until `ask` of the page is true. */
const until = (page, ask, argument) => page.waitForFunction(ask, argument, { timeout: 60_000 });

async function set(page, values) {
  await page.click('#show-settings');
  for (const [name, value] of Object.entries(values)) await page.fill(`#${name === 'system' ? name : `parameter-${name}`}`, String(value));
  await page.keyboard.press('Escape');
}

async function send(page, message) {
  const before = await count(page, '#log > li');
  await page.fill('#message', message);
  await page.press('#message', 'Enter');
  await until(page, (number) => document.querySelectorAll('#log > li').length === number + 2, before);
  await idle(page);
}

/** Answer the next chat with `deltas`, as the server would; `end` is left out where a stream breaks. */
async function answerWith(page, deltas, { end = true, status = 200, headers = {}, body } = {}) {
  const events = deltas.map((delta) => ({ choices: [{ index: 0, delta, finish_reason: null }] }));
  if (end) events.push({ choices: [{ index: 0, delta: {}, finish_reason: 'stop' }] });
  const usage = { prompt_tokens: 7, completion_tokens: deltas.length };
  if (end) events.push({ choices: [], usage });
  const said = body ?? events.map((event) => `data: ${JSON.stringify(event)}\n\n`).join('') + (end ? 'data: [DONE]\n\n' : '');
  await page.route('**/v1/chat/completions', (route) => route.fulfill({
    status,
    headers: { 'content-type': status === 200 ? 'text/event-stream' : 'application/json', ...headers },
    body: said,
  }), { times: 1 });
}

/**
 * Let the next answers run to the limit of tokens, and over a slow line, so that there is something to stop: the model
 * would be done before a busy machine has clicked.
 */
async function endless(page) {
  const devtools = await page.context().newCDPSession(page);
  const slow = { offline: false, latency: 0, downloadThroughput: 30_000, uploadThroughput: -1 };
  await devtools.send('Network.emulateNetworkConditions', slow);
  await page.route('**/v1/chat/completions', (route) => route.continue({
    postData: JSON.stringify({ ...route.request().postDataJSON(), ignore_eos: true }),
  }));
}

/** A way to the server on which an answer stands still after its first `most` bytes, until it is cut. */
async function halting(most) {
  const line = http.createServer((request, response) => {
    const { method, headers } = request;
    const onward = http.request(new URL(request.url, url), { method, headers }, (answer) => {
      response.writeHead(answer.statusCode, answer.headers);
      if (request.url !== '/v1/chat/completions') return answer.pipe(response);
      let passed = 0;
      return answer.on('data', (chunk) => {
        if (passed < most) response.write(chunk);
        passed += chunk.length;
      });
    });
    onward.on('error', () => response.destroy());
    request.pipe(onward);
  }).listen(0, '127.0.0.1');
  await once(line, 'listening');
  return {
    url: `http://127.0.0.1:${line.address().port}/`,
    cut() {
      line.close();
      line.closeAllConnections();
    },
  };
}

const requested = (page) => page.waitForRequest('**/v1/chat/completions').then((request) => request.postDataJSON());
const refuse = (message, code = null) => JSON.stringify({ error: { message, type: 'x', param: null, code } });

async function accessible(page, state) {
  // What fades in is not looked at half-way.
  await page.waitForTimeout(30);
  await page.evaluate(AXE);
  const found = await page.evaluate(() => window.axe.run(document, { resultTypes: ['violations'] }));
  const bad = found.violations.filter(({ impact }) => impact === 'serious' || impact === 'critical')
    .map(({ id, nodes }) => `${id}: ${nodes.map((node) => `${node.target} ${node.failureSummary}`).join('; ')}`);
  assert.deepEqual(bad, [], state);
}

async function fits(page, state) {
  const wide = await page.evaluate(() => [document.documentElement, document.querySelector('#scroll'), ...document.querySelectorAll('dialog[open]')]
    .filter((element) => element.scrollWidth > element.clientWidth + 1).map((element) => element.id || element.tagName));
  assert.deepEqual(wide, [], `${state} is wider than the screen`);
}

const shot = (page, name) => (shots ? page.screenshot({ path: `${shots}/${name}.png` }) : null);

const RICH = [
  '# A title\n\nText with **bold**, `code`, a [link](https://example.com/) and:\n\n- one\n- two\n\n> a quote\n\n',
  '```python\ndef greet(name: str) -> str:\n    # says hello\n    return f"Hello, {name}" * 2\n```\n\n',
  '| fruit | color |\n|---|--:|\n| cherry | red |\n',
];

const checks = {
  async send(page) {
    await set(page, { temperature: 0, max_tokens: 40, system: 'Be short.' });
    const asked = requested(page);
    await page.fill('#message', 'What does os.path.join do?');
    await page.press('#message', 'Shift+Enter');
    await page.type('#message', 'Say it.');
    await page.press('#message', 'Enter');
    const body = await asked;
    assert.deepEqual(body.messages, [
      { role: 'system', content: 'Be short.' },
      { role: 'user', content: 'What does os.path.join do?\nSay it.' },
    ]);
    assert.deepEqual([body.model, body.temperature, body.max_tokens, body.stream, body.top_p], ['int4', 0, 40, true, undefined]);
    await page.waitForSelector('#stop', { state: 'hidden' });
    await idle(page);
    await until(page, () => document.querySelector('.answer .text > *'));
    const { choices: [{ message }] } = await (await page.request.post(`${url}v1/chat/completions`, { data: { ...body, stream: false, stream_options: null } })).json();
    const rendered = await (await page.request.post(`${url}page/render`, { data: { text: message.content } })).json();
    const plain = (html) => html.replace(/<[^>]*>/g, '').replace(/&lt;/g, '<').replace(/&gt;/g, '>').replace(/&quot;/g, '"').replace(/&amp;/g, '&').replace(/\s/g, '');
    await until(page, (wanted) => {
      const parts = [...document.querySelector('.answer .text').children].map((child) => child.querySelector('pre') ?? child);
      return parts.map((part) => part.textContent).join('').replace(/\s/g, '') === wanted;
    }, plain(rendered.html));
    assert.match(await text(page, '.answer .meta'), /^\d+ tokens · [\d.]+ tokens\/s · first after [\d.]+ s/);
    assert.match(await text(page, '#context-text'), /^\d+ of [\d,]+ tokens$/);
    assert.match(await text(page, '#speed'), /^[\d.]+ tokens\/s$/);
    assert.equal(await page.title(), 'What does os.path.join do? Say it. · ortlm');
  },

  async markdown(page, logged) {
    const outside = [];
    page.context().on('request', (request) => { if (!request.url().startsWith(url) && !request.url().startsWith('data:')) outside.push(request.url()); });
    await answerWith(page, [...RICH, attack].map((content) => ({ content })));
    await send(page, 'Show me everything.');
    await page.waitForSelector('.answer .text:not(.plain) table');
    assert.deepEqual(await page.locator('.code').first().locator('.tok-keyword').allTextContents(), ['def', 'return']);
    assert.equal(await count(page, '.answer .text :is(script, img, iframe, svg, form, style, [onerror], [onclick])'), 0);
    assert.equal(await page.evaluate(() => window.attacked), undefined);
    for (const href of await page.locator('.answer .text a').evaluateAll((links) => links.map((link) => link.href))) assert.match(href, /^https?:/);
    await page.locator('.code .bar button').first().click();
    await until(page, () => document.querySelector('.code .bar button').textContent === 'Copied');
    assert.match(await page.evaluate(() => navigator.clipboard.readText()), /^def greet/);
    // Nothing in the page gets around its policy.
    assert.equal(await page.evaluate(() => {
      try {
        document.body.insertAdjacentHTML('beforeend', '<b>x</b>');
        return 'put in';
      } catch (error) {
        return error.name;
      }
    }), 'TypeError');
    assert.match(logged.pop(), /requires 'TrustedHTML'/);
    assert.deepEqual(outside, []);
  },

  async reasoning(page) {
    await answerWith(page, [{ reasoning_content: 'Let me think. ' }, { reasoning_content: 'Done.' }, { content: 'Four.' }]);
    await send(page, 'What is 2 + 2?');
    const folded = page.locator('.reasoning');
    assert.equal(await folded.evaluate((element) => element.open), false);
    await folded.locator('summary').click();
    assert.equal(await folded.locator('.thought').textContent(), 'Let me think. Done.');
    await until(page, () => document.querySelector('.answer .text').textContent.trim() === 'Four.');
    // It is no part of the next prompt.
    const asked = requested(page);
    await page.fill('#message', 'And 3 + 3?');
    await page.press('#message', 'Enter');
    assert.deepEqual((await asked).messages.map(({ content }) => content), ['What is 2 + 2?', 'Four.', 'And 3 + 3?']);
    await idle(page);
  },

  async stop(page) {
    await endless(page);
    for (const [at, how] of ['click', 'Escape'].entries()) {
      await page.fill('#message', 'import os');
      await page.press('#message', 'Enter');
      await until(page, (number) => /tokens\/s/.test([...document.querySelectorAll('.answer .meta')][number]?.textContent), at);
      if (how === 'click') await page.click('#stop');
      else await page.keyboard.press('Escape');
      await idle(page);
      assert.match(await text(page, '.answer .meta'), /stopped$/);
      assert.notEqual(await text(page, '.answer .text'), '');
    }
    // The server has nothing left to do.
    for (let left = 1; left;) {
      const metrics = await (await page.request.get(`${url}metrics`)).text();
      left = Number(/num_requests_running\{model_name="int4"\} ([\d.]+)/.exec(metrics)[1]);
    }
    await page.waitForTimeout(500);
    const kept = await page.locator('.answer .text').allTextContents();
    await page.reload();
    await until(page, (wanted) => wanted.join() === [...document.querySelectorAll('.answer .text')].map((element) => element.textContent).join(), kept);
  },

  async image(page) {
    assert.equal(await page.locator('#attach').isVisible(), false);
    assert.match(await page.locator('#model option[value=vision]').textContent(), /images/);
    await page.selectOption('#model', 'vision');
    await set(page, { max_tokens: 8 });
    const chosen = page.waitForEvent('filechooser');
    await page.click('#attach');
    await (await chosen).setFiles([image, image]);
    await until(page, () => document.querySelectorAll('#images img').length === 2);
    await page.click('#images li:first-child button');
    assert.equal(await count(page, '#images img'), 1);
    const asked = requested(page);
    await page.fill('#message', 'What is shown?');
    await page.press('#message', 'Enter');
    const [{ content }] = (await asked).messages;
    assert.deepEqual(content.map((part) => part.type), ['image_url', 'text']);
    assert.match(content[0].image_url.url, /^data:image\/png;base64,/);
    await idle(page);
    assert.match(await text(page, '.answer .meta'), /^8 tokens/);
    assert.equal(await page.locator('.bubble img').evaluate((element) => element.complete && element.naturalWidth > 0), true);
    await page.reload();
    await page.waitForSelector('.bubble img');
    // A model of text says that it cannot, and nothing is lost.
    await loaded(page);
    await page.selectOption('#model', 'int4');
    await send(page, 'And now?');
    assert.match(await text(page, '.answer .error'), /takes no images/);
  },

  async history(page) {
    await set(page, { max_tokens: 12 });
    await answerWith(page, [{ content: 'The first answer' }]);
    await send(page, 'The first conversation');
    await page.click('#new');
    assert.equal(await count(page, '#log > li'), 0);
    await send(page, 'The second conversation');
    await page.fill('#message', 'not sent yet');
    await page.reload();
    await loaded(page);
    assert.equal(await page.inputValue('#message'), 'not sent yet');
    assert.equal(await page.inputValue('#parameter-max_tokens'), '12');
    assert.deepEqual(await page.locator('#conversations .open').allTextContents(), ['The second conversation', 'The first conversation']);
    assert.equal(await text(page, '.said'), 'The second conversation');
    await page.click('#conversations li:nth-child(2) .open');
    await until(page, () => document.querySelector('.answer .text').textContent.trim() === 'The first answer');
    await page.click('#conversations li:nth-child(2) .icon');
    await page.getByRole('button', { name: 'Undo' }).click();
    await until(page, () => document.querySelector('.said')?.textContent === 'The first conversation');
    assert.equal(await count(page, '#conversations .open'), 2);
    await page.click('#show-settings');
    await page.click('#delete-all');
    await page.click('#sure .danger');
    await until(page, () => !document.querySelector('#conversations li'));
    await page.reload();
    await loaded(page);
    assert.equal(await count(page, '#conversations li'), 0);
  },

  async interrupted(page) {
    await endless(page);
    await page.fill('#message', 'import sys');
    await page.press('#message', 'Enter');
    await until(page, () => document.querySelector('.answer .text')?.textContent.length > 20);
    await page.waitForTimeout(500);
    await page.reload();
    await page.waitForSelector('.answer');
    await idle(page);
    assert.match(await text(page, '.answer .meta'), /interrupted$/);
    assert.ok((await text(page, '.answer .text')).length > 0);
  },

  async inAHurry(page) {
    await endless(page);
    await page.fill('#message', 'import os');
    // A key that is held down.
    await page.evaluate(() => {
      const form = document.querySelector('#composer');
      form.requestSubmit();
      document.querySelector('#message').value = 'again';
      form.requestSubmit();
    });
    await until(page, () => document.querySelector('.answer .text')?.textContent.length > 5);
    assert.equal(await count(page, '#log > li'), 2);
    assert.equal(await page.inputValue('#message'), 'again');
    // Another conversation meanwhile; the first one goes on.
    await page.click('#new');
    await answerWith(page, [{ content: 'Quick.' }]);
    await send(page, 'Quickly?');
    await page.locator('#conversations .open').last().click();
    await until(page, () => document.querySelector('.said').textContent === 'import os');
    assert.equal(await page.locator('#stop').isVisible(), true);
    // What is deleted stays so, though its answer was still coming.
    await page.locator('#conversations li.current .icon').click();
    await page.waitForTimeout(500);
    await page.reload();
    await loaded(page);
    assert.deepEqual(await page.locator('#conversations .open').allTextContents(), ['Quickly?']);
  },

  async branches(page) {
    await set(page, { max_tokens: 10 });
    await answerWith(page, [{ content: 'Answer one.' }]);
    await send(page, 'Question one');
    await answerWith(page, [{ content: 'Below.' }]);
    await send(page, 'Question below');
    await answerWith(page, [{ content: 'Answer two.' }]);
    await page.locator('#log .assistant').first().getByRole('button', { name: 'Regenerate' }).click();
    await until(page, () => document.querySelector('.answer .text')?.textContent.trim() === 'Answer two.');
    await idle(page);
    assert.equal(await count(page, '#log > li'), 2);
    assert.equal(await text(page, '.assistant .branches span'), '2 of 2');
    await page.getByRole('button', { name: 'Previous answer' }).click();
    await until(page, () => document.querySelector('.answer .text').textContent.trim() === 'Answer one.');
    assert.equal(await count(page, '#log > li'), 4);
    await page.locator('#log .user').first().getByRole('button', { name: 'Edit the message' }).click();
    await page.fill('.edit textarea', 'Question two');
    await page.press('.edit textarea', 'Escape');
    assert.equal(await page.locator('.said').first().textContent(), 'Question one');
    // With the keys alone.
    await page.focus('#message');
    await page.keyboard.press('ArrowUp');
    assert.equal(await page.inputValue('.edit textarea'), 'Question below');
    await page.fill('.edit textarea', 'Question above');
    await answerWith(page, [{ content: 'Answer three.' }]);
    const asked = requested(page);
    await page.press('.edit textarea', 'Enter');
    assert.deepEqual((await asked).messages.map(({ content }) => content), ['Question one', 'Answer one.', 'Question above']);
    await until(page, () => [...document.querySelectorAll('.answer .text')].at(-1).textContent.trim() === 'Answer three.');
    await idle(page);
    await page.reload();
    await page.waitForSelector('.branches');
    assert.deepEqual(await page.locator('.said').allTextContents(), ['Question one', 'Question above']);
    await page.getByRole('button', { name: 'Previous version of the message' }).click();
    await until(page, () => [...document.querySelectorAll('.said')].at(-1).textContent === 'Question below');
  },

  async errors(page) {
    await answerWith(page, [], { status: 429, headers: { 'retry-after': '7' }, body: refuse('too many requests wait.', 'overloaded') });
    await send(page, 'First');
    assert.match(await text(page, '.answer .error'), /The server is busy\. Try again in 7 s/);
    await answerWith(page, [{ content: 'Now it works.' }]);
    await page.locator('.answer .error').getByRole('button', { name: 'Try again' }).click();
    await until(page, () => document.querySelector('.answer .text')?.textContent.trim() === 'Now it works.');
    await idle(page);
    // From the server itself, with the parameter's name.
    await set(page, { top_p: 7, temperature: 0.333 });
    await send(page, 'Second');
    assert.match(await text(page, '.answer .error'), /top_p must be/i);
    await set(page, { top_p: '' });
    await answerWith(page, [{ content: 'Half an ans' }], { end: false });
    await send(page, 'Third');
    assert.match(await text(page, '.answer .error'), /ended the answer early/);
    await until(page, () => [...document.querySelectorAll('.answer .text')].at(-1).textContent.trim() === 'Half an ans');
    await answerWith(page, [], { body: `data: ${refuse('the engine has failed.')}\n\n` });
    await send(page, 'Fourth');
    assert.match(await text(page, '.answer .error'), /The engine has failed/);
    await page.reload();
    await page.waitForSelector('.said');
    assert.deepEqual(await page.locator('.said').allTextContents(), ['First', 'Second', 'Third', 'Fourth']);
    // What had no answer is sent along, as one message.
    const asked = requested(page);
    await loaded(page);
    await page.fill('#message', 'Fifth');
    await page.press('#message', 'Enter');
    assert.deepEqual((await asked).messages.map(({ role, content }) => [role, content]), [
      ['user', 'First'], ['assistant', 'Now it works.'], ['user', 'Second\n\nThird'], ['assistant', 'Half an ans'],
      ['user', 'Fourth\n\nFifth'],
    ]);
    await idle(page);
  },

  async gone(page) {
    const line = await halting(4000);
    try {
      await page.goto(line.url);
      await loaded(page);
      await endless(page);
      await page.fill('#message', 'import os');
      await page.press('#message', 'Enter');
      await until(page, () => document.querySelector('.answer .text')?.textContent.length > 20);
    } finally {
      line.cut();
    }
    await idle(page);
    assert.match(await text(page, '.answer .error'), /connection to the server was lost|ended the answer early/);
    assert.ok((await text(page, '.answer .text')).length > 20);
    await send(page, 'Are you there?');
    assert.match(await text(page, '.answer .error'), /cannot be reached\. Nothing is lost/);
    assert.deepEqual(await page.locator('.said').allTextContents(), ['import os', 'Are you there?']);
  },

  async pair(page) {
    await set(page, { temperature: 0, max_tokens: 24 });
    await page.selectOption('#other', 'fp32');
    await send(page, 'What does os.path.join do?');
    await page.waitForSelector('.legend');
    assert.deepEqual(await page.locator('.columns .name').allTextContents(), ['int4', 'fp32']);
    const numbers = await page.evaluate(() => [...document.querySelectorAll('.tokens')].map((list) => list.children.length));
    const metas = await page.locator('.columns .meta').allTextContents();
    numbers.forEach((number, at) => assert.match(metas[at], new RegExp(`^${number} tokens`)));
    // Greedy: the model's own tokens are its first choices.
    const list = page.getByRole('listbox', { name: 'Tokens of the answer of int4' });
    await list.focus();
    const details = page.locator('.columns .details').first();
    assert.match(await details.textContent(), /^\S+ [+−±][\d.]+ points\s*int4: [\d.]+ %, its first choicefp32: [\d.]+ %/);
    const before = await list.getAttribute('aria-activedescendant');
    await page.keyboard.press('ArrowRight');
    assert.notEqual(await list.getAttribute('aria-activedescendant'), before);
    await page.keyboard.press('End');
    assert.equal(await page.locator('.tokens').first().locator('[aria-selected=true]').getAttribute('id'), await list.getAttribute('aria-activedescendant'));
    await page.locator('.tokens').last().locator('.token').nth(2).hover();
    assert.match(await page.locator('.columns .details').last().textContent(), /points\s*int4: [\d.]+ %.*fp32: [\d.]+ %, its first choice/);
    // The figures are those that the server gives for the same ids.
    const cells = await page.locator('.legend tbody tr').first().locator('td').allTextContents();
    assert.equal(cells[0], String(numbers[0]));
    cells.slice(1).forEach((cell) => assert.match(cell, /^[\d.,]+( points| %)?$/));
    await shot(page, 'pair');
    await page.getByRole('button', { name: 'Text', exact: true }).click();
    assert.equal(await page.locator('.tokens').first().isVisible(), false);
    assert.equal(await page.locator('.columns .text').first().isVisible(), true);
    await page.reload();
    await page.waitForSelector('.legend');
    await page.getByRole('button', { name: 'Token changes' }).click();
    assert.equal(await page.locator('.tokens').first().isVisible(), true);
    await page.getByRole('button', { name: 'Continue with this answer' }).click();
    await until(page, () => !document.querySelector('.columns'));
    assert.equal(await text(page, '.assistant .branches span'), '2 of 2');
    // Models of different tokenizers answer side by side too.
    await page.click('#new');
    await loaded(page);
    await page.selectOption('#other', 'vision');
    assert.match(await page.locator('#other option:checked').textContent(), /other tokenizer/);
    await send(page, 'Hello');
    await until(page, () => /different tokenizers/.test(document.querySelector('.compared').textContent));
  },

  async quality(page) {
    await page.click('#show-quality');
    await page.waitForSelector('#quality .cards');
    assert.match(await text(page, '#quality .cards'), /Mean KL divergence0\.\d{4}/);
    assert.match(await text(page, '#quality table'), /prose/);
    assert.ok(await count(page, '#quality .bars li') > 1);
    assert.match(await text(page, '#quality .facts'), /Precisionint4/);
    await shot(page, 'quality');
    await page.keyboard.press('Escape');
    await page.selectOption('#model', 'vision');
    await page.click('#show-quality');
    await page.waitForSelector('#quality .facts');
    assert.match(await text(page, '#quality-body'), /short check at the end of the build|Nothing was measured/);
  },

  async key(page) {
    await page.goto(closed);
    await page.waitForSelector('#key[open]');
    await page.fill('#key-value', 'wrong');
    await page.press('#key-value', 'Enter');
    await until(page, () => /does not take this key/.test(document.querySelector('#key-wrong').textContent));
    await page.fill('#key-value', 'secret');
    await page.press('#key-value', 'Enter');
    await loaded(page);
    await set(page, { max_tokens: 6 });
    await send(page, 'Hello');
    assert.match(await text(page, '.answer .meta'), /tokens/);
    assert.equal(await page.evaluate(() => Object.values(localStorage).includes('secret')), false);
    await page.reload();
    await loaded(page);
    await page.click('#show-settings');
    await page.click('#change-key');
    await page.fill('#key-value', 'secret');
    await page.check('#key-keep');
    await page.press('#key-value', 'Enter');
    await until(page, () => Object.values(localStorage).includes('secret'));
    const other = await page.context().newPage();
    await other.goto(closed);
    await loaded(other);
  },

  async appearance(page) {
    const background = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
    const light = await background();
    await page.emulateMedia({ colorScheme: 'dark' });
    const dark = await background();
    assert.notEqual(light, dark);
    await page.selectOption('#theme', 'light');
    assert.equal(await background(), light);
    await page.reload();
    assert.equal(await background(), light);
    await page.selectOption('#theme', '');
    assert.equal(await background(), dark);
  },

  async keyboard(page) {
    // Where people begin who come from the browser's own buttons.
    await page.focus('.skip');
    assert.ok((await page.locator('.skip').boundingBox()).y >= 0);
    await page.keyboard.press('Enter');
    assert.equal(await page.evaluate(() => document.activeElement.id), 'message');
    await answerWith(page, [{ content: 'Yes.' }]);
    await page.keyboard.type('Is this heard?');
    await page.keyboard.press('Enter');
    await until(page, () => /The answer is complete\. Yes\./.test(document.querySelector('#spoken').textContent));
    assert.equal(await page.evaluate(() => document.activeElement.id), 'message');
    const reached = new Set();
    for (let step = 0; step < 30; step += 1) {
      await page.keyboard.press('Tab');
      reached.add(await page.evaluate(() => document.activeElement.getAttribute('aria-label') ?? document.activeElement.id ?? ''));
    }
    for (const name of ['Edit the message', 'Copy the answer', 'Settings', 'Quality of the model', 'model', 'other', 'theme', 'new']) assert.ok(reached.has(name), `${name} of ${[...reached]}`);
  },

  async phone(page) {
    await page.setViewportSize(PHONE.viewport);
    await fits(page, 'the empty page');
    await answerWith(page, [...RICH, `\`\`\`\n${'long '.repeat(60)}\n\`\`\`\n${'w'.repeat(300)}`].map((content) => ({ content })));
    await send(page, 'u'.repeat(200));
    await page.waitForSelector('.answer .text:not(.plain) table');
    await fits(page, 'a conversation');
    await shot(page, 'phone');
    await page.click('#open-side');
    await page.waitForTimeout(300);
    assert.equal(await page.locator('#new').isVisible(), true);
    await page.keyboard.press('Escape');
    await page.waitForTimeout(300);
    assert.equal(await page.locator('#new').isVisible(), false);
    await page.click('#show-settings');
    await fits(page, 'the settings');
    await page.keyboard.press('Escape');
    await page.click('#show-quality');
    await page.waitForSelector('#quality .cards');
    await fits(page, 'the quality report');
    await page.keyboard.press('Escape');
    await set(page, { max_tokens: 20 });
    await page.click('#open-side');
    await page.click('#new');
    await page.selectOption('#other', 'fp32');
    await send(page, 'import os');
    await page.waitForSelector('.legend');
    await fits(page, 'two models');
    await shot(page, 'phone-pair');
  },

  accessible: (page) => accessibleIn(page, 'light'),
  accessibleInTheDark: (page) => accessibleIn(page, 'dark'),
};

async function accessibleIn(page, colorScheme) {
  await page.emulateMedia({ colorScheme });
  await accessible(page, 'the empty page');
  await page.click('#show-settings');
  await accessible(page, 'the settings');
  await page.keyboard.press('Escape');
  await answerWith(page, [{ reasoning_content: 'Well.' }, ...RICH.map((content) => ({ content }))]);
  await send(page, 'Show me everything.');
  await page.locator('.reasoning summary').click();
  await answerWith(page, [{ content: 'Once more.' }]);
  await page.getByRole('button', { name: 'Regenerate' }).click();
  await page.waitForSelector('.branches');
  await page.getByRole('button', { name: 'Previous answer' }).click();
  await answerWith(page, [], { status: 429, body: refuse('busy.') });
  await send(page, 'And fail.');
  await accessible(page, 'a conversation');
  await shot(page, `conversation-${colorScheme}`);
  await page.locator('.user').last().getByRole('button', { name: 'Edit' }).click();
  await accessible(page, 'editing');
  await set(page, { max_tokens: 20 });
  await page.click('#new');
  await page.selectOption('#other', 'fp32');
  await send(page, 'import os');
  await page.waitForSelector('.legend');
  await page.locator('.tokens .token').first().hover();
  await accessible(page, 'two models');
  await page.click('#show-quality');
  await page.waitForSelector('#quality .cards');
  await accessible(page, 'the quality report');
  await page.keyboard.press('Escape');
  await page.click('#conversations li:first-child .icon');
  await accessible(page, 'what was deleted');
  await page.click('#show-settings');
  await page.click('#change-key');
  await accessible(page, 'the key');
  await page.keyboard.press('Escape');
  await page.setViewportSize(PHONE.viewport);
  await page.click('#open-side');
  await page.waitForTimeout(300);
  await accessible(page, 'the list on a phone');
}

const flags = process.getuid?.() === 0 ? ['--no-sandbox'] : [];
const browser = await chromium.launch({ executablePath: browserPath, args: flags });
const results = {};
for (const [name, check] of Object.entries(checks)) {
  if (only && name !== only) continue;
  const context = await browser.newContext({ ...WIDE, permissions: ['clipboard-read', 'clipboard-write'] });
  context.setDefaultTimeout(20_000);
  const logged = [];
  // Chromium logs every status above 399 itself.
  context.on('console', (message) => { if (!/Failed to load resource/.test(message.text())) logged.push(`${message.type()}: ${message.text()}`); });
  context.on('weberror', (error) => logged.push(`error: ${error.error().stack}`));
  const page = await context.newPage();
  const began = Date.now();
  let error = null;
  try {
    if (name !== 'gone' && name !== 'key') {
      await page.goto(url);
      await loaded(page);
    }
    await check(page, logged);
  } catch (problem) {
    error = problem.stack;
    if (shots) await page.screenshot({ path: `${shots}/failed-${name}.png` }).catch(() => {});
  }
  results[name] = { error, logged, seconds: (Date.now() - began) / 1000 };
  await context.close();
}
await browser.close();
writeFileSync(answers, JSON.stringify(results));
