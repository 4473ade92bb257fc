// Markdown: the server makes safe HTML of it. Nowhere else does text become HTML.

import { button, h } from './dom.js';
import { post } from './api.js';

const policy = window.trustedTypes?.createPolicy('ortlm', { createHTML: (html) => html });
const known = new Map();
const MOST_KNOWN = 300;
// While an answer comes.
const PAUSE = 120;

/** Shows Markdown in `place`; what it showed before stays where it is the same, so that selections do. */
export class Markdown {
  constructor(place) {
    this.place = place;
    this.parts = [];
    this.wanted = null;
    this.busy = false;
  }

  /** Show `text`, as soon as what was asked before is shown. */
  show(text) {
    this.wanted = text;
    if (!this.place.childNodes.length) this.plain(text);
    if (!this.busy) this.run();
  }

  async run() {
    this.busy = true;
    while (this.wanted !== null) {
      const text = this.wanted;
      this.wanted = null;
      const began = performance.now();
      try {
        this.put(await rendered(text));
      } catch {
        // Without the server, or for a text that is too long.
        this.plain(text);
      }
      // Long texts take the server's time from the answer itself.
      const pause = Math.max(PAUSE, 4 * (performance.now() - began));
      if (this.wanted !== null) await new Promise((resolve) => setTimeout(resolve, pause));
    }
    this.busy = false;
  }

  plain(text) {
    this.parts = [];
    this.place.classList.add('plain');
    this.place.textContent = text;
  }

  put(html) {
    if (this.place.classList.contains('plain')) this.place.replaceChildren();
    this.place.classList.remove('plain');
    const made = document.createElement('template');
    made.innerHTML = policy ? policy.createHTML(html) : html;
    const elements = [...made.content.children];
    const parts = elements.map((element) => element.outerHTML);
    let same = 0;
    while (same < parts.length && parts[same] === this.parts[same]) same += 1;
    while (this.place.children.length > same) this.place.lastElementChild.remove();
    this.place.append(...elements.slice(same).map(dressed));
    this.parts = parts;
  }
}

async function rendered(text) {
  if (known.has(text)) return known.get(text);
  const { html } = await post('/page/render', { text });
  known.set(text, html);
  if (known.size > MOST_KNOWN) known.delete(known.keys().next().value);
  return html;
}

/** Return `element` with what the page adds to it. */
function dressed(element) {
  if (element.matches('table')) return h('div', { class: 'wide', tabIndex: 0, role: 'group', 'aria-label': 'Table' }, element);
  if (!element.matches('pre')) return element;
  const code = element.querySelector('code');
  const language = [...(code?.classList ?? [])].find((name) => name.startsWith('language-'))?.slice(9) ?? '';
  element.tabIndex = 0;
  const copy = button('Copy', () => copied(element.textContent, copy), { class: 'quiet', 'aria-label': 'Copy the code' });
  return h('div', { class: 'code' }, h('div', { class: 'bar' }, h('span', {}, language || 'text'), copy), element);
}

/** Copy `text`, and say so on the button `pressed`. */
export async function copied(text, pressed) {
  const before = pressed.textContent;
  try {
    await navigator.clipboard.writeText(text);
    pressed.textContent = 'Copied';
  } catch {
    // Only at localhost and with TLS.
    pressed.textContent = 'Not allowed here';
  }
  setTimeout(() => { pressed.textContent = before; }, 1500);
}
