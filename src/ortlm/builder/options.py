"""What a user may ask of a build, as typed values, and the official builder's spelling of it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from ortlm.errors import BadOption
from ortlm.quant.algorithms import CALIBRATED, check_algorithm
from ortlm.quant.recipe import (
    FINE,
    FINE_BLOCK,
    PRESETS,
    ROLES,
    SENSITIVE,
    WIDE,
    Preset,
    Recipe,
    Rule,
    Ruled,
    Uniform,
)
from ortlm.quant.recipe_file import DEFAULTS, find_preset
from ortlm.quant.scheme import Scheme
from ortlm.target import TARGETS, Target

# How the key/value cache may be stored: as activations are, or in 8 bits.
CACHE_SCHEMES = ("none", "int8_per_channel", "int8_per_tensor")


# Options of which only quantized weights know.
_SHAPING = (
    "block_size", "symmetric", "accuracy_level", "bits", "head_bits", "embed_bits", "vision_bits",
    "expert_bits", "expert_block", "bits8_roles", "mixed", "excluded_nodes", "recipe", "algorithm", "rotate",
    "rules", "calibration", "calibration_tokens", "fast_prompts",
    "integer_only",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Everything beyond precision and target; None leaves a choice to the recipe, and that to the target.

    Quantization: ``recipe`` is "fast", "balanced", "quality" or a file, by default balanced for int4 and fast for
    int8. ``block_size`` inputs share a scale; ``symmetric``; ``accuracy_level`` of MatMulNBits (4 is
    int8 activations); ``bits`` overrides the precision's (2, 4 or 8), ``head_bits``, ``embed_bits`` and
    ``vision_bits`` those of head, embeddings and vision encoder, 0 keeps them float; ``expert_bits`` and
    ``expert_block`` are those of the experts of mixtures; ``algorithm`` finds
    the codes: "rtn", "clip_search", "importance", "awq", "gptq" or "awq_gptq"; ``bits8_roles`` are kept at 8
    bits, with ``mixed`` also queries, keys, values and down projections of the layers that suffer most;
    ``excluded_nodes`` keep float weights; ``rotate`` rotates the residual stream (Hadamard). ``rules``
    come last and win. ``keep_quantization`` carries over the matrices of a quantized checkpoint that ONNX Runtime
    has the same form for, bit for bit; by default those that were calibrated or trained for it, and have no more
    bits than the precision.

    Calibration: ``calibration`` is a file of text, chats or token ids; without one the model generates the text
    itself. ``calibration_tokens`` of it are read.

    Graph: ``layers`` builds the first N only; ``all_logits`` gives logits for every position;
    ``hidden_states`` adds them as an output; ``filename`` of the graph; ``config_only`` writes everything
    but graph and weights; ``ragged_append``: next to the graph that every ONNX Runtime loads there is a second
    one, which shares its weights and lets a batch append different numbers of tokens per row in one run, by
    default where the target knows how (False: the first one only, which takes such tokens one at a time);
    ``window_cache`` lets layers with a window keep its positions only, which old ONNX Runtimes cannot load;
    ``fp32_activations`` is for devices of the webgpu target that do not compute in fp16.

    ``max_length``: what ``search.max_length`` in genai_config.json says, in tokens, prompt included; by default
    the context, and 4096 at most.

    ``fast_prompts`` stores each quantized matrix of the decoder a second time, with 8 bits, and computes prefill
    by integer matmul (int8 GEMM; images always so, with nothing stored twice): several times as fast on processors
    with instructions for it. ``integer_only`` stores them in that form only, and decodes with it too: for many
    rows at once, such as the text that a model generates to be calibrated on.

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
    expert_bits: int | None = None
    expert_block: int | None = None
    algorithm: str | None = None
    recipe: str | None = None
    rotate: bool | None = None
    mixed: bool = False
    bits8_roles: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    keep_quantization: bool | None = None
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
    integer_only: bool = False
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
    if eight and (options.bits not in (None, 8) or options.expert_bits not in (None, 8) or options.mixed):
        raise BadOption(
            "-p int8 means 8 bits everywhere; bits, of experts too, and mixed recipes shape int4. "
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
        # At 8 bits a zero point gains less than its bytes.
        symmetric=bool(first(options.symmetric, preset.symmetric, eight or target.symmetric)),
        accuracy_level=first(options.accuracy_level, target.accuracy_level),
        algorithm=preset.algorithm,
        scales="fp16" if target.half_scales else "fp32",
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
    block = first(options.block_size, preset.block, 0)
    if not block and target.block > FINE_BLOCK:
        rules += FINE
    # A width that was asked for wins over one that a named recipe implies.
    if preset.wide and options.bits is None and target.wide and not eight:
        named = {
            "head": (options.head_bits, preset.head_bits),
            "embed": (options.embed_bits, preset.embed_bits),
        }
        asked = {role for role, choices in named.items() if choices != (None, None)}
        rules += [
            replace(r, block=block or r.block, roles=roles)
            for r in WIDE
            if (roles := tuple(role for role in r.roles if role not in asked))
        ]
    rules += [r for r in preset.rules if not (options.recipe in (None, *PRESETS) and _too_wide(r, target))]
    if options.mixed:
        rules.append(Rule(roles=("qkv", "down"), layers=SENSITIVE, bits=8))
    roles = tuple(r for r in options.bits8_roles if r != "head" or options.head_bits is None)
    if roles:
        rules.append(Rule(roles=roles, bits=8))
    if options.expert_bits is not None or options.expert_block is not None:
        # What no scheme can be is told whether or not the model has experts.
        Scheme(options.expert_bits or body.bits, options.expert_block or body.block)
        rules.append(Rule(roles=("experts",), bits=options.expert_bits, block=options.expert_block))
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


def without_quantization(options: BuildOptions) -> BuildOptions:
    """Return ``options`` without those that shape quantized weights."""
    usual = BuildOptions()
    return replace(options, **{name: getattr(usual, name) for name in _SHAPING})


def _check_nothing_quantized(precision: str, options: BuildOptions) -> None:
    """Raise BadOption if ``options`` shape quantized weights, of which ``precision`` has none."""
    unused = [name for name in _SHAPING if getattr(options, name) not in (None, (), False)]
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
    paths: dict[str, str] = {}
    for pair in pairs:
        name, sign, path = pair.partition("=")
        if not sign or not path:
            raise BadOption(f"--adapter takes NAME=PATH, for example french=./french-lora; got {pair!r}.")
        if name in paths:
            raise BadOption(f"--adapter gives {name!r} twice: {paths[name]} and {path}. Choose another name.")
        paths[name] = path
    check_adapter_names(paths)
    return paths


def parse_merged(values: Sequence[str]) -> list[tuple[str, float]]:
    """Turn ``["PATH", "PATH=0.7", …]`` into paths and numbers, 1 where there is none. Raises BadOption."""
    found = []
    for value in values:
        path, sign, number = value.rpartition("=")
        try:
            weight = float(number) if sign else 1.0
        except ValueError:  # a path with a sign in it
            path, weight = value, 1.0
        path = path if sign else value
        if not path or not math.isfinite(weight) or weight == 0:
            raise BadOption(
                f"--merge-adapter takes PATH or PATH=NUMBER, a number other than 0, such as ./french-lora=0.7; "
                f"got {value!r}."
            )
        found.append((path, weight))
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
