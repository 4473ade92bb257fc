// Greedy tokens from onnxruntime-web's plain WebAssembly build, in node.
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import * as ort from 'onnxruntime-web';

ort.env.wasm.numThreads = 1;
ort.env.logLevel = 'fatal';

// An fp16 number, which node's arrays do not know, from its bits.
function half(bits) {
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  const size =
    exponent === 0 ? fraction * 2 ** -24
    : exponent === 31 ? (fraction ? NaN : Infinity)
    : (1 + fraction / 1024) * 2 ** (exponent - 15);
  return bits & 0x8000 ? -size : size;
}

// The logits of the last token, as plain numbers.
function lastRow(tensor) {
  const last = tensor.data.subarray(tensor.data.length - tensor.dims[2]);
  return Array.from(last, last instanceof Uint16Array ? half : Number);
}

function best(logits, never) {
  let found = -1;
  logits.forEach((value, i) => {
    if (!never.includes(i) && (found < 0 || value > logits[found])) found = i;
  });
  return found;
}

async function greedy({ folder, prompt, steps, never }) {
  const data = 'model.onnx.data';
  const session = await ort.InferenceSession.create(readFileSync(join(folder, 'model.onnx')), {
    executionProviders: ['wasm'],
    externalData: [{ path: data, data: readFileSync(join(folder, data)) }],
  });
  const whole = (numbers) => BigInt64Array.from(numbers, BigInt);
  const feed = {};
  for (const { name, type, shape } of session.inputMetadata) {
    if (name.startsWith('past')) {
      const empty = { float32: Float32Array, float16: Uint16Array, int8: Int8Array }[type];
      feed[name] = new ort.Tensor(type, new empty(0), [1, shape[1], 0, shape[3]]);
    }
  }
  const tokens = [];
  let fresh = prompt;
  let first;
  while (tokens.length < steps) {
    const total = prompt.length + tokens.length;
    feed.input_ids = new ort.Tensor('int64', whole(fresh), [1, fresh.length]);
    feed.attention_mask = new ort.Tensor('int64', whole(Array(total).fill(1)), [1, total]);
    if (session.inputNames.includes('position_ids')) {
      const start = total - fresh.length;
      feed.position_ids = new ort.Tensor('int64', whole(fresh.map((_, i) => start + i)), [1, fresh.length]);
    }
    const found = await session.run(feed);
    for (const name of session.outputNames) {
      if (name.startsWith('present')) feed[name.replace('present', 'past_key_values')] = found[name];
    }
    const logits = lastRow(found.logits);
    first ??= logits;
    fresh = [best(logits, never)];
    tokens.push(...fresh);
  }
  await session.release();
  return { tokens, logits: first };
}

const [given, answers] = process.argv.slice(2);
const cases = {};
for (const one of JSON.parse(readFileSync(given, 'utf8'))) {
  if (!one.plain) cases[one.name] = {};
  else {
    try {
      cases[one.name] = await greedy(one);
    } catch (error) {
      cases[one.name] = { error: String(error?.message ?? error) };
    }
  }
}
const version = ort.env.versions.web ?? ort.env.versions.common;
writeFileSync(answers, JSON.stringify({ version, cases }));
