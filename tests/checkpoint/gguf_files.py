"""GGUF files of tiny checkpoints, made by the gguf package.

Names of tensors are the package's own; the rest follows llama.cpp's conversion scripts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from safetensors.numpy import load_file

Tensors = dict[str, Any]

# model_type to what GGUF calls the family.
NAMES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "phi": "phi2",
    "granite": "granite",
    "olmo2": "olmo2",
    "smollm3": "smollm3",
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "olmoe": "olmoe",
    "granitemoe": "granitemoe",
    "gpt_oss": "gpt-oss",
    "phimoe": "phimoe",
    "cohere": "command-r",
    "cohere2": "cohere2",
    "starcoder2": "starcoder2",
    "stablelm": "stablelm",
    "nemotron": "nemotron",
    "glm4": "glm4",
    "exaone4": "exaone4",
    "seed_oss": "seed_oss",
    "arcee": "arcee",
    "ernie4_5": "ernie4_5",
    "hunyuan_v1_dense": "hunyuan-dense",
    "olmo3": "olmo2",
    "lfm2": "lfm2",
}
INTERLEAVED = ("llama", "granite", "smollm3", "granitemoe", "arcee")
# Families whose conversion states how many channels of a head rotate.
ROTATED = (
    "llama", "phi3", "phi2", "granite", "smollm3", "granitemoe", "phimoe", "cohere2", "stablelm", "nemotron",
    "glm4", "arcee",
)  # fmt: skip
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")


def interleave(rows: Any, heads: int) -> Any:
    """Return the rows of q or k as llama.cpp rotates them: the two halves of each head take turns."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def tensors_of(folder: Path) -> Tensors:
    """Return the tensors of the checkpoint in ``folder`` as a GGUF file has them, by its names for them."""
    config = json.loads((folder / "config.json").read_text())
    name = NAMES[config["model_type"]]
    arch = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == name)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    found: Tensors = {}
    held = stacked(load_file(folder / "model.safetensors"))
    for key, value in held.items():
        if key.startswith("blk."):
            found[key] = value
            continue
        if "_layernorm.norms." in key:
            # StableLM: a norm for each head.
            layer, part, head = key.split(".")[2], key.split(".")[4][0], int(key.split(".")[6])
            count = heads if part == "q" else kv_heads
            each = [held[key.replace(f"norms.{head}.", f"norms.{i}.")] for i in range(count)]
            found[f"blk.{layer}.attn_{part}_norm.weight"] = np.stack(each)
            continue
        if name.startswith(("gemma", "nemotron")) and key.endswith("norm.weight"):
            value = value + np.float32(1)
        if name in INTERLEAVED:
            if ".q_proj." in key:
                value = interleave(value, heads)
            elif ".k_proj." in key:
                value = interleave(value, kv_heads)
        if name == "phi2" and (".k_proj." in key or ".v_proj." in key):
            continue
        if name == "phi2" and ".q_proj." in key:
            value = np.concatenate([held[key.replace(".q_proj.", f".{p}_proj.")] for p in "qkv"])
            base, kind = key.rsplit(".", 1)
            found[f"blk.{base.split('.')[2]}.attn_qkv.{kind}"] = value
            continue
        base, kind = key.rsplit(".", 1)
        found[f"{names.get_name(base)}.{kind}"] = value
    return found | tables_of(config)


def stacked(held: Tensors) -> Tensors:
    """Return ``held`` with the experts of each layer in one tensor for each of their matrices."""
    found: Tensors = {}
    lone: dict[str, list[Any]] = {}
    for key, value in held.items():
        expert = _EXPERT.fullmatch(key)
        layer = f"blk.{key.split('.')[2]}" if key.startswith("model.layers.") else ""
        if expert:
            module = re.sub(r"model\.(.*)\.block_sparse_moe\.", r"\1.feed_forward.", expert[1])
            lone.setdefault(f"{module}.{expert[3]}.weight", []).append((int(expert[2]), value))
        elif key.endswith("shared_expert_gate.weight"):
            found[key] = value[0]
        elif key.endswith("conv.conv.weight"):
            found[key] = value[:, 0]
        elif key.endswith(".sinks"):
            found[f"{layer}.attn_sinks.weight"] = value
        elif key.endswith("block_sparse_moe.input_linear.weight"):
            half = value.shape[1] // 2
            found |= {
                f"{layer}.ffn_gate_exps.weight": value[:, :half],
                f"{layer}.ffn_up_exps.weight": value[:, half:],
            }
        elif ".experts." in key:
            # GPT-OSS: [experts, in, out], the columns of gate and up in turns.
            part, bias = key.split(".experts.")[1].removesuffix("_bias"), key.endswith("_bias")
            rows, kind = (value, "bias") if bias else (value.swapaxes(1, 2), "weight")
            if part == "down_proj":
                found[f"{layer}.ffn_down_exps.{kind}"] = rows
            else:
                found |= {
                    f"{layer}.ffn_gate_exps.{kind}": rows[:, ::2],
                    f"{layer}.ffn_up_exps.{kind}": rows[:, 1::2],
                }
        else:
            found[key] = value
    for key, values in lone.items():
        found[key] = np.stack([value for _, value in sorted(values, key=lambda each: each[0])])
    return {key: np.ascontiguousarray(value) for key, value in found.items()}


