// The messages of a conversation, each an item of the list.
//
// What happens to them is told by `doing`: { nodes, isLive, edit, regenerate, continueWith, compare, goTo }.

import { AnswerView } from './answer.js';
import { legend, tokenView, viewSwitch } from './compare.js';
import { $, button, h, isSend, remembered } from './dom.js';
import { copied } from './render.js';
import { childrenOf, newestLeaf } from './tree.js';

// Of two models: the tokens of their answers, not the text.
let showsTokens = remembered.get('text') === '';
// What to call when a node has changed, by its id.
const updates = new Map();

/** Show `path` in the list. */
export function showMessages(path, doing) {
  updates.clear();
  $('log').replaceChildren(...path.map((node) => (node.role === 'user' ? userItem : assistantItem)(node, doing)));
}

/** Show what has changed of the node `id`, if it is in the list. */
export const updateMessage = (id) => updates.get(id)?.();

function userItem(node, doing) {
  const bubble = h(
    'div',
    { class: 'bubble' },
    ...node.images.map((url, at) => h('img', { src: url, alt: `Attached image ${at + 1}` })),
    node.text ? h('div', { class: 'said' }, node.text) : null,
  );
  const copy = button('Copy', () => copied(node.text, copy), { class: 'quiet', 'aria-label': 'Copy the message' });
  const edit = button('Edit', () => editMessage(node, doing), { class: 'quiet', 'aria-label': 'Edit the message' });
  return h(
    'li',
    { class: 'user', 'data-node': node.id },
    h('span', { class: 'hidden' }, 'You:'),
    bubble,
    h('div', { class: 'actions' }, branches(node, doing), edit, copy),
  );
}

/** Put a field in place of a user's message. */
export function editMessage(node, doing) {
  const item = itemOf(node);
  if (!item || doing.isBusy()) return;
  const before = [...item.children];
  const field = h('textarea', {
    value: node.text,
    rows: Math.min(12, node.text.split('\n').length + 1),
    'aria-label': 'Edit the message',
  });
  const cancel = () => {
    item.replaceChildren(...before);
    item.querySelector('[aria-label="Edit the message"]').focus();
  };
  const form = h(
    'form',
    { class: 'edit' },
    field,
    h('p', { class: 'buttons' }, button('Cancel', cancel), h('button', { class: 'main', type: 'submit' }, 'Send')),
  );
  form.addEventListener('submit', (event) => {
    event.preventDefault();
    if (field.value.trim() || node.images.length) doing.edit(node, field.value.trim());
  });
  field.addEventListener('keydown', (event) => {
    if (event.key === 'Escape') {
      event.stopPropagation();
      cancel();
    } else if (isSend(event)) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  item.replaceChildren(form);
  field.focus();
  field.setSelectionRange(field.value.length, field.value.length);
}

function assistantItem(node, doing) {
  const pair = node.answers.length > 1;
  const live = () => doing.isLive(node);
  const again = () => doing.regenerate(node);
  const shown = node.answers.map((answer) => new AnswerView(answer, { named: pair, again, live }));
  const columns = h('div', { class: pair ? 'columns' : '' }, ...shown.map((view) => view.element));
  const actions = h(
    'div',
    { class: 'actions' },
    branches(node, doing),
    button('Regenerate', again, { class: 'quiet' }),
    shown[0].copier(),
  );
  const chosen = button('Continue with this answer', () => doing.continueWith(node, 1), { class: 'quiet' });
  const compared = h('div', { class: 'compared' });
  if (pair) shown[1].element.append(h('div', { class: 'actions' }, chosen));
  const update = () => {
    shown.forEach((view) => view.update());
    actions.hidden = live();
    chosen.hidden = live() || !node.answers.at(-1).text;
    if (pair) showCompared(node, shown, compared, doing);
  };
  updates.set(node.id, update);
  update();
  return h(
    'li',
    { class: pair ? 'assistant pair' : 'assistant', 'data-node': node.id },
    h('span', { class: 'hidden' }, 'Answer:'),
    columns,
    compared,
    actions,
  );
}

const itemOf = (node) => document.querySelector(`[data-node="${node.id}"]`);

/** Return ‹ 1 of 2 › where a node has siblings. */
function branches(node, doing) {
  const all = childrenOf(doing.nodes, node.parent).filter((other) => other.role === node.role);
  if (all.length < 2) return null;
  const at = all.findIndex((other) => other.id === node.id);
  const go = (step) => {
    const scrolled = $('scroll').scrollTop;
    doing.goTo(newestLeaf(doing.nodes, all[at + step]));
    $('scroll').scrollTop = scrolled;
    const [back, on] = itemOf(all[at + step]).querySelectorAll('.branches button');
    const wanted = step < 0 ? back : on;
    (wanted.disabled ? (step < 0 ? on : back) : wanted).focus();
  };
  const what = node.role === 'user' ? 'version of the message' : 'answer';
  return h(
    'span',
    { class: 'branches', role: 'group', 'aria-label': 'Branches' },
    button('‹', () => go(-1), { class: 'quiet', disabled: at === 0, 'aria-label': `Previous ${what}` }),
    h('span', {}, `${at + 1} of ${all.length}`),
    button('›', () => go(1), { class: 'quiet', disabled: at === all.length - 1, 'aria-label': `Next ${what}` }),
  );
}

/** Show of a pair what there is of its comparison: { scores } of both answers, or node.comparison in words. */
function showCompared(node, shown, place, doing) {
  const [left, right] = node.answers;
  const scored = Boolean(left.scores && right.scores);
  const tokens = scored && showsTokens;
  shown.forEach((view, at) => {
    view.content.hidden = tokens;
    view.thinking.hidden = tokens || !view.answer.reasoning;
    view.tokens.hidden = !tokens;
    if (tokens && !view.tokens.childNodes.length) {
      const names = { left: left.model, right: right.model, id: `token-${node.id}-${at}` };
      view.tokens.append(tokenView(view.answer, names));
    }
  });
  if (!scored) {
    place.replaceChildren(...(doing.isLive(node) ? [] : uncompared(node, doing)));
    return;
  }
  if (place.dataset.shows === String(showsTokens)) return;
  place.dataset.shows = String(showsTokens);
  const change = (wanted) => {
    showsTokens = wanted;
    remembered.set('text', wanted ? '' : 'yes');
    for (const update of updates.values()) update();
    place.querySelector('[aria-pressed="true"]').focus();
  };
  place.replaceChildren(viewSwitch(showsTokens, change), legend(node.answers));
}

function uncompared(node, doing) {
  if (doing.isComparing(node)) return [h('p', { class: 'meta' }, 'Comparing the tokens …')];
  if (node.incomparable) return [h('p', { class: 'meta' }, node.incomparable)];
  if (node.answers.some((answer) => answer.state === 'failed')) return [];
  const compare = button(node.compareError ? 'Try again' : 'Compare the tokens', () => doing.compare(node));
  if (!node.compareError) return [compare];
  return [h('p', { class: 'error' }, h('span', {}, `The tokens could not be compared. ${node.compareError}`), compare)];
}
