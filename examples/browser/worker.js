// Loads the model and generates, away from the page, which would stand still on WebAssembly otherwise.
import {
  StoppingCriteria, TextStreamer, env, pipeline,
} from './node_modules/@huggingface/transformers/dist/transformers.min.js';

// The model comes from serve.py, and so does ONNX Runtime, which transformers.js takes from a CDN by default.
env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = '/';
env.backends.onnx.wasm.wasmPaths = '/node_modules/onnxruntime-web/dist/';
// A model that was built again must not come from the browser's cache.
env.useBrowserCache = false;

// On WebAssembly no message arrives while text is generated, so the page says stop in memory that both share.
class Stopped extends StoppingCriteria {
  constructor(flag) {
    super();
    this.flag = flag;
  }

  _call(rows) {
    return rows.map(() => Atomics.load(this.flag, 0) === 1);
  }
}

let generator = null;
let loaded = '';

async function load({ device, dtype }) {
  if (loaded === `${device} ${dtype}`) return;
  await generator?.dispose();
  generator = null;
  loaded = '';
  generator = await pipeline('text-generation', 'model', {
    device,
    dtype,
    progress_callback: (event) => {
      if (event.status === 'progress_total') postMessage({ type: 'loading', percent: event.progress });
    },
  });
  loaded = `${device} ${dtype}`;
}

async function generate({ prompt, tokens, flag }) {
  const { tokenizer } = generator;
  let count = 0;
  let first = 0;
  const streamer = new TextStreamer(tokenizer, {
    skip_prompt: true,
    callback_function: (text) => postMessage({ type: 'text', text }),
    token_callback_function: () => {
      count += 1;
      if (count === 1) first = performance.now();
    },
  });
  const began = performance.now();
  const input = tokenizer.chat_template ? [{ role: 'user', content: prompt }] : prompt;
  await generator(input, {
    max_new_tokens: tokens, do_sample: false, streamer, stopping_criteria: new Stopped(flag),
  });
  const seconds = (performance.now() - first) / 1000;
  postMessage({
    type: 'done', count, wait: (first - began) / 1000, rate: count > 1 ? (count - 1) / seconds : null,
  });
}

const fail = (error) => postMessage({ type: 'error', message: String(error?.message ?? error) });

// transformers.js 4.3.1 waits forever for weights that are missing; all there is to see is this.
addEventListener('unhandledrejection', (event) => {
  event.preventDefault();
  fail(event.reason);
});

onmessage = async ({ data }) => {
  try {
    await load(data);
    postMessage({ type: 'ready' });
    await generate(data);
  } catch (error) {
    fail(error);
  }
};
