// The page: conversations, what is asked of the models, and what happens when somebody does something.

import { makeAnswer, speedOf, stream } from './answer.js';
import { key } from './api.js';
import { addImages, attached, clearImages } from './attachments.js';
import { score } from './compare.js';
import { $, button, cross, h, isSend, notice, number, remembered, say, toast } from './dom.js';
import { editMessage, showMessages, updateMessage } from './messages.js';
import * as picker from './models.js';
import { showQuality } from './quality.js';
import { makeFields, parameters, reset } from './settings.js';
import * as store from './store.js';
import { makeNode, messagesOf, pathTo, randomId } from './tree.js';

const SAVE_PAUSE = 300;

// What is shown: a conversation { id, title, created, changed, system, leaf }, and all its nodes by id.
let conversation = null;
let nodes = new Map();
// What is being answered, by conversation: { controller, node }.
const running = new Map();
// Nodes whose tokens are being compared.
const comparing = new Set();
// What ends later is not to bring them back.
const deleted = new Set();

const doing = {
  get nodes() {
    return nodes;
  },
  isBusy: () => Boolean(conversation && running.has(conversation.id)),
  isLive: (node) => running.get(node.conversation)?.node.id === node.id,
  isComparing: (node) => comparing.has(node.id),
  edit: (node, text) => addUser(conversation, makeNode(node.conversation, node.parent, { role: 'user', text, images: node.images })),
  regenerate(node) {
    if (!doing.isBusy()) generate(conversation, nodes.get(node.parent));
  },
  continueWith,
  compare,
  goTo(leaf) {
    conversation.leaf = leaf.id;
    keep('conversations', conversation);
    showConversation();
  },
};

// --- conversations ------------------------------------------------------------------------------------------

async function listConversations() {
  const found = await store.conversations();
  $('conversations').replaceChildren(...found.map((one) => {
    const current = one.id === conversation?.id;
    const open = button(one.title, () => openConversation(one), { class: 'open', title: one.title });
    if (current) open.setAttribute('aria-current', 'true');
    const named = { class: 'icon', 'aria-label': `Delete ${one.title}`, title: 'Delete' };
    return h('li', { class: current ? 'current' : '' }, open, button(cross(), () => deleteConversation(one), named));
  }));
}

async function openConversation(one) {
  const found = await store.nodes(one.id);
  // What is running here is newer than what is kept.
  const live = running.get(one.id)?.node;
  if (live) found.set(live.id, live);
  conversation = one;
  nodes = found;
  remembered.set('conversation', one.id, sessionStorage);
  $('system').value = one.system;
  closeSide();
  showConversation();
  listConversations();
}

function newConversation() {
  conversation = null;
  nodes = new Map();
  remembered.set('conversation', '', sessionStorage);
  $('system').value = remembered.get('system');
  closeSide();
  showConversation();
  listConversations();
  $('message').focus();
}

/** Return the conversation that is shown; a new one begins with its first message. */
function currentConversation(text) {
  if (conversation) return conversation;
  const title = text.trim().replace(/\s+/g, ' ').slice(0, 60) || 'An image';
  conversation = { id: randomId(), title, created: Date.now(), changed: Date.now(), system: $('system').value, leaf: null };
  remembered.set('conversation', conversation.id, sessionStorage);
  return conversation;
}

async function keep(name, value) {
  if (deleted.has(value.conversation ?? value.id)) return;
  try {
    await store.put(name, value);
  } catch (error) {
    notice(`This browser could not keep the conversation: ${error.message}`);
  }
}

async function deleteConversation(one) {
  deleted.add(one.id);
  running.get(one.id)?.controller.abort();
  const gone = await store.remove(one.id);
  if (conversation?.id === one.id) newConversation();
  else await listConversations();
  toast(`“${one.title}” was deleted.`, 'Undo', async () => {
    deleted.delete(one.id);
    await Promise.all([keep('conversations', one), ...[...gone.values()].map((node) => keep('nodes', node))]);
    await openConversation(one);
  });
}

