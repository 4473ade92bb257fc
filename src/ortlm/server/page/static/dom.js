// Elements, and what is said to people who do not see them.

export const $ = (id) => document.getElementById(id);

/** Return a new element: `fields` are its properties, or attributes where their names hold a hyphen. */
export function h(tag, fields = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(fields)) {
    if (value === undefined || value === null) continue;
    if (name.includes('-') || name === 'for' || name === 'role') made.setAttribute(name, value);
    else if (name === 'class') made.className = value;
    else made[name] = value;
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Return a button that calls `pressed`; `content` is a text or an element. */
export const button = (content, pressed, fields = {}) =>
  h('button', { type: 'button', onclick: pressed, ...fields }, content);

/** Return a cross, for what can be removed. */
export function cross() {
  const names = 'http://www.w3.org/2000/svg';
  const svg = document.createElementNS(names, 'svg');
  svg.setAttribute('viewBox', '0 0 24 24');
  svg.setAttribute('aria-hidden', 'true');
  const path = document.createElementNS(names, 'path');
  path.setAttribute('d', 'M7 7l10 10M17 7L7 17');
  svg.append(path);
  return svg;
}

/** Return whether a key that was pressed sends what is written; on phones it is the only way to a new line. */
export const isSend = (event) =>
  event.key === 'Enter' && !event.shiftKey && !event.isComposing && !matchMedia('(pointer: coarse)').matches;

/** Let screen readers say `text`. */
export function say(text) {
  $('spoken').textContent = text;
}

/** Show `text` for a while, with a button if `action` names one. */
export function toast(text, action, pressed) {
  const place = $('toast');
  const done = () => place.replaceChildren();
  place.replaceChildren(h('span', {}, text), ...(action ? [button(action, () => { done(); pressed(); })] : []));
  clearTimeout(toast.timer);
  toast.timer = setTimeout(done, 8000);
}

/** Show `text` above the conversation, with a button if `action` has its text and what it does; "" shows nothing. */
export function notice(text, action) {
  $('notice').replaceChildren(...(text ? [h('span', {}, text), ...(action ? [button(...action)] : [])] : []));
}

/** What this browser remembers under `name`; nothing where that is forbidden. */
export const remembered = {
  get(name, place = localStorage) {
    try {
      return place.getItem(`ortlm.${name}`) ?? '';
    } catch {
      return '';
    }
  },
  set(name, value, place = localStorage) {
    try {
      if (value) place.setItem(`ortlm.${name}`, value);
      else place.removeItem(`ortlm.${name}`);
    } catch {
      // It is as if the page were new each time.
    }
  },
};

export const number = (value, digits = 0) =>
  value.toLocaleString('en-US', { minimumFractionDigits: digits, maximumFractionDigits: digits });
