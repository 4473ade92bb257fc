// One answer: how it is asked for, and how it is shown.
//
// { model, text, reasoning, state: 'running' | 'done' | 'stopped' | 'failed', error, finish, promptTokens, tokens,
//   firstSeconds, seconds, promptIds, ids, scores }

import { ask, events, Failure } from './api.js';
import { button, h, number } from './dom.js';
import { copied, Markdown } from './render.js';

export const makeAnswer = (model) => ({ model, text: '', reasoning: '', state: 'running', tokens: 0, ids: [] });

/** Ask for `answer` with `body`, and call `changed` after everything that comes. Never throws. */
export async function stream(answer, body, signal, changed) {
  const began = performance.now();
  let first = 0;
  try {
    const asked = { ...body, model: answer.model, stream: true, stream_options: { include_usage: true } };
    for await (const event of events(await ask('/v1/chat/completions', asked, signal))) {
      if (event.prompt_token_ids) {
        answer.promptIds = event.prompt_token_ids;
        answer.promptTokens = event.prompt_token_ids.length;
      }
      if (event.usage) {
        answer.promptTokens = event.usage.prompt_tokens;
        answer.tokens = event.usage.completion_tokens;
      }
      const [choice] = event.choices;
      if (!choice) continue;
      const { content = '', reasoning_content: reasoning = '' } = choice.delta;
      answer.text += content;
      answer.reasoning += reasoning;
      answer.finish = choice.finish_reason ?? answer.finish;
      answer.ids.push(...(choice.token_ids ?? []));
      const came = choice.token_ids?.length ?? (content || reasoning ? 1 : 0);
      answer.tokens += came;
      if (came) {
        const now = performance.now();
        first ||= now;
        answer.firstSeconds = (first - began) / 1000;
        answer.seconds = (now - first) / 1000;
      }
      changed();
    }
    answer.state = 'done';
  } catch (error) {
    answer.state = error.name === 'AbortError' ? 'stopped' : 'failed';
    if (answer.state === 'failed') {
      answer.error = error instanceof Failure ? error.message : `The page failed: ${error.message}`;
      answer.status = error.status ?? 0;
    }
  }
  changed();
}

export const speedOf = (answer) =>
  answer.tokens > 1 && answer.seconds > 0 ? (answer.tokens - 1) / answer.seconds : null;

const FINISHES = {
  length: 'ended at the limit of tokens',
  tool_calls: 'asks for a tool, which this page has none of',
};

/** Shows an answer; `again` is called where somebody wants another one in its place. */
export class AnswerView {
  constructor(answer, { named, again, live }) {
    this.answer = answer;
    this.again = again;
    // A page that was closed meanwhile left it so.
    this.live = live;
    this.thought = h('div', { class: 'thought' });
    this.thinking = h('details', { class: 'reasoning', hidden: true }, h('summary', {}, 'Reasoning'), this.thought);
    this.content = h('div', { class: 'text' });
    this.markdown = new Markdown(this.content);
    this.problem = h('div', { class: 'error', role: 'alert', hidden: true });
    this.meta = h('p', { class: 'meta' });
    this.tokens = h('div', { class: 'scored', hidden: true });
    this.element = h(
      'div',
      { class: 'answer' },
      named ? h('h3', { class: 'name' }, answer.model) : null,
      this.thinking,
      this.content,
      this.tokens,
      this.problem,
      this.meta,
    );
    this.update();
  }

  update() {
    const { answer } = this;
    const running = answer.state === 'running' && this.live();
    this.thinking.hidden = !answer.reasoning;
    if (answer.reasoning && this.thought.textContent !== answer.reasoning) this.thought.textContent = answer.reasoning;
    this.thinking.querySelector('summary').textContent = running && !answer.text ? 'Reasoning …' : 'Reasoning';
    if (answer.text) this.markdown.show(answer.text);
    this.element.classList.toggle('running', running);
    this.element.setAttribute('aria-busy', String(running));
    if (answer.state === 'failed' && this.problem.hidden) {
      this.problem.replaceChildren(h('span', {}, answer.error), button('Try again', this.again));
    }
    this.problem.hidden = answer.state !== 'failed';
    this.meta.textContent = this.facts(running).join(' · ');
  }

  facts(running) {
    const { answer } = this;
    const speed = speedOf(answer);
    const said = [];
    if (running && !answer.tokens) said.push('waiting for the first token');
    if (answer.tokens) said.push(`${number(answer.tokens)} ${answer.tokens === 1 ? 'token' : 'tokens'}`);
    if (speed) said.push(`${number(speed, 1)} tokens/s`);
    if (answer.firstSeconds && !running) said.push(`first after ${number(answer.firstSeconds, 2)} s`);
    if (answer.state === 'stopped') said.push('stopped');
    if (answer.state === 'running' && !running) said.push('interrupted');
    if (answer.state === 'done' && FINISHES[answer.finish]) said.push(FINISHES[answer.finish]);
    if (answer.state === 'done' && !answer.text && !answer.reasoning) said.push('an empty answer');
    return said;
  }

  /** Return a button that copies the answer's Markdown. */
  copier() {
    const copy = button('Copy', () => copied(this.answer.text, copy), { class: 'quiet', 'aria-label': 'Copy the answer' });
    return copy;
  }
}
