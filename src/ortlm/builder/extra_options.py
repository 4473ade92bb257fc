"""The official builder's --extra_options: its keys, their values, and the options that they set."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ortlm.builder.options import BuildOptions, cache_scheme
from ortlm.errors import BadOption, nearest
from ortlm.target import Target

# Returns the fields of BuildOptions that a key with a value sets.
_Reader = Callable[[str, str], Mapping[str, Any]]


def _flag(key: str, value: str) -> bool:
    low = value.lower()
    if low in ("1", "true", "yes", "on"):
        return True
    if low in ("0", "false", "no", "off"):
        return False
    raise BadOption(f"--extra_options {key} must be true or false; got {value!r}.")


def _opposite(key: str, value: str) -> bool:
    return not _flag(key, value)


def _integer(key: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise BadOption(f"--extra_options {key} must be a whole number; got {value!r}.") from None


def _text(_: str, value: str) -> str:
    return value


def _lower(_: str, value: str) -> str:
    return value.lower()


def _names(_: str, value: str) -> tuple[str, ...]:
    return tuple(name for name in value.split(",") if name)


def _token(_: str, value: str) -> str | bool:
    return {"false": False, "true": True}.get(value.lower(), value)


def _sets(field: str, parse: Callable[[str, str], object]) -> _Reader:
    """Return the reader of a key that sets one field."""
    return lambda key, value: {field: parse(key, value)}


# Spellings of one option, the current one last.
_ALIASES = {
    "int4_accuracy_level": "accuracy_level",
    "int4_block_size": "block_size",
    "int4_is_symmetric": "is_symmetric",
    "int4_op_types_to_quantize": "op_types_to_quantize",
    "int4_nodes_to_exclude": "nodes_to_exclude",
    "int4_algo_config": "algo_config",
    "int4_tied_embeddings": "shared_embeddings",
    "int4_matmul_mixed_precision": "matmul_mixed_precision",
    "num_layers": "num_hidden_layers",
}


# algo_config: our algorithm, whether 8 bits go to the layers that suffer most, roles at 8 bits.
_ALGORITHMS: dict[str, tuple[str, bool, tuple[str, ...]]] = {
    "default": ("rtn", False, ()),
    "rtn": ("rtn", False, ()),
    "rtn_last": ("rtn", False, ("head",)),
    "k_quant": ("clip_search", False, ()),
    "k_quant_last": ("clip_search", False, ("head",)),
    "k_quant_mixed": ("clip_search", True, ("head",)),
    "clip_search": ("clip_search", False, ()),
    "importance": ("importance", False, ()),
    "awq": ("awq", False, ()),
    "gptq": ("gptq", False, ()),
    "awq_gptq": ("awq_gptq", False, ()),
}


# Options of the official builder that hold these values only here (none: no value does), and why.
_RAW_EXPERTS = "experts are stored as QMoE on CPU takes them"

_NO_PAGES = "it shapes paged attention, which is not built"

_NO_DRAFTER = (
    "drafters of their own are not built; draft with another model at run time (draft=, --draft-model)"
)

_NO_STATES = "it shapes recurrent layers, which no model that is built here has"

_CAPTURE = (
    "the graphs here have not been verified under capture; set it where the model runs, in provider options"
)

_FIXED: dict[str, tuple[tuple[str, ...], str]] = {
    "hf_remote": (("false",), "ortlm never runs code that comes with a checkpoint, and needs none"),
    "use_qdq": (("false",), "ortlm emits MatMulNBits, which every target here runs"),
    "exclude_embeds": (("false",), "graphs without embeddings are not built yet"),
    "exclude_lm_head": (("false",), "graphs without a head are not built yet; see include_hidden_states"),
    "enable_cuda_graph": (("false",), _CAPTURE),
    "enable_dml_graph": (("false",), _CAPTURE),
    "enable_webgpu_graph": (("false",), _CAPTURE),
    "use_cuda_bf16": (("false",), "ask for it with -p bf16 -e cuda; quantized weights go with fp16 there"),
    "matmulnbits_weights_prepacked": (
        ("0",),
        "weights packed for one kind of GPU run nowhere else; ONNX Runtime packs them when it loads the model",
    ),
    "fuse_qk_norm_gqa": (
        ("false",),
        "queries and keys are normalized before attention, which every target runs",
    ),
    "qmoe_weights_prepacked": (("-1", "0"), _RAW_EXPERTS),
    "mtp_quant_config": ((), "no model that is built here has such a head"),
    "use_paged_attention": (("false",), "paged attention is not built yet"),
    "paged_block_size": ((), _NO_PAGES),
    "paged_chunk_size": ((), _NO_PAGES),
    "gpu_utilization_factor": ((), _NO_PAGES),
    "max_batch_size": ((), _NO_PAGES),
    "max_scheduled_tokens": ((), _NO_PAGES),
    "num_blocks": ((), _NO_PAGES),
    "kv_cache_rotation": (("none",), "a rotated cache needs paged attention, which is not built"),
    "aux_hidden_state_layers": ((), _NO_DRAFTER),
    "dflash2_path": ((), _NO_DRAFTER),
    "dflash2_num_draft_tokens": ((), _NO_DRAFTER),
    "dflash2_fuse_gate_up": ((), _NO_DRAFTER),
    "dflash2_fuse_qkv": ((), _NO_DRAFTER),
    "dflash2_precision": ((), _NO_DRAFTER),
    "dspark_path": ((), _NO_DRAFTER),
    "dspark_num_draft_tokens": ((), _NO_DRAFTER),
    "dspark_top_k": ((), _NO_DRAFTER),
    "max_draft_tokens": ((), _NO_DRAFTER),
    "linear_attn_op": (("linear_attention",), _NO_STATES),
    "state_update_capacity": (("0",), _NO_STATES),
    "state_window": (("0",), _NO_STATES),
}


# Options of the official builder that shape parts which no model here has, so that they change nothing.
_IDLE: dict[str, str] = {
    "exclude_mtp": "true|false|0|1",
}


# Options of the official builder that are written into the configuration, for the target that knows them.
_SESSION: dict[str, tuple[str, str]] = {
    "use_device_allocator_for_initializers": ("session.use_device_allocator_for_initializers", ""),
    "enable_cuda_fpa_intb_gemm": ("ep.cuda.fpa_intb_gemm", "cuda"),
}


def _algo_config(_: str, value: str) -> Mapping[str, Any]:
    if value not in _ALGORITHMS:
        raise BadOption(
            f"there is no algo_config {value!r}; there are {', '.join(_ALGORITHMS)}."
            + nearest(value, _ALGORITHMS)
        )
    algorithm, mixed, roles = _ALGORITHMS[value]
    # As there: all matrices alike, but for those that the name itself says.
    return {"algorithm": algorithm, "recipe": "fast", "mixed": mixed, "bits8_roles": roles}


def _mixed_precision(_: str, value: str) -> Mapping[str, Any]:
    fields: dict[str, Any] = {}
    for entry in value.replace("|", ",").split(","):
        group, _, kind = entry.partition(":")
        if kind not in ("int4", "int8") or group not in ("last_matmul", "mixed_layers"):
            raise BadOption(
                "matmul_mixed_precision takes last_matmul:int4|int8 and mixed_layers:int4|int8, separated by "
                f"commas; got {entry!r}."
            )
        if group == "last_matmul":
            fields["head_bits"] = 8 if kind == "int8" else 4
        else:
            fields["mixed"] = kind == "int8"
    return fields


def _expert_type(_: str, value: str) -> Mapping[str, Any]:
    kinds = {"int2": 2, "int4": 4, "int8": 8}
    if value not in kinds:
        why = ", which ONNX Runtime runs on CUDA only" if value in ("mxfp4", "nvfp4") else ""
        raise BadOption(f"moe_quant_type must be {', '.join(kinds)}; got {value!r}{why}.")
    return {"expert_bits": kinds[value]}


def _wide_experts(key: str, value: str) -> Mapping[str, Any]:
    return {"expert_bits": 8} if _flag(key, value) else {}


def _op_types(_: str, value: str) -> Mapping[str, Any]:
    kinds = set(value.split("/"))
    if not kinds <= {"MatMul", "Gather"} or "MatMul" not in kinds:
        raise BadOption(f"op_types_to_quantize must be MatMul or MatMul/Gather; got {value!r}.")
    return {} if "Gather" in kinds else {"embed_bits": 0}


def _shared_embeddings(key: str, value: str) -> Mapping[str, Any]:
    if not _flag(key, value):
        raise BadOption(
            "--extra_options shared_embeddings=false does not apply: tied embeddings are always stored once."
        )
    return {}


# Every key that changes a build. What none of the given ones sets is as BuildOptions has it.
_OPTIONS: dict[str, _Reader] = {
    "accuracy_level": _sets("accuracy_level", _integer),
    "block_size": _sets("block_size", _integer),
    "is_symmetric": _sets("symmetric", _flag),
    "op_types_to_quantize": _op_types,
    "nodes_to_exclude": _sets("excluded_nodes", _names),
    "algo_config": _algo_config,
    "matmul_mixed_precision": _mixed_precision,
    "num_hidden_layers": _sets("layers", _integer),
    "filename": _sets("filename", _text),
    "config_only": _sets("config_only", _flag),
    "prune_lm_head": _sets("all_logits", _opposite),
    "include_hidden_states": _sets("hidden_states", _flag),
    "shared_embeddings": _shared_embeddings,
    "fuse_qkv": _sets("fuse_qkv", _flag),
    "disable_qkv_fusion": _sets("fuse_qkv", _opposite),
    "fuse_mlp_gate_up": _sets("fuse_gate_up", _flag),
    "hf_token": _sets("token", _token),
    "ragged_append": _sets("ragged_append", _flag),
    "windowed_kv_cache": _sets("window_cache", _flag),
    "bits": _sets("bits", _integer),
    "head_bits": _sets("head_bits", _integer),
    "embed_bits": _sets("embed_bits", _integer),
    "vision_bits": _sets("vision_bits", _integer),
    "moe_quant_type": _expert_type,
    "use_8bits_moe": _wide_experts,
    "qmoe_block_size": _sets("expert_block", _integer),
    "recipe": _sets("recipe", _text),
    "algorithm": _sets("algorithm", _text),
    "kv_cache_quant_scheme": _sets("kv_cache", _lower),
    "rotate": _sets("rotate", _flag),
    "fast_prompts": _sets("fast_prompts", _flag),
    "use_webgpu_fp32": _sets("fp32_activations", _flag),
}
# Keys that say more closely what another one says, and win over it.
_REFINES = {"matmul_mixed_precision": "algo_config"}


def parse_extra_options(pairs: list[str], *, target: Target) -> BuildOptions:
    """Turn ``["K=V", …]`` as the official builder takes them into options.

    Old ``int4_*`` names count as the new ones. Raises BadOption for an unknown key, with the nearest known
    one, for a value that cannot be used, and for options of the official builder that do not apply here.
    """
    given: dict[str, str] = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise BadOption(f"--extra_options takes KEY=VALUE; got {pair!r}.")
        if key == "kv_cache_scale_file":
            raise BadOption(
                "--extra_options kv_cache_scale_file does not apply: the build itself measures the scales of "
                "an int8 cache. Leave it out."
            )
        if key == "adapter_path":
            raise BadOption(
                "--extra_options adapter_path is --merge-adapter PATH here; --adapter NAME=PATH makes an adapter "
                "that is switched while the model runs."
            )
        name = _ALIASES.get(key, key)
        if name in given and given[name] != value:
            raise BadOption(f"--extra_options gives {name} twice: {given[name]!r} and {value!r}.")
        if name not in (*_OPTIONS, *_FIXED, *_IDLE, *_SESSION):
            known = (*_OPTIONS, *_SESSION, *_FIXED, *_IDLE, *_ALIASES)
            raise BadOption(
                f"there is no extra option {key!r}."
                + (nearest(key, known) or f" There are {', '.join(_OPTIONS)}.")
            )
        given[name] = value
    for key, (allowed, why) in _FIXED.items():
        if key in given and not _fits(given[key], allowed):
            way = f"Allowed: {key}={' or '.join(allowed)}." if allowed else "Leave it out."
            raise BadOption(f"--extra_options {key}={given[key]} does not apply: {why}. {way}")
    for key, values in _IDLE.items():
        if key in given and not re.fullmatch(values, given[key].lower()):
            raise BadOption(f"--extra_options {key} must be one of {values}; got {given[key]!r}.")
    return _options(given, target)


def _fits(value: str, allowed: Sequence[str]) -> bool:
    low = value.lower()
    return low in allowed or ("false" in allowed and low in ("0", "no", "off"))


def _options(given: Mapping[str, str], target: Target) -> BuildOptions:
    fields: dict[str, Any] = {}
    set_by: dict[str, str] = {}
    for key, read in _OPTIONS.items():
        if key not in given:
            continue
        for field, value in read(key, given[key]).items():
            other = set_by.get(field)
            if other not in (None, _REFINES.get(key)) and fields[field] != value:
                raise BadOption(
                    f"--extra_options {other}={given[other]} and {key}={given[key]} contradict each other; give "
                    "one of the two."
                )
            fields[field], set_by[field] = value, key
    for field in ("fuse_qkv", "fuse_gate_up"):
        if fields.get(field) and not target.packed_projections:
            key = set_by[field]
            raise BadOption(
                f"--extra_options {key}={given[key]} does not apply: {target.name} runs separate products "
                "fastest, and ortlm builds no other form for it."
            )
    if "kv_cache" in fields:
        fields["kv_cache"] = cache_scheme(fields["kv_cache"], target)
    return BuildOptions(**fields, session_options=_session_options(given, target))


def _session_options(given: Mapping[str, str], target: Target) -> tuple[tuple[str, str], ...]:
    """Return what ONNX Runtime is to be told when it loads the model."""
    settings = []
    for key, (name, only) in _SESSION.items():
        if key not in given or not _flag(key, given[key]):
            continue
        if only not in ("", target.name):
            raise BadOption(f"--extra_options {key}=true does not apply: it is for -e {only}. Leave it out.")
        settings.append((name, "1"))
    return tuple(settings)