async function deleteAll() {
  $('settings').close();
  const found = await store.conversations();
  if (!found.length) {
    toast('There is no conversation.');
    return;
  }
  $('sure-text').textContent = found.length === 1
    ? 'Delete the conversation? It cannot be brought back.'
    : `Delete all ${number(found.length)} conversations? They cannot be brought back.`;
  $('sure').returnValue = 'no';
  $('sure').showModal();
  await new Promise((resolve) => { $('sure').addEventListener('close', resolve, { once: true }); });
  if ($('sure').returnValue !== 'yes') return;
  for (const { controller } of running.values()) controller.abort();
  for (const one of found) {
    deleted.add(one.id);
    await store.remove(one.id);
  }
  newConversation();
}

// --- what is shown ------------------------------------------------------------------------------------------

const shownPath = () => (conversation ? pathTo(nodes, conversation.leaf) : []);

function showConversation() {
  const path = shownPath();
  $('title').textContent = conversation?.title ?? 'New conversation';
  document.title = conversation ? `${conversation.title} · ortlm` : 'ortlm';
  $('welcome').hidden = path.length > 0;
  showMessages(path, doing);
  showRunning();
  showUsed();
  follow();
}

function showRunning() {
  const busy = doing.isBusy();
  $('send').hidden = busy;
  $('stop').hidden = !busy;
  $('main').setAttribute('aria-busy', String(busy));
}

/** Show tokens per second and the context that the last answer used. */
function showUsed() {
  const answers = shownPath().findLast((node) => node.role === 'assistant')?.answers ?? [];
  const speeds = answers.map(speedOf).filter(Boolean);
  $('speed').textContent = speeds.map((speed) => `${number(speed, 1)} tokens/s`).join(' | ');
  const [answer] = answers;
  const context = picker.modelNamed(answer?.model)?.context_tokens;
  $('used').hidden = !(answer?.promptTokens && context);
  if ($('used').hidden) return;
  const used = answer.promptTokens + answer.tokens;
  $('context').max = context;
  $('context').value = used;
  $('context-text').textContent = `${number(used)} of ${number(context)} tokens`;
}

const isAtEnd = () => $('scroll').scrollHeight - $('scroll').scrollTop - $('scroll').clientHeight < 80;

function follow() {
  $('scroll').scrollTop = $('scroll').scrollHeight;
}

// --- what is asked ------------------------------------------------------------------------------------------

async function loadModels() {
  try {
    await picker.loadModels();
  } catch (error) {
    if (error.status === 401) askForKey(key.get() ? 'The server does not take this key.' : '');
    else notice(error.message, ['Try again', loadModels]);
    return;
  }
  notice('');
  showUsed();
}

async function send() {
  const text = $('message').value;
  const images = attached();
  if ((!text.trim() && !images.length) || doing.isBusy()) return;
  if (!picker.chosenModel()) {
    notice('There is no model yet.', ['Try again', loadModels]);
    return;
  }
  const parent = conversation?.leaf ?? null;
  const one = currentConversation(text);
  $('message').value = '';
  keepDraft();
  grow();
  clearImages();
  await addUser(one, makeNode(one.id, parent, { role: 'user', text: text.trim(), images }));
}

async function addUser(one, node) {
  nodes.set(node.id, node);
  one.leaf = node.id;
  one.changed = Date.now();
  const kept = Promise.all([keep('nodes', node), keep('conversations', one)]);
  kept.then(listConversations);
  await generate(one, node, kept);
}

