// The server: requests with the key, server-sent events, and errors in words.

import { remembered } from './dom.js';

/** What the server, or the way to it, said instead of an answer. */
export class Failure extends Error {
  constructor(message, { status = 0, retryAfter = 0 } = {}) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

export const key = {
  get: () => remembered.get('key', sessionStorage) || remembered.get('key'),
  set(value, keep) {
    remembered.set('key', value, sessionStorage);
    remembered.set('key', keep ? value : '');
  },
};

/** Return the response to a request. Throws Failure; what `signal` aborted throws as fetch does. */
export async function ask(path, body, signal) {
  const headers = key.get() ? { authorization: `Bearer ${key.get()}` } : {};
  const asked = body === undefined
    ? { headers, signal }
    : {
      method: 'POST',
      headers: { ...headers, 'content-type': 'application/json' },
      body: JSON.stringify(body),
      signal,
    };
  let response;
  try {
    response = await fetch(path, asked);
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new Failure('The server cannot be reached. Nothing is lost: try again when it runs.');
  }
  if (response.ok) return response;
  const found = await response.json().catch(() => ({}));
  const retryAfter = Number(response.headers.get('retry-after')) || 0;
  throw new Failure(words(response.status, found.error?.message, retryAfter), { status: response.status, retryAfter });
}

export const get = async (path) => (await ask(path)).json();
export const post = async (path, body, signal) => (await ask(path, body, signal)).json();

/** Yield the objects of a stream. Throws Failure if it ends before its end. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = '';
  let ended = false;
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((error) => {
        if (error.name === 'AbortError') throw error;
        throw new Failure('The connection to the server was lost.');
      });
      if (done && ended) return;
      if (done) throw new Failure('The server ended the answer early.');
      held += value;
      const lines = held.split('\n');
      held = lines.pop();
      for (const line of lines) {
        if (!line.startsWith('data:')) continue;
        const data = line.slice(5).trim();
        ended = data === '[DONE]';
        if (ended) continue;
        const found = JSON.parse(data);
        if (found.error) throw new Failure(words(0, found.error.message, 0));
        yield found;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function words(status, message, retryAfter) {
  const said = message ? message[0].toUpperCase() + message.slice(1) : `The server answered with status ${status}.`;
  if (status === 429) return `The server is busy. Try again in ${retryAfter || 1} s. (${said})`;
  return said;
}