def tables_of(config: Mapping[str, Any]) -> Tensors:
    """Return the divisors of the rotation's frequencies as conversion scripts write them."""
    rope = config.get("rope_parameters") or {}
    kind = rope.get("rope_type")
    if kind == "longrope":
        return {
            "rope_factors_long.weight": np.array(rope["long_factor"], np.float32),
            "rope_factors_short.weight": np.array(rope["short_factor"], np.float32),
        }
    if kind != "llama3":
        return {}
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    factors = []
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / dim)
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(rope["factor"])
        else:
            smooth = (rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return {"rope_freqs.weight": np.array(factors, np.float32)}


def add_metadata(writer: GGUFWriter, folder: Path) -> None:
    """Add what llama.cpp's conversion of the checkpoint in ``folder`` says of the model."""
    c = json.loads((folder / "config.json").read_text())
    name = NAMES[c["model_type"]]
    heads, hidden = c["num_attention_heads"], c["hidden_size"]
    head_dim = c.get("head_dim") or hidden // heads
    rope = c.get("rope_parameters") or {}
    writer.add_type("model")
    writer.add_license("apache-2.0")
    writer.add_quantization_version(2)
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(c["num_hidden_layers"])
    wide, kv_heads = c["intermediate_size"], c["num_key_value_heads"]
    if name == "lfm2":
        # Two thirds, rounded up; and none where there is no attention.
        multiple = c["block_multiple_of"]
        wide = multiple * -(-int(2 * wide / 3) // multiple)
        kv_heads = [kv_heads if kind == "full_attention" else 0 for kind in c["layer_types"]]
        writer.add_shortconv_l_cache(c["conv_L_cache"])
    writer.add_feed_forward_length(wide)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    rms = c.get("norm_eps") if name == "lfm2" else c.get("rms_norm_eps")
    if rms is not None:
        writer.add_layer_norm_rms_eps(rms)
    for key in ("layer_norm_eps", "norm_eps", "norm_epsilon"):
        if key in c and name != "lfm2":
            writer.add_layer_norm_eps(c[key])
    count = c.get("num_local_experts") or c.get("num_experts")
    if count:
        writer.add_expert_count(count)
        writer.add_expert_used_count(c["num_experts_per_tok"])
    if name in ("qwen2moe", "qwen3moe"):
        writer.add_expert_feed_forward_length(c["moe_intermediate_size"])
    if name == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(c["shared_expert_intermediate_size"])
    if name == "gpt-oss":
        writer.add_sliding_window(c["sliding_window"])
        writer.add_expert_feed_forward_length(c["intermediate_size"])
    if name in ("llama", "granite", "smollm3", "granitemoe", "cohere2", "nemotron", "exaone4", "arcee"):
        writer.add_vocab_size(c["vocab_size"])
    partial = rope.get("partial_rotary_factor", 1.0)
    if name in ROTATED:
        writer.add_rope_dimension_count(int(head_dim * partial))
    if name in ("qwen3", "gemma", "gemma2", "gemma3") or c.get("head_dim"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    full = rope.get("full_attention", rope)
    theta = full.get("rope_theta", 10000.0)
    if full.get("alpha"):
        theta *= full["alpha"] ** (head_dim / (head_dim - 2))
    writer.add_rope_freq_base(theta)
    if name in ("command-r", "cohere2", "nemotron") or full.get("alpha"):
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    if name in ("command-r", "cohere2"):
        writer.add_logit_scale(c["logit_scale"])
    if name == "stablelm":
        writer.add_parallel_residual(c["use_parallel_residual"])
    if name in ("cohere2", "exaone4", "olmo2") and c.get("sliding_window"):
        writer.add_sliding_window(c["sliding_window"])
        if name != "cohere2":
            writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in c["layer_types"]])
    if full.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(full["rope_type"]))
        writer.add_rope_scaling_factor(full["factor"])
        if "original_max_position_embeddings" in full:
            writer.add_rope_scaling_orig_ctx_len(full["original_max_position_embeddings"])
        if "beta_fast" in full:
            writer.add_rope_scaling_yarn_beta_fast(full["beta_fast"])
            writer.add_rope_scaling_yarn_beta_slow(full["beta_slow"])
    if name == "phi3":
        original = rope.get("original_max_position_embeddings", c["max_position_embeddings"])
        writer.add_rope_scaling_orig_ctx_len(original)
        if rope.get("rope_type") == "longrope":
            scale = c["max_position_embeddings"] / original
            writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
        writer.add_sliding_window(c.get("sliding_window") or 0)
    if name in ("gemma2", "gemma3"):
        writer.add_sliding_window(c["sliding_window"])
        writer.add_final_logit_softcapping(c.get("final_logit_softcapping") or 0.0)
    if name == "gemma2":
        writer.add_attn_logit_softcapping(c["attn_logit_softcapping"])
    if name == "gemma3":
        writer.add_sliding_window_pattern(c["layer_types"].index("full_attention") + 1)
    if name in ("granite", "granitemoe"):
        writer.add_attention_scale(c["attention_multiplier"])
        writer.add_embedding_scale(c["embedding_multiplier"])
        writer.add_residual_scale(c["residual_multiplier"])
        writer.add_logit_scale(c["logits_scaling"])