/** Let the chosen models answer what ends with the user's `node`, once it is `kept`. */
async function generate(one, node, kept) {
  const made = makeNode(one.id, node.id, {
    role: 'assistant',
    answers: picker.chosenModels().map(({ name }) => makeAnswer(name)),
  });
  const path = pathTo(nodes, node.id);
  nodes.set(made.id, made);
  one.leaf = made.id;
  const controller = new AbortController();
  running.set(one.id, { controller, node: made });
  const shows = path.some((each) => each.role === 'user' && each.images.length);
  const body = { messages: messagesOf(path, one.system), ...parameters(), ...(shows ? {} : { return_token_ids: true }) };
  const changed = drawing(one, made);
  showConversation();
  say('The answer begins.');
  // Before anything is asked, so that nothing is lost.
  await kept;
  await Promise.all([keep('nodes', made), keep('conversations', one)]);
  await Promise.all(made.answers.map((answer) => stream(answer, body, controller.signal, changed)));
  running.delete(one.id);
  one.changed = Date.now();
  if (made.answers.length < 2) delete made.answers[0].promptIds;
  await Promise.all([keep('nodes', made), keep('conversations', one)]);
  changed();
  if (conversation?.id === one.id) showRunning();
  listConversations();
  const [{ state, text }] = made.answers;
  if (state !== 'failed') say(`The answer ${state === 'stopped' ? 'was stopped' : 'is complete'}. ${text}`);
  if (made.answers.some((answer) => answer.status === 401)) askForKey('The server does not take this key.');
  if (made.answers.length > 1 && made.answers.every((answer) => answer.state !== 'failed')) await compare(made);
}

/** Return what to call whenever `node` has changed: it is drawn and kept, neither too often. */
function drawing(one, node) {
  let saved = 0;
  let frame = 0;
  const draw = () => {
    frame = 0;
    if (conversation?.id !== one.id) return;
    const ended = isAtEnd();
    updateMessage(node.id);
    showUsed();
    if (ended) follow();
  };
  return () => {
    frame ||= requestAnimationFrame(draw);
    if (Date.now() - saved > SAVE_PAUSE) {
      saved = Date.now();
      keep('nodes', node);
    }
  };
}

/** Make the answer number `at` of a pair one of its own, with which the conversation continues. */
async function continueWith(node, at) {
  const { promptIds, scores, ...answer } = node.answers[at];
  const made = makeNode(node.conversation, node.parent, { role: 'assistant', answers: [answer] });
  nodes.set(made.id, made);
  conversation.leaf = made.id;
  await Promise.all([keep('nodes', made), keep('conversations', conversation)]);
  showConversation();
}

/** Let both models of a pair score the tokens of both answers. */
async function compare(node) {
  const [left, right] = node.answers;
  if (!picker.sameTokens(left.model, right.model)) {
    node.incomparable = 'The models have different tokenizers, so their tokens cannot be compared.';
  } else if (!left.promptIds || !right.promptIds) {
    node.incomparable = 'Tokens are compared for texts only, not with images.';
  } else if (!left.ids.length || !right.ids.length) {
    node.incomparable = 'An answer without tokens cannot be compared.';
  } else {
    comparing.add(node.id);
    updateMessage(node.id);
    try {
      [left.scores, right.scores] = await score(node.answers);
      node.compareError = '';
      // They are the same for both, and long.
      delete left.promptIds;
      delete right.promptIds;
      say('The tokens are compared.');
    } catch (error) {
      node.compareError = error.message;
    }
    comparing.delete(node.id);
  }
  const ended = isAtEnd();
  updateMessage(node.id);
  if (ended) follow();
  await keep('nodes', node);
}

function stop() {
  if (conversation) running.get(conversation.id)?.controller.abort();
}

// --- the message, the key and the list on phones ------------------------------------------------------------

function grow() {
  const field = $('message');
  field.style.height = 'auto';
  field.style.height = `${Math.min(field.scrollHeight, 240)}px`;
}

function keepDraft() {
  remembered.set('draft', $('message').value, sessionStorage);
}

