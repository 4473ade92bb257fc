"""The official builder's --extra_options: its keys, their values, and the options that they set."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ortlm.builder.options import BuildOptions, cache_scheme
from ortlm.errors import BadOption, nearest
from ortlm.target import Target


def _flag(key: str, value: str) -> bool:
    low = value.lower()
    if low in ("1", "true", "yes", "on"):
        return True
    if low in ("0", "false", "no", "off"):
        return False
    raise BadOption(f"--extra_options {key} must be true or false; got {value!r}.")


def _integer(key: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise BadOption(f"--extra_options {key} must be a whole number; got {value!r}.") from None


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
_NO_EXPERTS = "no model that is built here has experts"


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
        "queries and keys are normalised before attention, which every target runs",
    ),
    "qmoe_weights_prepacked": (("-1", "0"), _NO_EXPERTS),
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
    "qmoe_block_size": r"-?\d{1,4}",
    "moe_quant_type": "int2|int4|int8|mxfp4|nvfp4",
    "use_8bits_moe": "true|false|0|1",
    "exclude_mtp": "true|false|0|1",
}


# Options of the official builder that are written into the configuration, for the target that knows them.
_SESSION: dict[str, tuple[str, str]] = {
    "use_device_allocator_for_initializers": ("session.use_device_allocator_for_initializers", ""),
    "enable_cuda_fpa_intb_gemm": ("ep.cuda.fpa_intb_gemm", "cuda"),
}


_KNOWN = (
    "accuracy_level", "block_size", "is_symmetric", "op_types_to_quantize", "nodes_to_exclude", "algo_config",
    "matmul_mixed_precision", "num_hidden_layers", "filename", "config_only", "prune_lm_head",
    "include_hidden_states", "shared_embeddings", "fuse_qkv", "disable_qkv_fusion", "fuse_mlp_gate_up",
    "hf_token", "ragged_append", "windowed_kv_cache", "bits", "head_bits", "embed_bits", "vision_bits", "recipe",
    "algorithm", "kv_cache_quant_scheme", "rotate", "fast_prompts", "use_webgpu_fp32",
)  # fmt: skip


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
        if name not in (*_KNOWN, *_FIXED, *_IDLE, *_SESSION):
            known = (*_KNOWN, *_SESSION, *_FIXED, *_IDLE, *_ALIASES)
            raise BadOption(
                f"there is no extra option {key!r}."
                + (nearest(key, known) or f" There are {', '.join(_KNOWN)}.")
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
    options = BuildOptions()

    def number(key: str) -> int | None:
        return _integer(key, given[key]) if key in given else None

    options = replace(
        options,
        block_size=number("block_size"),
        accuracy_level=number("accuracy_level"),
        bits=number("bits"),
        head_bits=number("head_bits"),
        embed_bits=number("embed_bits"),
        vision_bits=number("vision_bits"),
        fast_prompts=_flag("fast_prompts", given["fast_prompts"]) if "fast_prompts" in given else False,
        layers=number("num_hidden_layers"),
        symmetric=_flag("is_symmetric", given["is_symmetric"]) if "is_symmetric" in given else None,
        filename=given.get("filename", "model.onnx"),
        config_only=_flag("config_only", given.get("config_only", "false")),
        hidden_states=_flag("include_hidden_states", given.get("include_hidden_states", "false")),
        all_logits=not _flag("prune_lm_head", given.get("prune_lm_head", "true")),
        ragged_append=_flag("ragged_append", given["ragged_append"]) if "ragged_append" in given else None,
        window_cache=_flag("windowed_kv_cache", given.get("windowed_kv_cache", "false")),
        fp32_activations=_flag("use_webgpu_fp32", given.get("use_webgpu_fp32", "false")),
        excluded_nodes=tuple(n for n in given.get("nodes_to_exclude", "").split(",") if n),
        algorithm=given.get("algorithm"),
        recipe=given.get("recipe"),
        rotate=_flag("rotate", given["rotate"]) if "rotate" in given else None,
    )
    if "kv_cache_quant_scheme" in given:
        options = replace(options, kv_cache=cache_scheme(given["kv_cache_quant_scheme"].lower(), target))
    if "algo_config" in given:
        name = given["algo_config"]
        if name not in _ALGORITHMS:
            raise BadOption(
                f"there is no algo_config {name!r}; there are {', '.join(_ALGORITHMS)}."
                + nearest(name, _ALGORITHMS)
            )
        for key in ("algorithm", "recipe"):
            if key in given:
                raise BadOption(
                    f"--extra_options algo_config={name} sets the {key} too; give one of the two."
                )
        algorithm, mixed, roles = _ALGORITHMS[name]
        # As there: all matrices alike, but for those that the name itself says.
        options = replace(options, algorithm=algorithm, recipe="fast", mixed=mixed, bits8_roles=roles)
    if "matmul_mixed_precision" in given:
        options = _mixed_precision(options, given["matmul_mixed_precision"])
    if "op_types_to_quantize" in given:
        kinds = set(given["op_types_to_quantize"].split("/"))
        if not kinds <= {"MatMul", "Gather"} or "MatMul" not in kinds:
            raise BadOption(
                f"op_types_to_quantize must be MatMul or MatMul/Gather; got {given['op_types_to_quantize']!r}."
            )
        if "Gather" not in kinds:
            options = replace(options, embed_bits=0)
    if "hf_token" in given:
        low = given["hf_token"].lower()
        options = replace(options, token={"false": False, "true": True}.get(low, given["hf_token"]))
    return _with_fusion(_with_session(options, given, target), given, target)


def _with_session(options: BuildOptions, given: Mapping[str, str], target: Target) -> BuildOptions:
    """Return ``options`` with those that ONNX Runtime is to be told when it loads the model."""
    found = []
    for key, (name, only) in _SESSION.items():
        if key not in given or not _flag(key, given[key]):
            continue
        if only not in ("", target.name):
            raise BadOption(f"--extra_options {key}=true does not apply: it is for -e {only}. Leave it out.")
        found.append((name, "1"))
    return replace(options, session_options=tuple(found))


def _with_fusion(options: BuildOptions, given: Mapping[str, str], target: Target) -> BuildOptions:
    """Return ``options`` with what is one product and what is several."""
    asked: dict[str, bool | None] = {
        "fuse_qkv": _flag("fuse_qkv", given["fuse_qkv"]) if "fuse_qkv" in given else None,
        "disable_qkv_fusion": (
            not _flag("disable_qkv_fusion", given["disable_qkv_fusion"])
            if "disable_qkv_fusion" in given
            else None
        ),
        "fuse_mlp_gate_up": (
            _flag("fuse_mlp_gate_up", given["fuse_mlp_gate_up"]) if "fuse_mlp_gate_up" in given else None
        ),
    }
    for key, wanted in asked.items():
        if wanted and not target.packed_projections:
            raise BadOption(
                f"--extra_options {key}={given[key]} does not apply: {target.name} runs separate products "
                "fastest, and ortlm builds no other form for it."
            )
    both = {wanted for key, wanted in asked.items() if wanted is not None and key != "fuse_mlp_gate_up"}
    if len(both) > 1:
        raise BadOption("--extra_options fuse_qkv and disable_qkv_fusion contradict each other; give one.")
    options = replace(options, fuse_qkv=both.pop() if both else None, fuse_gate_up=asked["fuse_mlp_gate_up"])
    if "shared_embeddings" in given and not _flag("shared_embeddings", given["shared_embeddings"]):
        raise BadOption(
            "--extra_options shared_embeddings=false does not apply: tied embeddings are always stored once."
        )
    return options


def _mixed_precision(options: BuildOptions, text: str) -> BuildOptions:
    for entry in text.replace("|", ",").split(","):
        what, _, kind = entry.partition(":")
        if kind not in ("int4", "int8") or what not in ("last_matmul", "mixed_layers"):
            raise BadOption(
                "matmul_mixed_precision takes last_matmul:int4|int8 and mixed_layers:int4|int8, separated by "
                f"commas; got {entry!r}."
            )
        if what == "last_matmul":
            options = replace(options, head_bits=8 if kind == "int8" else 4)
        else:
            options = replace(options, mixed=kind == "int8")
    return options
