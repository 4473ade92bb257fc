// The parameters of requests, as the page's fields; empty ones are left to the server.

import { $, h, remembered } from './dom.js';

const FIELDS = [
  { name: 'temperature', label: 'Temperature', min: 0, max: 2, step: 0.05, note: '0: always the most likely token' },
  { name: 'top_p', label: 'Top p', min: 0, max: 1, step: 0.01 },
  { name: 'top_k', label: 'Top k', min: 0, step: 1 },
  { name: 'min_p', label: 'Min p', min: 0, max: 1, step: 0.01 },
  { name: 'max_tokens', label: 'Max tokens', min: 1, step: 1, note: 'of the answer' },
  { name: 'seed', label: 'Seed', step: 1, note: 'the same answer each time' },
  { name: 'repetition_penalty', label: 'Repetition penalty', min: 0.1, step: 0.05 },
  { name: 'presence_penalty', label: 'Presence penalty', min: -2, max: 2, step: 0.1 },
  { name: 'frequency_penalty', label: 'Frequency penalty', min: -2, max: 2, step: 0.1 },
  { name: 'stop', label: 'Stop texts', lines: true, note: 'one on each line' },
];

const inputs = new Map();

/** Make the fields. What they hold is remembered. */
export function makeFields() {
  const kept = JSON.parse(remembered.get('parameters') || '{}');
  for (const { name, label, note, lines, ...limits } of FIELDS) {
    const id = `parameter-${name}`;
    const input = lines
      ? h('textarea', { id, rows: 2 })
      : h('input', { id, type: 'number', inputMode: 'decimal', ...limits });
    input.value = kept[name] ?? '';
    if (note) input.setAttribute('aria-describedby', `${id}-note`);
    input.addEventListener('input', keep);
    inputs.set(name, input);
    $('parameters').append(h(
      'div',
      { class: lines ? 'field all' : 'field' },
      h('label', { for: id }, label),
      input,
      note ? h('span', { class: 'note', id: `${id}-note` }, note) : null,
    ));
  }
}

function keep() {
  const kept = [...inputs].filter(([, input]) => input.value).map(([name, input]) => [name, input.value]);
  remembered.set('parameters', kept.length ? JSON.stringify(Object.fromEntries(kept)) : '');
}

export function reset() {
  for (const input of inputs.values()) input.value = '';
  keep();
}

/** Show what `model` recommends where nothing is given. */
export function showDefaults(model) {
  for (const [name, input] of inputs) input.placeholder = model?.defaults[name] ?? '';
}

/** Return the fields of a request. A number that is none goes to the server, which says what it takes. */
export function parameters() {
  const found = {};
  for (const [name, input] of inputs) {
    if (input.validity.badInput) found[name] = 'not a number';
    else if (name === 'stop') {
      const lines = input.value.split('\n').filter(Boolean);
      if (lines.length) found.stop = lines;
    } else if (input.value !== '') found[name] = Number(input.value);
  }
  return found;
}
