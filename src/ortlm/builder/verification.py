"""The quick look at the end of a build: whether the model still says what its checkpoint says."""

from __future__ import annotations

import os
from pathlib import Path

from ortlm.builder.planning import Prepared, weights_of
from ortlm.errors import BadArtifact, Error
from ortlm.evaluation.quick_check import Check, quick_check
from ortlm.layerwise.reference import Reference

# ONNX Runtime brings all experts into its kernels' layout, in memory of the process, though a token reads few.
_LARGE_MIXTURE = 512 << 20


class Unchecked(Error):
    """A model cannot be checked here."""


def check(prepared: Prepared, folder: Path, *, threads: int | None = None) -> Check:
    """Compare the model that ``prepared`` became in ``folder`` with its checkpoint in fp32, on some tokens.

    Large mixtures of experts, and what memory does not suffice for, are run in parts, without a sample of output.
    Raises Unchecked, with the reason, if this machine cannot run the model, and BadArtifact if nothing can: it
    should run here and does not, or its logits are no numbers.
    """
    size = prepared.layout.bytes
    free = _available_bytes()
    too_large = free is not None and 1.3 * size > free
    divisible = not prepared.others and not prepared.options.fast_prompts
    in_parts = divisible and (too_large or (size > _LARGE_MIXTURE and prepared.has_experts))
    if free is not None and too_large and not in_parts:
        raise Unchecked(
            f"running it takes about {1.3 * size / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
        )
    if prepared.emitted.builder.dtype == "bf16":
        raise Unchecked("no processor here computes in bf16")
    reference = Reference(weights_of(prepared, rotated=False), threads=threads)
    try:
        result = quick_check(folder, reference, threads=threads, in_parts=in_parts)
    except BadArtifact as error:
        if prepared.target.provider is None:
            raise
        raise Unchecked(str(error)) from error
    finally:
        reference.close()
    if not result.finite:
        raise BadArtifact(
            "its logits are not all numbers, so that it is of no use: weights or activations are beyond what "
            f"{prepared.outline.made_for} holds. Try another precision."
        )
    return result


def _available_bytes() -> int | None:
    """Return how much memory is free for use, None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:  # noqa: PTH123 - no file, and read line by line
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
