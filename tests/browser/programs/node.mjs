// Runs cases in node: transformers.js on onnxruntime-node ("cpu"), or the WebAssembly build that pages get ("wasm").
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

import { withOnnxruntime, withTransformers } from './models.mjs';

const [given, answers] = process.argv.slice(2);
const { folder, cases } = JSON.parse(readFileSync(given, 'utf8'));
const found = {};
for (const one of cases) {
  try {
    if (one.library === 'transformers.js') {
      const library = await import('@huggingface/transformers');
      Object.assign(library.env, { localModelPath: folder, allowRemoteModels: false });
      found[one.name] = await withTransformers(library, one);
    } else {
      const ort = await import('onnxruntime-web/webgpu');
      Object.assign(ort.env.wasm, { numThreads: 1 });
      found[one.name] = await withOnnxruntime(ort, (path) => readFileSync(join(folder, path)), one);
    }
  } catch (error) {
    found[one.name] = { error: String(error?.message ?? error) };
  }
}
writeFileSync(answers, JSON.stringify(found));