function askForKey(wrong) {
  $('key-wrong').textContent = wrong;
  $('key-value').value = '';
  $('key-keep').checked = Boolean(remembered.get('key'));
  if (!$('key').open) $('key').showModal();
}

function openSide() {
  document.body.classList.add('side');
  $('shade').hidden = false;
  $('main').inert = true;
  $('open-side').setAttribute('aria-expanded', 'true');
  $('close-side').focus();
}

function closeSide() {
  if (!document.body.classList.contains('side')) return;
  document.body.classList.remove('side');
  $('shade').hidden = true;
  $('main').inert = false;
  $('open-side').setAttribute('aria-expanded', 'false');
  $('open-side').focus();
}

// --- what people do -----------------------------------------------------------------------------------------

function listenToMessage() {
  $('composer').addEventListener('submit', (event) => {
    event.preventDefault();
    send();
  });
  $('message').addEventListener('input', () => {
    grow();
    keepDraft();
  });
  $('message').addEventListener('keydown', (event) => {
    if (isSend(event)) {
      event.preventDefault();
      send();
    }
    const last = shownPath().findLast((node) => node.role === 'user');
    if (event.key === 'ArrowUp' && !$('message').value && last) {
      event.preventDefault();
      editMessage(last, doing);
    }
  });
  $('message').addEventListener('paste', (event) => {
    const files = [...event.clipboardData.files];
    if (files.length) {
      event.preventDefault();
      addImages(files);
    }
  });
  document.addEventListener('dragover', (event) => event.preventDefault());
  document.addEventListener('drop', (event) => {
    event.preventDefault();
    if (event.dataTransfer.files.length) addImages([...event.dataTransfer.files]);
  });
  $('attach').addEventListener('click', () => $('files').click());
  $('files').addEventListener('change', async () => {
    await addImages([...$('files').files]);
    $('files').value = '';
  });
  $('stop').addEventListener('click', stop);
}

function listenToRest() {
  document.addEventListener('keydown', (event) => {
    if (event.key !== 'Escape' || document.querySelector('dialog[open]')) return;
    if (document.body.classList.contains('side')) closeSide();
    else stop();
  });
  $('new').addEventListener('click', newConversation);
  $('open-side').addEventListener('click', openSide);
  $('close-side').addEventListener('click', closeSide);
  $('shade').addEventListener('click', closeSide);
  $('model').addEventListener('change', picker.modelChanged);
  $('other').addEventListener('change', () => remembered.set('other', $('other').value));
  $('show-settings').addEventListener('click', () => $('settings').showModal());
  $('show-quality').addEventListener('click', () => showQuality(picker.chosenModels()));
  $('system').addEventListener('input', () => {
    remembered.set('system', $('system').value);
    if (!conversation) return;
    conversation.system = $('system').value;
    keep('conversations', conversation);
  });
  $('reset').addEventListener('click', reset);
  $('change-key').addEventListener('click', () => {
    $('settings').close();
    askForKey('');
  });
  $('delete-all').addEventListener('click', deleteAll);
  $('key-form').addEventListener('submit', () => {
    key.set($('key-value').value.trim(), $('key-keep').checked);
    loadModels();
  });
  $('theme').value = remembered.get('theme');
  $('theme').addEventListener('change', () => {
    remembered.set('theme', $('theme').value);
    document.documentElement.dataset.theme = $('theme').value;
  });
  // What came since it was last kept.
  addEventListener('pagehide', () => {
    for (const { node } of running.values()) keep('nodes', node);
  });
}

async function begin() {
  makeFields();
  listenToMessage();
  listenToRest();
  $('message').value = remembered.get('draft', sessionStorage);
  grow();
  const found = await store.conversations();
  const last = found.find((one) => one.id === remembered.get('conversation', sessionStorage));
  if (last) await openConversation(last);
  else newConversation();
  await loadModels();
  if (!(await store.isKept())) notice('This browser keeps nothing for this page: conversations end with the tab.');
}

begin();
