"""What a user may ask of a build, as typed values, and the official builder's spelling of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ortlm.errors import BadOption, nearest
from ortlm.quant.algorithms import CALIBRATED, check_algorithm
from ortlm.quant.recipe import PRESETS, ROLES, SENSITIVE, WIDE, Preset, Recipe, Rule, Ruled, Uniform
from ortlm.quant.recipe_file import DEFAULTS, find_preset
from ortlm.quant.scheme import Scheme
from ortlm.target import TARGETS, Target

# How the key/value cache may be stored: as activations are, or in 8 bits.
CACHE_SCHEMES = ("none", "int8_per_channel", "int8_per_tensor")


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Everything beyond precision and target; None leaves a choice to the recipe, and that to the target.

    Quantization: ``recipe`` is "fast", "balanced", "quality" or a file, by default balanced for int4 and fast for
    int8. ``block_size`` inputs share a scale; ``symmetric``; ``accuracy_level`` of MatMulNBits (4 is
    int8 activations); ``bits`` overrides the precision's (2, 4 or 8), ``head_bits``, ``embed_bits`` and
    ``vision_bits`` those of head, embeddings and what sees pictures, 0 keeps them float; ``algorithm`` finds
    the codes: "rtn", "clip_search", "importance", "awq", "gptq" or "awq_gptq"; ``bits8_roles`` are kept at 8
    bits, with ``mixed`` also queries, keys, values and down projections of the layers that suffer most;
    ``excluded_nodes`` keep float weights; ``rotate`` turns the residual stream. ``rules`` come last and win.

    Calibration: ``calibration`` is a file of text, chats or token ids; without one the model writes the text
    itself. ``calibration_tokens`` of it are read.

    Graph: ``layers`` builds the first so many only; ``all_logits`` gives logits for every position;
    ``hidden_states`` adds them as an output; ``filename`` of the graph; ``config_only`` writes everything
    but graph and weights; ``ragged_append``: beside the graph that every ONNX Runtime loads stands a second one,
    which shares its weights and lets a batch append different numbers of tokens per row in one run, by default
    where the target knows how (False: the first one only, which takes such tokens one at a time);
    ``window_cache`` lets layers with a window keep its positions only, which old ONNX Runtimes cannot load;
    ``fp32_activations`` is for devices of the webgpu target that do not compute in fp16.

    ``max_length``: what ``search.max_length`` in genai_config.json says, in tokens, prompt included; by default
    the context, and 4096 at most.

    ``fast_prompts`` stores each quantized matrix of the decoder a second time, with 8 bits, and lets prompts be
    products of integers (pictures always are, with nothing stored twice): several times as fast on processors with
    instructions for them.

    ``kv_cache`` "int8_per_channel" (or "int8", which is the same) or "int8_per_tensor" keeps keys and values in 8
    bits, with scales that are measured on the model while it is built; "none" keeps them as activations are.

    ``fuse_qkv`` False keeps queries, keys and values apart where the target takes them as one product, and
    ``fuse_gate_up`` gate and up. ``session_options`` are written into the artifact for ONNX Runtime.

    ``token``: for gated models on the hub; True takes the stored one, False sends none.
    """

    block_size: int | None = None
    symmetric: bool | None = None
    accuracy_level: int | None = None
    bits: int | None = None
    head_bits: int | None = None
    embed_bits: int | None = None
    vision_bits: int | None = None
    algorithm: str | None = None
    recipe: str | None = None
    rotate: bool | None = None
    mixed: bool = False
    bits8_roles: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    calibration: str | None = None
    calibration_tokens: int | None = None
    excluded_nodes: tuple[str, ...] = ()
    layers: int | None = None
    all_logits: bool = False
    hidden_states: bool = False
    filename: str = "model.onnx"
    config_only: bool = False
    ragged_append: bool | None = None
    kv_cache: str | None = None
    window_cache: bool = False
    fast_prompts: bool = False
    fuse_qkv: bool | None = None
    fuse_gate_up: bool | None = None
    session_options: tuple[tuple[str, str], ...] = ()
    fp32_activations: bool = False
    max_length: int | None = None
    token: str | bool | None = field(default=None, repr=False)


def preset_of(precision: str, options: BuildOptions) -> Preset:
    """Return the recipe, as data, that ``options`` ask for, by default the one for ``precision``.

    Raises BadOption if there is none of that name.
    """
    preset = find_preset(options.recipe or DEFAULTS.get(precision, "fast"))
    calibration = preset.calibration
    if options.calibration_tokens is not None:
        if options.calibration_tokens < 16:
            raise BadOption(f"calibration takes at least 16 tokens; got {options.calibration_tokens}.")
        calibration = replace(
            calibration,
            tokens=options.calibration_tokens,
            length=min(calibration.length, options.calibration_tokens),
        )
    return replace(
        preset,
        algorithm=options.algorithm or preset.algorithm,
        rotate=preset.rotate if options.rotate is None else options.rotate,
        calibration=calibration,
    )


