// Two models on the same prompt: the probability that each gives to every token of both answers.

import { post } from './api.js';
import { button, h, number } from './dom.js';

/** Return for each of `ids` after `prompt` what `model` makes of it: { text, p, top, topP }. */
async function probabilities(model, prompt, ids, signal) {
  const asked = { model, prompt: [...prompt, ...ids], max_tokens: 0, echo: true, logprobs: 1 };
  const { choices: [{ logprobs }] } = await post('/v1/completions', asked, signal);
  return logprobs.tokens.map((text, at) => {
    const logprob = logprobs.token_logprobs[at];
    const [top, topLogprob] = Object.entries(logprobs.top_logprobs[at] ?? {})
      .reduce((best, one) => (one[1] > best[1] ? one : best), ['', -Infinity]);
    return { text, logprob, p: Math.exp(logprob ?? 0), top, topP: Math.exp(topLogprob) };
  }).slice(prompt.length, prompt.length + ids.length);
}

/** Return the tokens of each of two `answers` with what both models make of them. Throws Failure. */
export async function score(answers, signal) {
  // All at once: where only one of the models may be loaded, they change places once.
  const asked = answers.map(({ promptIds, ids }) =>
    Promise.all(answers.map(({ model }) => probabilities(model, promptIds, ids, signal))));
  return (await Promise.all(asked)).map(([left, right]) =>
    left.map((one, at) => ({ text: one.text, left: short(one), right: short(right[at]) })));
}

const short = ({ logprob, p, top, topP }) => ({ logprob, p, top, topP });

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / Math.max(1, values.length);
const percent = (p, digits = 1) => `${number(100 * p, digits)} %`;
const signed = (change) => `${change > 0 ? '+' : change < 0 ? '−' : '±'}${number(Math.abs(100 * change), 1)} points`;
/** Spaces and line ends as something that is seen. */
const visible = (text) => text.replaceAll(' ', '·').replaceAll('\n', '⏎').replaceAll('\t', '⇥') || '(nothing)';

export function summary(tokens) {
  const perplexity = (side) => Math.exp(-mean(tokens.map((token) => token[side].logprob)));
  return {
    tokens: tokens.length,
    change: mean(tokens.map((token) => Math.abs(token.right.p - token.left.p))),
    same: mean(tokens.map((token) => Number(token.left.top === token.right.top))),
    left: perplexity('left'),
    right: perplexity('right'),
  };
}

/** Return the legend and the figures of two compared answers. */
export function legend(answers) {
  const [left, right] = answers.map((answer) => answer.model);
  const rows = answers.map((answer) => {
    const found = summary(answer.scores);
    return h(
      'tr',
      {},
      h('th', { scope: 'row' }, answer.model),
      ...[
        number(found.tokens),
        `${number(100 * found.change, 1)} points`,
        percent(found.same, 0),
        number(found.left, 2),
        number(found.right, 2),
      ].map((text) => h('td', {}, text)),
    );
  });
  const titles = ['Answer of', 'Tokens', 'Mean change', 'Same first choice', `Perplexity, ${left}`, `Perplexity, ${right}`];
  const scale = [-1, -0.5, -0.2, 0, 0.2, 0.5, 1].map((change) => {
    const step = h('span', { class: 'token' }, change ? `${change > 0 ? '+' : '−'}${Math.abs(100 * change)}` : '0');
    color(step, change);
    return step;
  });
  return h(
    'div',
    { class: 'legend' },
    h(
      'p',
      {},
      `Change of each token's probability from ${left} to ${right}, in percentage points: `,
      h('span', { class: 'scale' }, ...scale),
    ),
    h('div', { class: 'wide', tabIndex: 0, role: 'group', 'aria-label': 'Figures of the comparison' }, h(
      'table',
      {},
      h('thead', {}, h('tr', {}, ...titles.map((title) => h('th', { scope: 'col' }, title)))),
      h('tbody', {}, ...rows),
    )),
    h('p', { class: 'note' }, 'Probabilities are those at temperature 1. Point at a token, or go there with ← and →.'),
  );
}

function color(element, change) {
  element.style.setProperty('--change', `${Math.round(100 * Math.min(1, Math.abs(change)) ** 0.6)}%`);
  element.classList.add(change < 0 ? 'less' : 'more');
}

/** Return the tokens of an answer, colored; the one that is pointed at, or chosen with keys, shows its figures. */
export function tokenView(answer, names) {
  const details = h('p', { class: 'details', role: 'status' });
  const shown = answer.scores.map((token, at) => {
    const element = h('span', { class: 'token', role: 'option', id: `${names.id}-${at}`, 'aria-selected': 'false' });
    // A line end is shown, and ends the line.
    element.textContent = token.text.startsWith('<|') ? token.text : token.text.replaceAll('\n', '⏎\n');
    if (!token.text.trim()) element.setAttribute('aria-label', visible(token.text));
    color(element, token.right.p - token.left.p);
    element.dataset.at = at;
    return element;
  });
  const list = h(
    'div',
    { class: 'tokens', role: 'listbox', tabIndex: 0, 'aria-label': `Tokens of the answer of ${answer.model}` },
    ...shown,
  );
  let chosen = -1;
  const choose = (at) => {
    if (at === chosen || at < 0 || at >= shown.length) return;
    shown[chosen]?.setAttribute('aria-selected', 'false');
    chosen = at;
    shown[at].setAttribute('aria-selected', 'true');
    list.setAttribute('aria-activedescendant', shown[at].id);
    const { text, left, right } = answer.scores[at];
    const figures = [[names.left, left], [names.right, right]].flatMap(([name, side]) => [
      h('br'),
      `${name}: ${percent(side.p, 2)}`,
      side.top === text ? ', its first choice' : `, first choice ${visible(side.top)} with ${percent(side.topP, 2)}`,
    ]);
    details.replaceChildren(h('code', {}, visible(text)), ` ${signed(right.p - left.p)}`, ...figures);
  };
  list.addEventListener('pointerover', ({ target }) => {
    if (target.dataset.at) choose(Number(target.dataset.at));
  });
  list.addEventListener('click', ({ target }) => {
    if (target.dataset.at) choose(Number(target.dataset.at));
  });
  list.addEventListener('focus', () => choose(Math.max(0, chosen)));
  list.addEventListener('keydown', (event) => {
    const steps = { ArrowLeft: chosen - 1, ArrowRight: chosen + 1, Home: 0, End: shown.length - 1 };
    if (!(event.key in steps)) return;
    event.preventDefault();
    choose(steps[event.key]);
    shown[chosen].scrollIntoView({ block: 'nearest' });
  });
  return h('div', {}, list, details);
}

/** Return a switch between an answer's text and its tokens. */
export function viewSwitch(shows, change) {
  const both = [['Text', false], ['Token changes', true]].map(([name, tokens]) =>
    button(name, () => change(tokens), { class: 'quiet', 'aria-pressed': String(tokens === shows) }));
  return h('div', { class: 'switch', role: 'group', 'aria-label': 'How answers are shown' }, ...both);
}