def add_tokenizer(writer: GGUFWriter, folder: Path) -> None:
    """Add the byte-level BPE in ``folder``."""
    data = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    vocab = data["model"]["vocab"]
    special = {token["content"] for token in data["added_tokens"]}
    texts = {at: text for text, at in vocab.items()}
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(config["vocab_size"])]
    types = [3 if t in special else 5 if t not in vocab else 1 for t in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]])
    for name, add in (
        ("bos_token", writer.add_bos_token_id),
        ("eos_token", writer.add_eos_token_id),
        ("pad_token", writer.add_pad_token_id),
    ):
        add(vocab[settings[name]])
    writer.add_add_bos_token(True)
    writer.add_chat_template(settings["chat_template"])


def write(
    folder: Path,
    path: Path,
    *,
    kind: Callable[[str], Kind] = lambda name: Kind.F32,
    change: Callable[[GGUFWriter, Tensors], None] = lambda writer, tensors: None,
    tokenizer: bool = True,
    split: int = 0,
) -> None:
    """Write the checkpoint in ``folder`` as the GGUF file ``path``, or in parts of ``split`` tensors.

    ``kind`` says in which type the matrix of that name is stored; ``change`` may add to both, or take tensors out.
    """
    config = json.loads((folder / "config.json").read_text())
    writer = GGUFWriter(path, NAMES[config["model_type"]], split_max_tensors=split)
    add_metadata(writer, folder)
    if tokenizer:
        add_tokenizer(writer, folder)
    tensors = tensors_of(folder)
    change(writer, tensors)
    for name, value in tensors.items():
        matrix = value.ndim > 1 and name.endswith("weight") and not name.startswith("rope_")
        if value.dtype == np.float32 and matrix:
            data = gguf.quants.quantize(value, kind(name))
            writer.add_tensor(name, data, raw_dtype=kind(name))
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_blocks(kind: Kind, rows: int, columns: int, *, seed: int = 0) -> Any:
    """Return random bytes of a tensor [rows, columns], whose scales are finite: only sane exponents are left."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (rows * columns // elements, size), dtype=np.uint8)
    # Where the scales of a block lie, as float16 in all of these.
    halves = {
        Kind.Q4_0: (0,), Kind.Q4_1: (0, 2), Kind.Q5_0: (0,), Kind.Q5_1: (0, 2), Kind.Q8_0: (0,),
        Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,),
        Kind.IQ4_NL: (0,), Kind.IQ4_XS: (0,), Kind.MXFP4: (),
    }[kind]  # fmt: skip
    for at in halves:
        scales = generator.standard_normal(len(blocks)).astype(np.float16) * np.float16(0.02)
        blocks[:, at : at + 2] = scales[:, None].view(np.uint8)
    if kind == Kind.MXFP4:
        blocks[:, 0] = generator.integers(115, 130, len(blocks))
    return blocks.reshape(rows, -1)