def make_recipe(precision: str, target: Target, options: BuildOptions) -> Recipe:
    """Return the recipe that ``precision`` means on ``target`` with ``options``.

    Raises BadOption for options that contradict each other, the precision or the target.
    """
    if options.algorithm is not None:
        check_algorithm(options.algorithm)
    preset = preset_of(precision, options)
    if precision not in ("int4", "int8"):
        _check_nothing_quantized(precision, options)
        return Uniform(None, None, None)
    eight = precision == "int8"
    if eight and (options.bits not in (None, 8) or options.mixed):
        raise BadOption(
            "-p int8 means 8 bits everywhere; bits and mixed recipes shape int4. "
            "Nearest: -p int4 with the same options."
        )
    unknown = set(options.bits8_roles) - set(ROLES)
    if unknown:
        raise BadOption(f"bits8_roles has {sorted(unknown)[0]!r}; there are {', '.join(ROLES)}.")

    def first(*choices: int | None) -> int:
        return next(c for c in choices if c is not None)

    body = Scheme(
        bits=first(options.bits, 8 if eight else preset.bits, 4),
        block=first(options.block_size, preset.block, target.block),
        symmetric=bool(first(options.symmetric, preset.symmetric, target.symmetric)),
        accuracy_level=first(options.accuracy_level, target.accuracy_level),
        algorithm=preset.algorithm,
    )

    def at(bits: int, *, rounded: bool) -> Scheme | None:
        # Embeddings are looked up, not multiplied, so there is nothing to calibrate.
        algorithm = "rtn" if rounded and body.algorithm in CALIBRATED else body.algorithm
        return None if bits == 0 else replace(body, bits=bits, algorithm=algorithm)

    head = first(options.head_bits, 8 if eight else preset.head_bits, target.head_bits)
    embed = first(options.embed_bits, 8 if eight else preset.embed_bits, target.embed_bits)
    vision = first(options.vision_bits, 8 if eight else preset.vision_bits, target.vision_bits)
    base = Uniform(body, at(head, rounded=False), at(embed, rounded=True), at(vision, rounded=True))
    rules: list[Rule] = []
    # A width that was asked for wins over one that a named recipe implies.
    if preset.wide and options.bits is None and target.wide:
        rules += WIDE
    rules += [r for r in preset.rules if not (options.recipe in (None, *PRESETS) and _too_wide(r, target))]
    if options.mixed:
        rules.append(Rule(roles=("qkv", "down"), layers=SENSITIVE, bits=8))
    roles = tuple(r for r in options.bits8_roles if r != "head" or options.head_bits is None)
    if roles:
        rules.append(Rule(roles=roles, bits=8))
    if options.excluded_nodes:
        rules.append(Rule(nodes=tuple(_literal(n) for n in options.excluded_nodes), bits=0))
    rules += options.rules
    used = {s.bits for s in (base.body, base.head, base.embed, base.vision) if s} | {
        r.bits for r in rules if r.bits
    }
    if not used <= set(target.weight_bits):
        wrong = sorted(used - set(target.weight_bits))[0]
        raise BadOption(
            f"{target.name} has no kernel for {wrong}-bit weights; it has "
            f"{', '.join(map(str, target.weight_bits))} bits."
        )
    return Ruled(base, tuple(rules)) if rules else base


def _check_nothing_quantized(precision: str, options: BuildOptions) -> None:
    """Raise BadOption if ``options`` shape quantized weights, of which ``precision`` has none."""
    shaping = (
        "block_size", "symmetric", "accuracy_level", "bits", "head_bits", "embed_bits", "vision_bits",
        "bits8_roles", "mixed", "excluded_nodes", "recipe", "algorithm", "rotate", "rules", "calibration",
        "calibration_tokens", "fast_prompts",
    )  # fmt: skip
    unused = [name for name in shaping if getattr(options, name) not in (None, (), False)]
    if unused:
        raise BadOption(
            f"{', '.join(unused)} shape quantized weights, but -p {precision} quantizes none. "
            "Nearest: -p int4 or -p int8."
        )


def _too_wide(rule: Rule, target: Target) -> bool:
    """Whether a rule of a built-in recipe, which has to fit every target, asks for more than ``target`` knows."""
    return rule.bits is not None and rule.bits not in target.weight_bits


