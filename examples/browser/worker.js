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

// Browsers that use Vulkan (Chromium 150 on Linux and Android) do not zero what a shader declares in a loop, on which ONNX
// Runtime's attention on 32 tokens and more relies; for NVIDIA it has a shader without such a loop. This asks for two turns.
async function mostTokens() {
  const adapter = await navigator.gpu.requestAdapter();
  if (!adapter || adapter.info.vendor === 'nvidia') return Infinity;
  const device = await adapter.requestDevice();
  const module = device.createShaderModule({
    code: `@group(0) @binding(0) var<storage, read_write> found: array<u32>;
      @compute @workgroup_size(1) fn main() {
        for (var i = 0u; i < 2u; i++) { var sum: vec4<u32>; sum[i % 2u] += 1u; sum[0] += 1u; found[i] = sum[0]; }
      }`,
  });
  const pipeline = await device.createComputePipelineAsync({ layout: 'auto', compute: { module } });
  const [written, read] = [
    GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_SRC, GPUBufferUsage.MAP_READ | GPUBufferUsage.COPY_DST,
  ].map((usage) => device.createBuffer({ size: 8, usage }));
  const encoder = device.createCommandEncoder();
  const pass = encoder.beginComputePass();
  pass.setPipeline(pipeline);
  pass.setBindGroup(0, device.createBindGroup({
    layout: pipeline.getBindGroupLayout(0), entries: [{ binding: 0, resource: { buffer: written } }],
  }));
  pass.dispatchWorkgroups(1);
  pass.end();
  encoder.copyBufferToBuffer(written, 0, read, 0, 8);
  device.queue.submit([encoder.finish()]);
  await read.mapAsync(GPUMapMode.READ);
  const second = new Uint32Array(read.getMappedRange())[1];
  device.destroy();
  return second === 1 ? Infinity : 31;
}

let generator = null;
let loaded = '';
let most = Infinity;

async function load({ device, dtype }) {
  if (loaded === `${device} ${dtype}`) return;
  await generator?.dispose();
  generator = null;
  loaded = '';
  most = device === 'webgpu' ? await mostTokens() : Infinity;
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
  const ids = tokenizer.chat_template
    ? tokenizer.apply_chat_template(input, { add_generation_prompt: true, return_tensor: false, return_dict: false })
    : tokenizer.encode(prompt);
  if (ids.length > most) {
    throw new Error(
      `The prompt has ${ids.length} tokens, and WebGPU in this browser is right for ${most} at once. Choose WebAssembly, or a shorter prompt.`,
    );
  }
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
