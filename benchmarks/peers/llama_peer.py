"""llama.cpp through llama-cpp-python: a checkpoint of Phi-3's shape as GGUF, quantized by llama.cpp itself."""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from figures import figures, main

_PACKAGES = ("llama-cpp-python",)

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
}
_KINDS = ("phi3", "qwen3")


def make(checkpoint: Path, out: Path, options: dict[str, str]) -> None:
    """Write ``checkpoint`` as bfloat16 to the folder ``out``, and quantize it to each of ``options["types"]``."""
    import llama_cpp

    out.mkdir(parents=True, exist_ok=True)
    plain = out / "bf16.gguf"
    write_gguf(checkpoint, plain)
    for name in options["types"].split(","):
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
        target = str(out / f"{name}.gguf").encode()
        code = llama_cpp.llama_model_quantize(str(plain).encode(), target, ctypes.byref(params))
        if code:
            raise SystemExit(f"llama.cpp could not quantize to {name}: code {code}")
    plain.unlink()


def write_gguf(checkpoint: Path, path: Path) -> None:
    """Write a checkpoint of one of ``_KINDS`` as GGUF: weights as they are, norms in fp32, words are numbers."""
    import gguf

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") not in _KINDS:
        raise SystemExit(f"the GGUF writer knows {', '.join(_KINDS)}, found {config.get('model_type')!r}")
    writer = gguf.GGUFWriter(path, config["model_type"])
    _describe(writer, config)
    kind = gguf.GGMLQuantizationType.BF16
    for name, bits in tensors(checkpoint):
        short = _gguf_name(name)
        if bits.ndim == 1:
            writer.add_tensor(short, (bits.astype(np.uint32) << np.uint32(16)).view(np.float32))
        else:
            writer.add_tensor(short, bits.view(np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, config: dict[str, Any]) -> None:
    import gguf

    heads, width = config["num_attention_heads"], config["hidden_size"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    head = config.get("head_dim") or width // heads
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(int(head * config.get("partial_rotary_factor", 1.0)))
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    writer.add_rope_freq_base(config.get("rope_theta", scaling.get("rope_theta", 10_000.0)))
    writer.add_rope_scaling_orig_ctx_len(
        config.get("original_max_position_embeddings", config["max_position_embeddings"])
    )
    writer.add_sliding_window(0)
    for which in ("long", "short"):
        if f"{which}_factor" in scaling:
            factors = np.array(scaling[f"{which}_factor"], dtype=np.float32)
            writer.add_tensor(f"rope_factors_{which}.weight", factors)
    # Token ids are fed as numbers; llama-server writes tokens as text all the same.
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [f"\u2581w{number}" for number in range(len(special), config["vocab_size"])]
    kind = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*special, *words])
    writer.add_token_scores([0.0] * config["vocab_size"])
    writer.add_token_types(
        [kind.UNKNOWN, kind.CONTROL, kind.CONTROL, *[kind.BYTE] * 256, *[kind.NORMAL] * len(words)]
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _gguf_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_LAYER[rest.removesuffix('.weight')]}.weight"


def tensors(checkpoint: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and the bits, uint16, of every bfloat16 tensor of a safetensors checkpoint."""
    for path in sorted(checkpoint.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "BF16":
                raise SystemExit(f"{path}: {name} is {entry['dtype']}, expected BF16")
            place = 8 + size + entry["data_offsets"][0]
            yield name, np.memmap(path, np.uint16, "r", place, tuple(entry["shape"]))


def measure(path: str, prompt: int, new: int, threads: int | None) -> dict[str, Any]:
    """Return the figures of one run; keys and values are float16, as they are by default."""
    import llama_cpp

    began = time.perf_counter()
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path}")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = prompt + new + 1
    params.n_batch = max(prompt, params.n_ubatch)
    if threads is not None:
        params.n_threads = params.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, params)
    loaded = time.perf_counter() - began
    about = llama_cpp.llama_print_system_info().decode().strip()
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def feed(ids: list[int]) -> int:
        array = (ctypes.c_int32 * len(ids))(*ids)
        code = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(ids)))
        if code:
            raise SystemExit(f"llama_decode gave {code}")
        logits = llama_cpp.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(vocab,)).argmax())

    def decode(ids: list[int], steps: int) -> tuple[float, float]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        began = time.perf_counter()
        token = feed(ids)
        middle = time.perf_counter()
        for _ in range(steps):
            token = feed([token])
        return middle - began, time.perf_counter() - middle

    return figures(decode, vocab, prompt, new, load=loaded, packages=_PACKAGES, about=about)


if __name__ == "__main__":
    main(make, measure, sys.argv[1:])
