// The controls: which devices and dtypes there are, what goes to the worker, and what comes back.
const get = (id) => document.getElementById(id);
const [form, device, dtype, prompt, tokens, run, stop, answer, status, progress] = [
  'form', 'device', 'dtype', 'prompt', 'tokens', 'run', 'stop', 'answer', 'status', 'progress',
].map(get);

const DTYPES = {
  'model_q4f16.onnx': 'q4f16', 'model_q4.onnx': 'q4', 'model_quantized.onnx': 'q8',
  'model_fp16.onnx': 'fp16', 'model.onnx': 'fp32',
};

// 1 stops the answer. Browsers share memory with workers only for pages with the headers that serve.py sends.
const flag = globalThis.crossOriginIsolated ? new Int32Array(new SharedArrayBuffer(4)) : new Int32Array(1);
let worker = null;
let adapter = null;

function say(text, isError = false) {
  status.textContent = text;
  status.classList.toggle('error', isError);
}

function busy(isBusy) {
  run.disabled = isBusy;
  stop.disabled = !isBusy;
  device.disabled = dtype.disabled = isBusy;
  progress.hidden = true;
}

// What the error of a library means here, and what to do.
function explained(message) {
  if (/f16/.test(message)) return 'This GPU does not compute in fp16. Choose q4 or q8, or WebAssembly.';
  if (/memory|allocat|out of bounds|Array buffer/i.test(message)) {
    return `The model does not fit into the browser's memory. Choose a smaller dtype, or WebGPU. (${message})`;
  }
  if (/locally|fetch|404/i.test(message)) return `A file of the model is missing; is serve.py still running? (${message})`;
  return message;
}

function start() {
  worker = new Worker('worker.js', { type: 'module' });
  worker.onmessage = ({ data }) => {
    if (data.type === 'loading') {
      progress.hidden = false;
      progress.value = data.percent;
      say(`Loading the model: ${Math.round(data.percent)} %`);
    } else if (data.type === 'ready') {
      progress.hidden = true;
      say('Generating');
    } else if (data.type === 'text') {
      answer.textContent += data.text;
    } else if (data.type === 'done') {
      const rate = data.rate === null ? '' : `, then ${data.rate.toFixed(1)} tokens/s`;
      say(`${data.count} tokens; the first after ${data.wait.toFixed(2)} s${rate}`);
      busy(false);
    } else if (data.type === 'error') {
      fail(data.message);
    }
  };
  worker.onerror = (event) => {
    event.preventDefault();
    fail(event.message || 'The libraries did not load. Run npm install --ignore-scripts in this folder.');
  };
}

function fail(message) {
  say(explained(message), true);
  busy(false);
  // What a failed session leaves behind is of no use.
  worker.terminate();
  worker = null;
}

function offer(select, choices) {
  select.replaceChildren(...choices.map(([value, text]) => new Option(text, value)));
}

// fp16 needs a GPU that has it; WebAssembly computes it in fp32.
function offerDtypes(files) {
  const there = Object.entries(DTYPES).filter(([file]) => file in files).map(([, name]) => name);
  const onGpu = device.value === 'webgpu';
  const half = (name) => name.endsWith('16');
  const usable = there.filter((name) => !half(name) || !onGpu || adapter.features.has('shader-f16'));
  // On a GPU the smallest is the fastest.
  const order = onGpu ? usable : [...usable.filter((name) => !half(name)), ...usable.filter(half)];
  offer(dtype, order.map((name) => [name, name]));
  run.disabled = order.length === 0;
  say(order.length ? '' : 'This GPU does not compute in fp16, and the model has no other dtype. Choose WebAssembly.', !order.length);
}

async function prepare() {
  const response = await fetch('/model/config.json');
  if (!response.ok) throw new Error('There is no model. Start the page with: python serve.py FOLDER');
  const files = (await response.json())['transformers.js_config']?.use_external_data_format;
  if (!files) throw new Error('The folder was not built for browsers: ortlm build --layout transformers.js');
  adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  offer(device, [...(adapter ? [['webgpu', 'WebGPU']] : []), ['wasm', 'WebAssembly']]);
  device.onchange = () => offerDtypes(files);
  offerDtypes(files);
  if (!adapter) say('This browser gives no WebGPU adapter, so that WebAssembly is all there is.');
}

form.onsubmit = (event) => {
  event.preventDefault();
  if (!worker) start();
  answer.textContent = '';
  busy(true);
  say('Loading the model');
  Atomics.store(flag, 0, 0);
  worker.postMessage({
    device: device.value, dtype: dtype.value, prompt: prompt.value, tokens: Number(tokens.value), flag,
  });
};
stop.onclick = () => Atomics.store(flag, 0, 1);

prepare().catch((error) => {
  say(error.message, true);
  run.disabled = true;
});
