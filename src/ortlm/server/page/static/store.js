// Conversations in IndexedDB. Each message is a record of its own, so that two tabs never overwrite each other's.

const memory = { conversations: new Map(), nodes: new Map() };

/** The database, or null where the browser has none for this page: then everything ends with the tab. */
const opened = new Promise((resolve) => {
  try {
    const request = indexedDB.open('ortlm', 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore('conversations', { keyPath: 'id' });
      request.result.createObjectStore('nodes', { keyPath: 'id' }).createIndex('conversation', 'conversation');
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => resolve(null);
  } catch {
    resolve(null);
  }
});

const finished = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

export const isKept = async () => (await opened) !== null;

/** Return all conversations, the last changed first. */
export async function conversations() {
  const database = await opened;
  const found = database
    ? await finished(database.transaction('conversations').objectStore('conversations').getAll())
    : [...memory.conversations.values()];
  return found.sort((a, b) => b.changed - a.changed);
}

/** Return the messages of a conversation by id, in the order in which they were made. */
export async function nodes(conversation) {
  const database = await opened;
  const found = database
    ? await finished(database.transaction('nodes').objectStore('nodes').index('conversation').getAll(conversation))
    : [...memory.nodes.values()].filter((node) => node.conversation === conversation);
  return new Map(found.sort((a, b) => a.created - b.created).map((node) => [node.id, node]));
}

/** Keep `value` in the store `name`: 'conversations' or 'nodes'. */
export async function put(name, value) {
  const database = await opened;
  if (!database) memory[name].set(value.id, value);
  else await finished(database.transaction(name, 'readwrite').objectStore(name).put(value));
}

/** Forget a conversation and its messages; return these, so that they can be put back. */
export async function remove(id) {
  const gone = await nodes(id);
  const database = await opened;
  if (!database) {
    memory.conversations.delete(id);
    for (const node of gone.keys()) memory.nodes.delete(node);
    return gone;
  }
  const change = database.transaction(['conversations', 'nodes'], 'readwrite');
  change.objectStore('conversations').delete(id);
  for (const node of gone.keys()) change.objectStore('nodes').delete(node);
  await new Promise((resolve, reject) => {
    change.oncomplete = resolve;
    change.onerror = () => reject(change.error);
  });
  return gone;
}
