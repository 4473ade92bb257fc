// A conversation is a tree: an edited message or another answer is one more child of the same parent.
//
// A node: { id, conversation, parent, role, created }, and of a user { text, images }, of an assistant { answers }:
// one, or two side by side. An answer: { model, text, reasoning, state, … }, see answer.js.

let last = 0;

/** Return a new node; its `created` is unique in this tab, so that siblings have an order. */
export function makeNode(conversation, parent, fields) {
  last = Math.max(Date.now(), last + 1);
  return { id: crypto.randomUUID?.() ?? randomId(), conversation, parent, created: last, ...fields };
}

/** Return a random name; browsers have randomUUID at localhost and with TLS only. */
export function randomId() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, '0')).join('');
}

export const childrenOf = (nodes, parent) => [...nodes.values()].filter((node) => node.parent === parent);

/** Return the nodes from the first message to `leaf`. */
export function pathTo(nodes, leaf) {
  const path = [];
  for (let node = nodes.get(leaf); node && path.length <= nodes.size; node = nodes.get(node.parent)) path.push(node);
  return path.reverse();
}

/** Return the newest end of the tree below `node`. */
export function newestLeaf(nodes, node) {
  let found = node;
  for (;;) {
    const below = childrenOf(nodes, found.id);
    if (!below.length) return found;
    found = below.at(-1);
  }
}

/** Return what the model is sent for `path`: its first answers, and as one what follows an empty answer. */
export function messagesOf(path, system) {
  const messages = system.trim() ? [{ role: 'system', content: system }] : [];
  for (const node of path) {
    if (node.role === 'assistant') {
      if (node.answers[0].text) messages.push({ role: 'assistant', content: node.answers[0].text });
      continue;
    }
    const parts = [
      ...node.images.map((url) => ({ type: 'image_url', image_url: { url } })),
      ...(node.text ? [{ type: 'text', text: node.text }] : []),
    ];
    const before = messages.at(-1);
    // Many templates want roles to alternate.
    if (before?.role === 'user') before.parts.push(...parts);
    else messages.push({ role: 'user', parts });
  }
  return messages.map(({ role, content, parts }) => ({ role, content: content ?? plain(parts) }));
}

/** Return parts that are all text as one text, which templates without images take too. */
function plain(parts) {
  return parts.every((part) => part.type === 'text') ? parts.map((part) => part.text).join('\n\n') : parts;
}
