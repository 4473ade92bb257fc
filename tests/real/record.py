"""Records what llama.cpp makes of the real models: ids of hard strings, and what it writes in fp32.

    python tests/real/record.py OUT.json MODEL.gguf ...

It runs where llama-cpp-python is installed, which the tests do not need: benchmarks/peers.py makes such an
environment. llama.cpp rounds what it multiplies quantized weights by, so each model is first written again in F32.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
from llama_cpp import Llama

HERE = Path(__file__).parent
STEPS = 64


def in_float(path: Path, out: Path) -> None:
    """Write the model in ``path`` again with all weights in F32."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind = field.types[0]
            sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type=sub)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def written(path: Path, prompts: list[str]) -> list[dict[str, object]]:
    """Return for each prompt its ids, the most likely next ones, and by how much each was ahead of the second."""
    found = []
    for prompt in prompts:
        # Keys and values in F32 (0).
        model = Llama(
            str(path),
            n_ctx=256,
            logits_all=True,
            verbose=False,
            type_k=0,
            type_v=0,
            n_threads=1,
            flash_attn=False,
        )
        ids = model.tokenize(prompt.encode(), add_bos=True, special=True)
        model.eval(ids)
        new, margins = [], []
        for _ in range(STEPS):
            logits = model.scores[model.n_tokens - 1]
            second, first = np.argsort(logits)[-2:]
            new.append(int(first))
            margins.append(round(float(logits[first] - logits[second]), 4))
            model.eval([int(first)])
        found.append({"prompt": prompt, "ids": ids, "new": new, "margins": margins})
    return found


def main(out: str, *paths: str) -> None:
    texts = json.loads((HERE / "texts.json").read_text(encoding="utf-8"))
    found = {}
    for name in map(Path, paths):
        model = Llama(str(name), vocab_only=True, verbose=False)
        ids = [model.tokenize(t.encode(), add_bos=True, special=True) for t in texts["hard"]]
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / "float.gguf"
            in_float(name, whole)
            found[name.name] = {"ids": ids, "written": written(whole, texts["prompts"])}
    Path(out).write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