def _literal(name: str) -> str:
    """Return a pattern that matches ``name`` only."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def cache_scheme(name: str | None, target: Target) -> str:
    """Return how the cache is stored that ``name`` asks for, one of ``CACHE_SCHEMES``.

    "int8" means a scale for each channel, None no quantization. Raises BadOption, saying what is allowed, if there
    is no such scheme, or none on ``target``.
    """
    scheme = {None: "none", "int8": "int8_per_channel"}.get(name, name)
    if scheme not in CACHE_SCHEMES:
        why = (
            "scales are measured once, for a tensor or a channel"
            if name is not None and name.endswith("_per_token")
            else "of the formats that ONNX Runtime knows, ortlm builds 8-bit integers only"
        )
        raise BadOption(
            f"the key/value cache cannot be stored as {name!r}: {why}. Allowed: int8 (which is int8_per_channel), "
            f"{', '.join(CACHE_SCHEMES[1:])}, none."
        )
    if scheme != "none" and not target.int8_cache:
        able = [t.name for t in TARGETS.values() if t.int8_cache]
        raise BadOption(
            f"an int8 key/value cache is not built for {target.name}, where attention with it has not been "
            f"verified. Nearest: -e {' or '.join(able)}, or a cache that is not quantized (--kv-cache none)."
        )
    return scheme


def with_cache(options: BuildOptions, name: str | None, target: Target) -> BuildOptions:
    """Return ``options`` with the cache stored as ``name`` (of --kv-cache) says; None leaves them as they are.

    Raises BadOption for what cannot be, or if the options say another.
    """
    if name is None:
        return options
    scheme = cache_scheme(name, target)
    if options.kv_cache not in (None, scheme):
        raise BadOption(
            f"--kv-cache {name} and --extra_options kv_cache_quant_scheme={options.kv_cache} contradict each "
            "other; give one of the two."
        )
    return replace(options, kv_cache=scheme)


def with_activations(target: Target, precision: str, options: BuildOptions) -> Target:
    """Return ``target`` with activations of the element type that ``options`` ask for.

    Raises BadOption where fp32 instead of fp16 is no choice.
    """
    if not options.fp32_activations:
        return target
    if not target.without_fp16:
        able = " or ".join(f"-e {t.name}" for t in TARGETS.values() if t.without_fp16)
        raise BadOption(
            f"use_webgpu_fp32 does not apply: {target.name} computes in {target.precisions[precision]} with "
            f"-p {precision}. It is for {able}. Leave it out."
        )
    if precision not in target.without_fp16:
        raise BadOption(
            f"use_webgpu_fp32 and -p {precision} contradict each other: one asks for activations in fp32. "
            f"Nearest: -p fp32 -e {target.name}."
        )
    return replace(target, precisions=target.without_fp16)


def with_recipe(
    options: BuildOptions, recipe: str | None, calibration: str | None, tokens: int | None
) -> BuildOptions:
    """Return ``options`` with what --recipe, --calibration and --calibration-tokens say; None leaves them.

    Raises BadOption if the options name a recipe or an algorithm themselves.
    """
    if recipe is not None:
        if options.recipe not in (None, recipe):
            raise BadOption(
                f"--recipe {recipe} and --extra_options contradict each other: algo_config and recipe= choose "
                f"{options.recipe!r}. Give one of the two."
            )
        options = replace(options, recipe=recipe)
    return replace(options, calibration=calibration, calibration_tokens=tokens)


def parse_adapters(pairs: Sequence[str]) -> dict[str, str]:
    """Turn ``["NAME=PATH", …]`` into names and paths. Raises BadOption for what is none, or a name given twice."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, sign, path = pair.partition("=")
        if not sign or not path:
            raise BadOption(f"--adapter takes NAME=PATH, for example french=./french-lora; got {pair!r}.")
        if name in found:
            raise BadOption(f"--adapter gives {name!r} twice: {found[name]} and {path}. Choose another name.")
        found[name] = path
    check_adapter_names(found)
    return found


def check_adapter_names(names: Iterable[str]) -> None:
    """Raise BadOption for a name of an adapter that cannot be the name of a file everywhere."""
    seen: dict[str, str] = {}
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", name):
            raise BadOption(
                "the name of an adapter is made of letters, digits, '.', '_' and '-', up to 100 of them, and does "
                f"not begin with '.'; got {name!r}."
            )
        # Files whose names differ in case only are one file on some systems.
        other = seen.setdefault(name.lower(), name)
        if other != name:
            raise BadOption(f"the adapters {other!r} and {name!r} differ in case only. Choose another name.")


# --- the official builder's --extra_options -----------------------------------------------------------------


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
