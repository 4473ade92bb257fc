"""A whole study: every shape with every number of threads, several times in turn, as one report."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ortlm._utils.cpu import physical_cores
from ortlm.artifact import Artifact, graph_named
from ortlm.bench.machine import buffer_bytes, environment
from ortlm.bench.measure import WARM_UP_STEPS, WARM_UP_TOKENS
from ortlm.bench.traffic import Traffic, cache_bytes, read_traffic
from ortlm.bench.worker import in_process
from ortlm.errors import BadOption

SCHEMA = 1
_METHOD = {
    "spread": "min and max of all samples; a rate's samples are computed from each time's",
    "interleaving": "every run measures the machine and all configurations once, each number of threads "
    "in processes of its own",
    "warm_up": f"before each shape, {WARM_UP_TOKENS} tokens of each row and {WARM_UP_STEPS} steps, not counted",
    "decoding": "greedy, one token for each row at a time, tokens that end an answer ignored",
    "prompt": "random token ids, the same in every run",
    "weights": "packed as MatMulNBits of ONNX Runtime keeps them on x86; other weights as stored",
    "shares": "of the medians: bytes and operations over those of the machine with the same threads",
}


@dataclass(frozen=True, slots=True)
class Study:
    """What is to be measured. ``shapes`` are (rows of a batch, tokens of each row's prompt).

    ``threads`` are the physical cores by default. ``buffer`` is the number of bytes that measure the memory
    bandwidth, None to choose it.
    Raises BadOption for numbers below 1 and for one that occurs twice.
    """

    batches: tuple[int, ...] = (1,)
    contexts: tuple[int, ...] = (128, 512)
    threads: tuple[int, ...] = field(default_factory=lambda: (physical_cores() or os.cpu_count() or 1,))
    new: int = 32
    runs: int = 5
    device: str | None = None
    device_options: tuple[tuple[str, str], ...] = ()
    buffer: int | None = None

    def __post_init__(self) -> None:
        for name in ("batches", "contexts", "threads"):
            numbers = getattr(self, name)
            if not numbers or len(set(numbers)) < len(numbers):
                raise BadOption(f"{name} must be one number or more, each once; found {list(numbers)}.")
        for name in ("batches", "contexts", "threads", "new", "runs", "buffer"):
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else [value]:
                if number is not None and number < 1:
                    raise BadOption(f"{name} must be at least 1, found {number}.")

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Every batch and context, small ones first: a process's peak memory is then that of its last shape."""
        return sorted(((b, c) for b in self.batches for c in self.contexts), key=lambda s: (math.prod(s), s))


@dataclass(slots=True)
class _Samples:
    """What the processes of one number of threads have found, one entry for each run."""

    machine: list[dict[str, Any]] = field(default_factory=list)
    model: list[dict[str, Any]] = field(default_factory=list)


def conduct(artifact: Artifact, study: Study, tell: Callable[[str], None]) -> dict[str, Any]:
    """Measure ``artifact`` and return the report, of which docs/bench.md says what is in it.

    ``tell`` is called with a line for each process. Raises BadOption if a context does not fit into the model's,
    and what loading and running raise.
    """
    check_context(artifact, study)
    graph = graph_named(artifact.manifest, "decoder")
    traffic = read_traffic(artifact.graph_path("decoder"), graph)
    buffer = buffer_bytes(study.buffer)
    found = {threads: _Samples() for threads in study.threads}
    for run in range(1, study.runs + 1):
        for threads, samples in found.items():
            label = f"run {run} of {study.runs}, {threads} thread{'s' if threads > 1 else ''}"
            tell(f"{label}: the machine")
            samples.machine.append(in_process({"kind": "machine", "threads": threads, "size": buffer}))
            tell(f"{label}: the model, {len(study.shapes)} shape{'s' if len(study.shapes) > 1 else ''}")
            samples.model.append(in_process(_job(artifact, study, threads)))
    return {
        "schema": SCHEMA,
        "environment": environment(),
        "artifact": _facts(artifact, traffic, found[study.threads[0]].model[0]["states"]),
        "options": asdict(study),
        "method": _METHOD,
        "threads": [_of_threads(threads, samples) for threads, samples in found.items()],
        "results": [
            _result(study, traffic, threads, at, samples)
            for threads, samples in found.items()
            for at in range(len(study.shapes))
        ],
    }


def check_context(artifact: Artifact, study: Study) -> None:
    """Raise BadOption if a prompt and the new tokens do not fit into the model's context."""
    room, longest = artifact.manifest.context_tokens, max(study.contexts)
    if longest + study.new > room:
        raise BadOption(
            f"a prompt of {longest} tokens and {study.new} new ones need a context of {longest + study.new}, but "
            f"that of {artifact.path} holds {room} tokens. Use contexts up to {max(0, room - study.new)}, or "
            "fewer new tokens."
        )


def _job(artifact: Artifact, study: Study, threads: int) -> dict[str, Any]:
    return {
        "kind": "model",
        "path": str(artifact.path),
        "threads": threads,
        "device": study.device,
        "device_options": dict(study.device_options),
        "shapes": study.shapes,
        "new": study.new,
    }


def spread(samples: Sequence[float | None]) -> dict[str, Any] | None:
    """Return median, minimum and maximum of ``samples`` with themselves, None if one is not known."""
    known = [sample for sample in samples if sample is not None]
    if len(known) < len(samples) or not known:
        return None
    return {"median": statistics.median(known), "min": min(known), "max": max(known), "samples": known}


def _of_threads(threads: int, samples: _Samples) -> dict[str, Any]:
    """Return what holds for all shapes of one number of threads: the machine, and loading."""
    bandwidths = [sample["bandwidth"] for sample in samples.machine]
    rates = _int8_rates(samples)
    return {
        "threads": threads,
        "bandwidth_bytes_per_second": spread([b["bytes_per_second"] for b in bandwidths]),
        "bandwidth_buffer_bytes": bandwidths[0]["buffer_bytes"],
        "last_cache_bytes": bandwidths[0]["cache_bytes"],
        "int8_operations_per_second": rates,
        "int8_peak": _peak(rates),
        "load_seconds": spread([s["load_seconds"] for s in samples.model]),
        "loaded_private_bytes": spread([s["private_bytes"] for s in samples.model]),
    }


def _int8_rates(samples: _Samples) -> dict[str, Any]:
    operators = samples.machine[0]["int8"]
    return {name: spread([sample["int8"][name] for sample in samples.machine]) for name in operators}


def _peak(rates: Mapping[str, Any]) -> str:
    """Return the operator that was fastest."""
    return max(rates, key=lambda name: float(rates[name]["median"]))


def _result(study: Study, traffic: Traffic, threads: int, at: int, samples: _Samples) -> dict[str, Any]:
    """Return the figures of one shape with one number of threads."""
    batch, context = study.shapes[at]
    shapes = [sample["shapes"][at] for sample in samples.model]
    prefill = spread([batch * context / shape["prefill_seconds"] for shape in shapes])
    decode = spread([batch * study.new / shape["decode_seconds"] for shape in shapes])
    assert prefill is not None
    assert decode is not None
    cache = cache_bytes(samples.model[0]["states"], context + study.new / 2)
    per_token = traffic.weight_bytes / batch + cache
    bandwidth = statistics.median(s["bandwidth"]["bytes_per_second"] for s in samples.machine)
    rates = _int8_rates(samples)
    peak = rates[_peak(rates)]["median"]
    prompt_operations = 2 * traffic.prompt_multiplications(context) / context
    shares: dict[str, float | None] = {
        "decode_bandwidth_share": per_token * decode["median"] / bandwidth,
        "decode_int8_share": 2 * traffic.multiplications * decode["median"] / peak,
        "prefill_int8_share": prompt_operations * prefill["median"] / peak,
    }
    if samples.model[0]["device"] != "cpu":
        # What was measured is main memory and the processor.
        shares = dict.fromkeys(shares)
    return {
        "threads": threads,
        "batch": batch,
        "context": context,
        "first_token_seconds": spread([shape["first_token_seconds"] for shape in shapes]),
        "prefill_tokens_per_second": prefill,
        "decode_tokens_per_second": decode,
        "step_seconds": spread([shape["decode_seconds"] / study.new for shape in shapes]),
        "bytes_per_token": {
            "weights": round(traffic.weight_bytes / batch),
            "cache": cache,
            "total": round(per_token),
        },
        "operations_per_token": {"prefill": round(prompt_operations), "decode": 2 * traffic.multiplications},
        **shares,
        "cache_buffer_bytes": shapes[0]["cache_buffer_bytes"],
        "peak_bytes": spread([shape["peak_bytes"] for shape in shapes]),
        "recomputed": max(shape["recomputed"] for shape in shapes),
    }


def _facts(artifact: Artifact, traffic: Traffic, states: Sequence[Sequence[int | None]]) -> dict[str, Any]:
    """Return what is known of the artifact; of one without ortlm.json, what its graph says."""
    manifest, path = artifact.manifest, artifact.graph_path("decoder")
    operators: dict[str, int] = {}
    for product in traffic.products:
        operators[product.operator] = operators.get(product.operator, 0) + 1
    return {
        "name": artifact.path.resolve().name,
        "graph_bytes": sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")),
        "context_tokens": manifest.context_tokens,
        "vocab_size": manifest.vocab_size,
        "rope_switch_tokens": manifest.rope_switch_tokens,
        "products": operators,
        "weights": traffic.multiplications,
        "weight_bytes": traffic.weight_bytes,
        "cache_bytes_per_token": cache_bytes(states, 1),
        "info": _known(manifest.info),
    }


def _known(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return what identifies a build, without its longer lists."""
    return {key: value for key, value in info.items() if isinstance(value, (str, int, float))}
