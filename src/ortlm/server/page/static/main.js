// The page: what is shown where, and what happens when somebody does something.

import { AnswerView, makeAnswer, speedOf, stream } from './answer.js';
import { get, key } from './api.js';
import { legend, score, tokenView, viewSwitch } from './compare.js';
import { $, button, h, number, remembered, say, toast } from './dom.js';
import { showQuality } from './quality.js';
import { copied } from './render.js';
import { makeFields, parameters, reset, showDefaults } from './settings.js';
import * as store from './store.js';
import { childrenOf, makeNode, messagesOf, newestLeaf, pathTo, randomId } from './tree.js';

const MOST_IMAGE_BYTES = 16 << 20;
const SAVE_PAUSE = 300;

let models = [];
let conversation = null;
let nodes = new Map();
// Of the conversation that is shown, by node: what to call when it changes.
let views = new Map();
let images = [];
let showsTokens = remembered.get('text') === '';
// What is being answered, by conversation: { controller, node }.
const running = new Map();
// What ends later is not to bring them back.
const deleted = new Set();

// --- models -------------------------------------------------------------------------------------------------

const modelNamed = (name) => models.find((model) => model.name === name);
const chosenModel = () => modelNamed($('model').value);
const otherModel = () => modelNamed($('other').value);

async function loadModels() {
  try {
    models = (await get('/page/models')).models;
  } catch (error) {
    if (error.status === 401) askForKey(key.get() ? 'The server does not take this key.' : '');
    else notice(error.message, ['Try again', loadModels]);
    return;
  }
  notice('');
  const wanted = $('model').value || remembered.get('model');
  $('model').replaceChildren(...models.map((model) => h('option', { value: model.name }, described(model))));
  if (modelNamed(wanted)) $('model').value = wanted;
  modelChanged();
}

function described(model) {
  const marks = [model.images ? 'images' : '', model.reasoning ? 'reasoning' : ''].filter(Boolean);
  return model.name + (marks.length ? ` (${marks.join(', ')})` : '');
}

function modelChanged() {
  const model = chosenModel();
  if (!model) return;
  remembered.set('model', model.name);
  const before = $('other').value || remembered.get('other');
  const others = models.filter((other) => other.name !== model.name);
  $('other').replaceChildren(
    h('option', { value: '' }, 'No other'),
    ...others.map((other) => h(
      'option',
      { value: other.name },
      other.name + (sameTokens(model, other) ? '' : ' (other tokenizer)'),
    )),
  );
  if (others.some((other) => other.name === before)) $('other').value = before;
  $('other-field').hidden = !others.length;
  $('attach').hidden = model.images === false;
  showDefaults(model);
  aboutModel(model);
  otherChanged();
}

function otherChanged() {
  remembered.set('other', $('other').value);
  showUsed();
}

function aboutModel(model) {
  const about = model.about ?? {};
  const facts = [
    about.parameters ? `${number(about.parameters / 1e6)} million parameters` : '',
    about.bits_per_weight ? `${number(about.bits_per_weight, 1)} bits per weight` : about.precision,
    model.context_tokens ? `a context of ${number(model.context_tokens)} tokens` : '',
  ].filter(Boolean);
  $('about-model').textContent = model.chat === false
    ? `${model.name} has no chat template, so it cannot be talked to. Use /v1/completions.`
    : [model.name, ...facts].join(' · ');
}

const sameTokens = (a, b) => Boolean(a && b && a.vocabulary && a.vocabulary === b.vocabulary);

// --- conversations ------------------------------------------------------------------------------------------

async function listConversations() {
  const found = await store.conversations();
  $('conversations').replaceChildren(...found.map((one) => {
    const current = one.id === conversation?.id;
    const open = button(one.title, () => openConversation(one), { class: 'open', title: one.title });
    if (current) open.setAttribute('aria-current', 'true');
    const gone = button('', () => deleteConversation(one), { class: 'icon', 'aria-label': `Delete ${one.title}`, title: 'Delete' });
    gone.append(cross());
    return h('li', { class: current ? 'current' : '' }, open, gone);
  }));
}

