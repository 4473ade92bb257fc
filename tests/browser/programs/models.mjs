// What is asked of a folder, by node and by a page alike: greedy tokens through transformers.js, and through
// onnxruntime-web alone.

// transformers.js: the first `rows` prompts alone, then all of them in a batch, which it pads on the left; a chat; and the logits of
// every position, alone and in a batch.
export async function withTransformers({ pipeline, Tensor }, asked) {
  const { model, prompts, texts, rows, steps, batchSteps, device, dtype } = asked;
  const generate = await pipeline('text-generation', model, { device, dtype });
  const alone = [];
  for (const ids of prompts.slice(0, rows)) alone.push((await greedy(generate.model, Tensor, [ids], steps))[0]);
  const batch = await greedy(generate.model, Tensor, prompts, batchSteps);
  const answers = await generate(texts, { max_new_tokens: batchSteps, do_sample: false });
  const chat = [{ role: 'user', content: texts[0] }];
  const [reply] = await generate(chat, { max_new_tokens: batchSteps, do_sample: false });
  const scored = await positions(generate.model, Tensor, prompts);
  const loaded = generate.model.sessions.model.config;
  await generate.dispose();
  return {
    alone, batch, scored,
    texts: answers.map(([{ generated_text }]) => generated_text),
    reply: reply.generated_text.at(-1).content,
    loaded: `${loaded.device} ${loaded.dtype}`,
  };
}

function padded(Tensor, prompts) {
  const most = Math.max(...prompts.map((ids) => ids.length));
  const before = (ids, value) => Array(most - ids.length).fill(value);
  const tensor = (rows) => new Tensor('int64', BigInt64Array.from(rows.flat(), BigInt), [rows.length, most]);
  return {
    input_ids: tensor(prompts.map((ids) => [...before(ids, 0), ...ids])),
    attention_mask: tensor(prompts.map((ids) => [...before(ids, 0), ...ids.map(() => 1)])),
  };
}

async function greedy(model, Tensor, prompts, steps) {
  const inputs = padded(Tensor, prompts);
  // No token ends an answer here: all rows get as many.
  const sequences = await model.generate({ ...inputs, max_new_tokens: steps, do_sample: false, eos_token_id: [] });
  return sequences.tolist().map((row) => row.slice(-steps).map(Number));
}

// The largest difference of logits that padding makes, relative to the largest logit.
async function positions(model, Tensor, prompts) {
  const all = (await model(padded(Tensor, prompts))).logits.to('float32');
  const [, columns, vocabulary] = all.dims;
  let apart = 0;
  let largest = 0;
  for (const [row, ids] of prompts.entries()) {
    const { data } = (await model(padded(Tensor, [ids]))).logits.to('float32');
    const start = (row * columns + columns - ids.length) * vocabulary;
    data.forEach((value, i) => {
      apart = Math.max(apart, Math.abs(value - all.data[start + i]));
      largest = Math.max(largest, Math.abs(value));
      if (!Number.isFinite(value) || !Number.isFinite(all.data[start + i])) apart = Infinity;
    });
  }
  return apart / largest;
}

// onnxruntime-web alone, without a line of transformers.js; `read` returns a file of the folder as bytes.
export async function withOnnxruntime(ort, read, { model, prompts, steps, device, graph }) {
  const config = JSON.parse(new TextDecoder().decode(await read(`${model}/config.json`)));
  const parts = config['transformers.js_config'].use_external_data_format[graph];
  const externalData = [];
  for (let i = 0; i < parts; i++) {
    const path = `${graph}_data${i ? `_${i}` : ''}`;
    externalData.push({ path, data: await read(`${model}/onnx/${path}`) });
  }
  const session = await ort.InferenceSession.create(await read(`${model}/onnx/${graph}`), {
    executionProviders: [device],
    externalData,
    // As transformers.js has it: that shapes are computed on the CPU is a warning of WebGPU sessions.
    logSeverityLevel: 3,
  });
  const int64 = (numbers, shape) => new ort.Tensor('int64', BigInt64Array.from(numbers, BigInt), shape);
  const feed = { num_logits_to_keep: int64([1], []) };
  for (const { name, type, shape } of session.inputMetadata) {
    if (name.startsWith('past')) {
      const empty = type === 'float16' ? new Uint16Array(0) : new Float32Array(0);
      feed[name] = new ort.Tensor(type, empty, [1, shape[1], 0, shape[3]]);
    }
  }
  const tokens = [];
  let fresh = prompts[0];
  let logits;
  while (tokens.length < steps) {
    const total = prompts[0].length + tokens.length;
    feed.input_ids = int64(fresh, [1, fresh.length]);
    feed.attention_mask = int64(Array(total).fill(1), [1, total]);
    const found = await session.run(feed);
    for (const name of session.outputNames) {
      if (name.startsWith('present')) feed[name.replace('present', 'past_key_values')] = found[name];
    }
    const row = numbers(found.logits);
    logits ??= row;
    fresh = [row.reduce((best, value, i) => (value > row[best] ? i : best), 0)];
    tokens.push(fresh[0]);
  }
  await session.release();
  return { alone: [tokens], logits };
}

// Plain numbers; fp16 comes as its bits where JavaScript has no such arrays.
function numbers({ data }) {
  const half = (bits) => {
    const exponent = (bits >> 10) & 31;
    const fraction = (bits & 1023) / 1024;
    const size =
      exponent === 0 ? fraction * 2 ** -14
      : exponent === 31 ? (fraction ? NaN : Infinity)
      : (1 + fraction) * 2 ** (exponent - 15);
    return bits & 0x8000 ? -size : size;
  };
  return Array.from(data, data instanceof Uint16Array ? half : Number);
}
