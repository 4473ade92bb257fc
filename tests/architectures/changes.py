"""Changes of ``config.json``, one key at a time, and what transformers makes of them.

Each family's keys are the fields of transformers' configuration class, those of its rotary embedding, and keys
that other families have. A change is a path of keys and a new value; what counts is whether the logits move.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.architectures import families, oracle

Path_ = tuple[str, ...]

# What other families than one's own look at.
FOREIGN: dict[str, tuple[Any, ...]] = {
    "attention_bias": (True, False),
    "mlp_bias": (True, False),
    "qkv_bias": (True,),
    "lm_head_bias": (True, False),
    "sliding_window": (8, None, 4096),
    "use_sliding_window": (True, False),
    "max_window_layers": (1,),
    "layer_types": ("full", "sliding", "mixed"),
    "head_dim": (32, None),
    "partial_rotary_factor": (0.5, 1.0),
    "rotary_pct": (0.5,),
    "no_rope_layers": ([0, 1, 0, 1],),
    "no_rope_layer_interval": (2,),
    "attn_logit_softcapping": (2.0, None),
    "final_logit_softcapping": (2.0, None),
    "query_pre_attn_scalar": (7,),
    "logit_scale": (0.5, 1.0),
    "logits_scaling": (3.0,),
    "residual_multiplier": (0.3,),
    "embedding_multiplier": (2.0,),
    "attention_multiplier": (0.9,),
    "scale_embedding": (True,),
    "clip_qkv": (0.1, None),
    "use_qk_norm": (True, False),
    "qk_layernorm": (True,),
    "is_causal": (False, True),
    "use_bidirectional_attention": (True, False),
    "num_experts": (4, 0),
    "num_local_experts": (4,),
    "hidden_act": ("relu", "silu", "gelu"),
    "hidden_activation": ("relu", "silu"),
    "pretraining_tp": (2,),
    "quantization_config": ({"quant_method": "gptq"}, None),
    "per_layer_config": ({"0": {"sliding_window": 4}}, {}),
    "rope_theta": (500.0, 1e6),
    "original_max_position_embeddings": (16, 32),
    "rope_scaling": (
        {"type": "linear", "factor": 3.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {},
        None,
    ),
    "rms_norm_eps": (0.5,),
    "layer_norm_eps": (0.5,),
    "sliding_window_pattern": (2,),
    "_sliding_window_pattern": (2,),
    "attention_chunk_size": (8,),
    "is_decoder": (True,),
    "is_encoder_decoder": (True,),
    "add_cross_attention": (True,),
    "rope_local_base_freq": (77.0,),
    "cache_implementation": ("static",),
    "tie_last_hidden_states": (True,),
    "alibi": (True,),
    "parallel_attn": (True,),
    "rope_interleaved": (True,),
    "attn_temperature_tuning": (True,),
    "unsloth_version": ("2026.1",),
    "_attn_implementation_autoset": (True,),
    "my_project": ({"a": 1},),
    "suppress_tokens": ([5],),
    "temperature": (0.7,),
    "max_length": (5,),
    "attention_dropout": (0.3,),
    "resid_pdrop": (0.2,),
    "pad_token_id": (5,),
    "bos_token_id": (7,),
    "torch_dtype": ("float32",),
}
ROPE: dict[str, tuple[Any, ...]] = {
    "factor": (2.0, 5.0),
    "rope_theta": (700.0,),
    "partial_rotary_factor": (0.5, 1.0),
    "attention_factor": (1.7,),
    "original_max_position_embeddings": (32, 128),
    "beta_fast": (8.0,),
    "beta_slow": (2.0,),
    "mscale": (0.7,),
    "mscale_all_dim": (0.3,),
    "truncate": (False,),
    "low_freq_factor": (1.5,),
    "high_freq_factor": (6.0,),
    "short_mscale": (1.3,),
    "long_mscale": (1.2,),
    "rope_type": ("linear", "dynamic", "yarn", "llama3", "longrope"),
    "type": ("linear",),
    "mrope_section": ([2, 2, 4],),
    "finetuned": (True,),
    "extra_thing": (3,),
}


def changes(base: dict[str, Any], *, foreign: bool = True) -> Iterator[tuple[Path_, Any]]:
    """Yield paths and new values for a ``config.json`` that says ``base``.

    With ``foreign``, also for keys that only other families have.
    """
    kind = type(AutoConfig.for_model(base["model_type"]))
    fields = {f.name for f in dataclasses.fields(kind)} - {"transformers_version", "architectures", "dtype"}
    for key in sorted(fields | set(base) | (set(FOREIGN) if foreign else set())):
        if key in (
            "model_type",
            "transformers_version",
            "architectures",
            "dtype",
            "rope_parameters",
            "tie_word_embeddings",
        ):
            continue
        for value in FOREIGN.get(key, _others(base.get(key))):
            if key == "layer_types":
                value = kinds_of(value, base["num_hidden_layers"])
            if key not in base or base[key] != value:
                yield (key,), value
    for place in _rope_places(base):
        for key, values in ROPE.items():
            yield from (((*place, key), value) for value in values)


def kinds_of(name: str, layers: int) -> list[str]:
    """Return ``layer_types`` of ``layers``: "full", "sliding", or "mixed", which begins with sliding."""
    full, sliding = "full_attention", "sliding_attention"
    if name == "mixed":
        return [sliding if i % 2 == 0 else full for i in range(layers)]
    return [full if name == "full" else sliding] * layers


def _rope_places(base: dict[str, Any]) -> list[Path_]:
    for key in ("rope_scaling", "rope_parameters"):
        if base.get(key):
            nested = [k for k, v in base[key].items() if isinstance(v, dict)]
            return [(key, k) for k in nested] or [(key,)]
    return []


def _others(value: Any) -> tuple[Any, ...]:
    if isinstance(value, bool):
        return (not value,)
    if isinstance(value, int):
        return (2 * value + 1, max(1, value // 2))
    if isinstance(value, float):
        return (2 * value + 0.25,)
    if isinstance(value, list) and value:
        return (value[::-1], value[:1] * len(value))
    return ()


def changed(base: dict[str, Any], path: Path_, value: Any) -> dict[str, Any]:
    """Return a copy of ``base`` with ``value`` at ``path``."""
    found = copy.deepcopy(base)
    at = found
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return found


class NoModel(Exception):
    """transformers makes no model of a configuration and the weights that there are."""


def torch_model(config: dict[str, Any], weights: dict[str, Any], folder: Path) -> Any:
    """Return what transformers makes of ``config`` and ``weights``. Raises NoModel if that is nothing whole."""
    (folder / "config.json").write_text(json.dumps(config))
    if config.get("quantization_config"):
        raise NoModel
    try:
        found = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(
            found, attn_implementation="eager", dtype=torch.float32
        ).eval()
        families.correct_rotation(model)
        missing = model.load_state_dict(weights, strict=False).missing_keys
    except Exception as error:
        raise NoModel(str(error)) from error
    if set(missing) - ({"lm_head.weight"} if found.tie_word_embeddings else set()):
        raise NoModel(f"{missing[:3]} would be random")
    return model


def logits(model: Any, tokens: list[int]) -> np.ndarray[Any, Any]:
    """Return the logits [S, V] of ``tokens``, read at once."""
    try:
        return oracle.prompt_logits(model, tokens)
    except Exception as error:
        raise NoModel(str(error)) from error


TOKENS = oracle.random_tokens(100)


def base_of(name: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Save family row ``name`` into ``folder``; return its configuration, its weights and its logits."""
    model = families.save(name, folder)
    config = json.loads((folder / "config.json").read_text())
    if (config.get("rope_scaling") or {}).get("type") == "su":
        # The spelling of the first Phi-3, which transformers itself no longer reads.
        config["rope_scaling"]["type"] = "longrope"
    return config, {k: v.clone() for k, v in model.state_dict().items()}, logits(model, TOKENS)