function cross() {
  const names = 'http://www.w3.org/2000/svg';
  const svg = document.createElementNS(names, 'svg');
  svg.setAttribute('viewBox', '0 0 24 24');
  svg.setAttribute('aria-hidden', 'true');
  const path = document.createElementNS(names, 'path');
  path.setAttribute('d', 'M7 7l10 10M17 7L7 17');
  svg.append(path);
  return svg;
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
    await Promise.all([store.put('conversations', one), ...[...gone.values()].map((node) => store.put('nodes', node))]);
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

function showConversation() {
  const path = conversation ? pathTo(nodes, conversation.leaf) : [];
  views = new Map();
  $('title').textContent = conversation?.title ?? 'New conversation';
  document.title = conversation ? `${conversation.title} · ortlm` : 'ortlm';
  $('welcome').hidden = path.length > 0;
  $('log').replaceChildren(...path.map((node) => (node.role === 'user' ? userItem(node) : assistantItem(node))));
  showRunning();
  showUsed();
  $('scroll').scrollTop = $('scroll').scrollHeight;
}

function userItem(node) {
  const bubble = h(
    'div',
    { class: 'bubble' },
    ...node.images.map((url, at) => h('img', { src: url, alt: `Attached image ${at + 1}` })),
    node.text ? h('div', { class: 'said' }, node.text) : null,
  );
  const copy = button('Copy', () => copied(node.text, copy), { class: 'quiet', 'aria-label': 'Copy the message' });
  const edit = button('Edit', () => editNode(node, item), { class: 'quiet', 'aria-label': 'Edit the message' });
  const item = h(
    'li',
    { class: 'user', 'data-node': node.id },
    h('span', { class: 'hidden' }, 'You:'),
    bubble,
    h('div', { class: 'actions' }, branches(node), edit, copy),
  );
  return item;
}

function assistantItem(node) {
  const pair = node.answers.length > 1;
  const live = () => running.get(node.conversation)?.node.id === node.id;
  const again = () => regenerate(node);
  const shown = node.answers.map((answer) => new AnswerView(answer, { named: pair, again, live }));
  const columns = h('div', { class: pair ? 'columns' : '' }, ...shown.map((view) => view.element));
  const regenerated = button('Regenerate', again, { class: 'quiet' });
  const actions = h('div', { class: 'actions' }, branches(node), regenerated, shown[0].copier());
  const compared = h('div', { class: 'compared' });
  const chosen = button('Continue with this answer', () => continueWith(node, 1), { class: 'quiet' });
  if (pair) shown[1].element.append(h('div', { class: 'actions' }, chosen));
  const update = () => {
    shown.forEach((view) => view.update());
    actions.hidden = live();
    chosen.hidden = live() || !node.answers.at(-1).text;
    if (pair) showCompared(node, shown, compared, update);
  };
  views.set(node.id, update);
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

/** Return ‹ 1 of 2 › where a node has siblings. */
function branches(node) {
  const all = childrenOf(nodes, node.parent).filter((other) => other.role === node.role);
  if (all.length < 2) return null;
  const at = all.findIndex((other) => other.id === node.id);
  const go = (step) => {
    conversation.leaf = newestLeaf(nodes, all[at + step]).id;
    keep('conversations', conversation);
    const scrolled = $('scroll').scrollTop;
    showConversation();
    $('scroll').scrollTop = scrolled;
    const place = document.querySelector(`[data-node="${all[at + step].id}"] .branches`);
    (place?.querySelector(step < 0 ? 'button:first-child:enabled' : 'button:last-child:enabled') ?? place?.querySelector('button:enabled'))?.focus();
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

function showCompared(node, shown, place, update) {
  const [left, right] = node.answers;
  const scored = Boolean(left.scores && right.scores);
  const live = running.get(node.conversation)?.node.id === node.id;
  shown.forEach((view, at) => {
    const tokens = scored && showsTokens;
    view.content.hidden = view.thinking.hidden = tokens;
    if (!tokens && !view.answer.reasoning) view.thinking.hidden = true;
    view.tokens.hidden = !tokens;
    if (tokens && !view.tokens.childNodes.length) {
      const names = { left: left.model, right: right.model, id: `token-${node.id}-${at}` };
      view.tokens.append(tokenView(view.answer, names));
    }
  });
  if (scored) {
    if (place.dataset.shows === String(showsTokens)) return;
    place.dataset.shows = String(showsTokens);
    place.replaceChildren(
      viewSwitch(showsTokens, (tokens) => {
        showsTokens = tokens;
        remembered.set('text', tokens ? '' : 'yes');
        for (const one of views.values()) one();
        place.querySelector('[aria-pressed="true"]').focus();
      }),
      legend(node.answers),
    );
    return;
  }
  if (node.comparing) place.replaceChildren(h('p', { class: 'meta' }, 'Comparing the tokens …'));
  else if (node.compareError) {
    place.replaceChildren(h(
      'p',
      { class: 'error' },
      h('span', {}, `The tokens could not be compared. ${node.compareError}`),
      button('Try again', () => compare(node, update)),
    ));
  } else if (!live && node.incomparable) place.replaceChildren(h('p', { class: 'meta' }, node.incomparable));
  else place.replaceChildren();
}

async function compare(node, changed) {
  const [left, right] = node.answers;
  if (!sameTokens(modelNamed(left.model), modelNamed(right.model))) {
    node.incomparable = 'The models have different tokenizers, so their tokens cannot be compared.';
  } else if (!left.promptIds || !right.promptIds) {
    node.incomparable = 'Tokens are compared for texts only, not with images.';
  } else if (!left.ids.length || !right.ids.length) {
    node.incomparable = 'An answer without tokens cannot be compared.';
  }
  if (!node.incomparable) {
    node.comparing = true;
    node.compareError = '';
    changed();
    try {
      [left.scores, right.scores] = await score(node.answers);
      // They are the same for both, and long.
      delete left.promptIds;
      delete right.promptIds;
      say('The tokens are compared.');
    } catch (error) {
      node.compareError = error.message;
    }
    node.comparing = false;
  }
  changed();
  await keep('nodes', node);
}

function showRunning() {
  const busy = Boolean(conversation && running.has(conversation.id));
  $('send').hidden = busy;
  $('stop').hidden = !busy;
  $('main').setAttribute('aria-busy', String(busy));
}

/** Show tokens per second and the context that the last answer used. */
function showUsed() {
  const path = conversation ? pathTo(nodes, conversation.leaf) : [];
  const answers = path.findLast((node) => node.role === 'assistant')?.answers ?? [];
  const speeds = answers.map(speedOf).filter(Boolean);
  $('speed').textContent = speeds.map((speed) => `${number(speed, 1)} tokens/s`).join(' | ');
  const [answer] = answers;
  const context = modelNamed(answer?.model)?.context_tokens;
  $('used').hidden = !(answer?.promptTokens && context);
  if ($('used').hidden) return;
  const used = answer.promptTokens + answer.tokens;
  $('context').max = context;
  $('context').value = used;
  $('context-text').textContent = `${number(used)} of ${number(context)} tokens`;
}

function notice(text, action) {
  $('notice').replaceChildren(...(text ? [h('span', {}, text), ...(action ? [button(...action)] : [])] : []));
}

const isAtEnd = () => $('scroll').scrollHeight - $('scroll').scrollTop - $('scroll').clientHeight < 80;

function follow() {
  $('scroll').scrollTop = $('scroll').scrollHeight;
}

// --- what is asked ------------------------------------------------------------------------------------------

async function send() {
  const text = $('message').value;
  if ((!text.trim() && !images.length) || (conversation && running.has(conversation.id))) return;
  if (!chosenModel()) {
    notice('There is no model yet.', ['Try again', loadModels]);
    return;
  }
  const parent = conversation?.leaf ?? null;
  const one = currentConversation(text);
  const node = makeNode(one.id, parent, { role: 'user', text: text.trim(), images });
  $('message').value = '';
  images = [];
  keepDraft();
  grow();
  showImages();
  await addUser(one, node);
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
  const asked = [chosenModel(), otherModel()].filter(Boolean).map((model) => model.name);
  const made = makeNode(one.id, node.id, { role: 'assistant', answers: asked.map(makeAnswer) });
  const own = nodes;
  own.set(made.id, made);
  one.leaf = made.id;
  const controller = new AbortController();
  running.set(one.id, { controller, node: made });
  const path = pathTo(own, node.id);
  const messages = messagesOf(path, one.system);
  const shows = path.some((each) => each.role === 'user' && each.images.length);
  const body = { messages, ...parameters(), ...(shows ? {} : { return_token_ids: true }) };
  let saved = 0;
  let frame = 0;
  const draw = () => {
    frame = 0;
    if (conversation?.id !== one.id) return;
    const ended = isAtEnd();
    views.get(made.id)?.();
    showUsed();
    if (ended) follow();
  };
  const changed = () => {
    frame ||= requestAnimationFrame(draw);
    if (Date.now() - saved > SAVE_PAUSE) {
      saved = Date.now();
      keep('nodes', made);
    }
  };
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
  if (conversation?.id === one.id) {
    showRunning();
    draw();
  }
  const [answer] = made.answers;
  say(answer.state === 'failed' ? '' : `The answer ${answer.state === 'stopped' ? 'was stopped' : 'is complete'}. ${answer.text}`);
  if (made.answers.some((each) => each.status === 401)) askForKey('The server does not take this key.');
  listConversations();
  if (made.answers.length > 1 && made.answers.every((each) => each.state !== 'failed')) await compare(made, draw);
}

function regenerate(node) {
  if (running.has(node.conversation)) return;
  generate(conversation, nodes.get(node.parent));
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

function editNode(node, item) {
  if (running.has(node.conversation)) return;
  const field = h('textarea', { value: node.text, rows: Math.min(12, node.text.split('\n').length + 1), 'aria-label': 'Edit the message' });
  const cancel = () => {
    form.replaceWith(...before);
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
    if (!field.value.trim() && !node.images.length) return;
    addUser(conversation, makeNode(node.conversation, node.parent, { role: 'user', text: field.value.trim(), images: node.images }));
  });
  field.addEventListener('keydown', (event) => {
    if (event.key === 'Escape') {
      event.stopPropagation();
      cancel();
    }
    if (isSend(event)) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  const before = [...item.children];
  item.replaceChildren(form);
  field.focus();
  field.setSelectionRange(field.value.length, field.value.length);
}

function stop() {
  if (conversation) running.get(conversation.id)?.controller.abort();
}

// --- the message --------------------------------------------------------------------------------------------

// Enter on a phone's keyboard is the only way to a new line.
const isSend = (event) =>
  event.key === 'Enter' && !event.shiftKey && !event.isComposing && !matchMedia('(pointer: coarse)').matches;

function grow() {
  const field = $('message');
  field.style.height = 'auto';
  field.style.height = `${Math.min(field.scrollHeight, 240)}px`;
}

function keepDraft() {
  remembered.set('draft', $('message').value, sessionStorage);
}

async function addImages(files) {
  if (chosenModel()?.images === false) {
    toast(`${chosenModel().name} is a model of text and takes no images.`);
    return;
  }
  for (const file of files) {
    if (!/^image\/(png|jpeg|webp|gif)$/.test(file.type)) toast(`${file.name} is no PNG, JPEG, WebP or GIF.`);
    else if (file.size > MOST_IMAGE_BYTES) toast(`${file.name} is larger than 16 MB.`);
    else images = [...images, await dataUrl(file)];
  }
  showImages();
}

const dataUrl = (file) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(file);
});

function showImages() {
  $('images').replaceChildren(...images.map((url, at) => {
    const gone = button('', () => {
      images = images.filter((_, other) => other !== at);
      showImages();
      $('message').focus();
    }, { class: 'icon', 'aria-label': `Remove image ${at + 1}` });
    gone.append(cross());
    return h('li', {}, h('img', { src: url, alt: `Image ${at + 1}` }), gone);
  }));
}

// --- the key, the list, and the rest ------------------------------------------------------------------------

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

function listen() {
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
    if (event.key === 'ArrowUp' && !$('message').value) {
      const last = [...document.querySelectorAll('#log > .user')].at(-1);
      if (last) {
        event.preventDefault();
        editNode(nodes.get(last.dataset.node), last);
      }
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
  document.addEventListener('keydown', (event) => {
    if (event.key !== 'Escape' || document.querySelector('dialog[open]')) return;
    if (document.body.classList.contains('side')) closeSide();
    else stop();
  });
  $('stop').addEventListener('click', stop);
  $('new').addEventListener('click', newConversation);
  $('model').addEventListener('change', modelChanged);
  $('other').addEventListener('change', otherChanged);
  $('attach').addEventListener('click', () => $('files').click());
  $('files').addEventListener('change', async () => {
    await addImages([...$('files').files]);
    $('files').value = '';
  });
  $('show-settings').addEventListener('click', () => $('settings').showModal());
  $('show-quality').addEventListener('click', () => showQuality([chosenModel(), otherModel()].filter(Boolean)));
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
  $('open-side').addEventListener('click', openSide);
  $('close-side').addEventListener('click', closeSide);
  $('shade').addEventListener('click', closeSide);
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
  listen();
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
