"""What ``ortlm build`` shows: what would be built, what was built, and what a search measured."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ortlm._utils.formatting import readable_bytes
from ortlm.artifact import MANIFEST_FILE

if TYPE_CHECKING:
    from rich.console import Console

    from ortlm.artifact import Artifact
    from ortlm.builder.bit_allocation import Point
    from ortlm.builder.estimate import Outline
    from ortlm.evaluation.quick_check import Check

_SAMPLE_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class Result:
    """A finished build and how long it took in seconds; outline and check of each dtype, None if not checked.

    Folders that are not for transformers.js have one dtype.
    """

    artifact: Artifact
    outlines: tuple[Outline, ...]
    seconds: float
    checks: tuple[Check | None, ...]

    @property
    def outline(self) -> Outline:
        """What was built, the first of several."""
        return self.outlines[0]

    @property
    def bytes(self) -> int:
        """The size of the whole folder."""
        return sum(f.stat().st_size for f in self.artifact.path.rglob("*") if f.is_file())

    @property
    def experts(self) -> str:
        """How experts were quantized by a calibrated recipe, in words; empty where there are none."""
        if "experts" not in self.artifact.manifest.info:
            return ""
        facts: Any = self.artifact.manifest.info["experts"]
        rounded = sum(map(len, facts["rounded"].values()))
        words = f"{facts['calibrated']} of {facts['calibrated'] + rounded} matrices calibrated"
        if rounded:
            words += (
                f", {rounded} rounded to nearest: too few tokens chose them ({MANIFEST_FILE} lists which)"
            )
        return words

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        checks = [check.to_dict() if check is not None else None for check in self.checks]
        facts = {
            "schema": 1,
            **asdict(self.outline),
            "output": str(self.artifact.path),
            "checkpoint_bytes": self.outline.checkpoint_bytes,
            "output_bytes": self.bytes,
            "bits_per_weight": round(self.outline.bits_per_weight, 3),
            "seconds": round(self.seconds, 2),
            "peak_memory_bytes": _peak_memory_bytes(),
            "check": checks[0],
        }
        if "experts" in self.artifact.manifest.info:
            facts["experts"] = self.artifact.manifest.info["experts"]
        if self.outline.dtype is not None:
            facts["dtypes"] = {
                outline.dtype: {"bits_per_weight": round(outline.bits_per_weight, 3), "check": check}
                for outline, check in zip(self.outlines, checks, strict=True)
            }
        return facts


def made_for(outlines: Iterable[Outline]) -> str:
    """Return precision and target of a build in words."""
    first, *others = outlines
    dtypes = ", ".join(str(outline.dtype) for outline in (first, *others))
    return first.made_for if first.dtype is None else f"{dtypes} for transformers.js"


def show_result(console: Console, result: Result) -> None:
    """Show what was built, and how to run it."""
    from rich.table import Table

    artifact, outline = result.artifact, result.outline
    peak, size = _peak_memory_bytes(), result.bytes
    table = Table(title=f"{artifact.path}", title_justify="left", show_header=False, title_style="bold")
    table.add_row("checkpoint size", readable_bytes(outline.checkpoint_bytes))
    table.add_row("model size", f"{readable_bytes(size)}  ({size / max(outline.checkpoint_bytes, 1):.0%})")
    several = len(result.outlines) > 1
    if not several:
        table.add_row("bits per weight", f"{outline.bits_per_weight:.2f}")
    if outline.stored_before:
        table.add_row("checkpoint types", outline.stored_before.replace("; ", "\n"))
    if result.experts:
        table.add_row("experts", result.experts)
    table.add_row("time", f"{result.seconds:.1f} s")
    table.add_row("peak memory", readable_bytes(peak) if peak else "unknown")
    for one, check in zip(result.outlines, result.checks, strict=True):
        if several:
            table.add_row(f"{one.dtype}", f"{one.bits_per_weight:.2f} bits per weight")
        if check is None or check.kld is None:
            continue
        table.add_row(
            "check",
            f"KL divergence {check.kld:.4f}, top-1 agreement {check.same_top:.1f} % "
            f"({check.scored_tokens} tokens, against fp32{_where(artifact)})",
        )
        if check.continuation:
            table.add_row("sample output", f"{check.prompt} | {_one_line(check.continuation)}")
    console.print(table)
    words = '"Once upon a time"' if artifact.manifest.images is None else '"What is shown?" --image FILE'
    console.print(f"Run it: ortlm generate {artifact.path} {words}", highlight=False)


def show_outline(console: Console, outline: Outline, out: Path) -> None:
    """Show what would be built in ``out``."""
    from rich.table import Table

    table = Table(title=f"would build {out}", title_justify="left", show_header=False, title_style="bold")
    cache = f"{outline.cache_bytes_per_token / 1e3:,.1f} kB"
    calibration = outline.calibration
    for name, value in (
        ("source", outline.source),
        ("architecture", f"{outline.model_type}, {outline.layers} layers"),
        ("parameters", f"{outline.parameters:,}"),
        ("target", outline.made_for),
        ("recipe", outline.recipe_name or ""),
        ("weights", outline.recipe.replace("; ", "\n")),
        ("checkpoint types", outline.stored_before.replace("; ", "\n")),
        (
            "calibration",
            f"{calibration.tokens:,} tokens of {calibration.source}" if calibration is not None else "",
        ),
        ("bits per weight", f"{outline.bits_per_weight:.2f}"),
        ("merged adapter", outline.merged_adapter or ""),
        ("adapters", "\n".join(f"{n}, {readable_bytes(b)}" for n, b in outline.adapter_bytes.items())),
        (
            "checkpoint and model size",
            f"{readable_bytes(outline.checkpoint_bytes)} to about {readable_bytes(outline.output_bytes)}",
        ),
        (
            "context",
            f"{outline.context_tokens:,} tokens, {cache} of {outline.kv_cache} KV cache per token",
        ),
        ("peak memory", f"about {readable_bytes(outline.peak_memory_bytes)}"),
        ("notes", "\n".join(outline.notes)),
        ("time", f"about {_duration(outline.seconds)} on this machine" if outline.seconds else "unknown"),
    ):
        if value:
            table.add_row(name, value)
    console.print(table)


def show_frontier(console: Console, frontier: Iterable[Point], chosen: Point) -> None:
    """Show size and quality of the mixtures that a search measured."""
    from rich.table import Table

    table = Table(title="size against KL divergence", title_justify="left", box=None)
    for name in ("matrices", "size", "mean KL divergence", ""):
        table.add_column(name, justify="right" if name else "left")
    for point in frontier:
        mark = "chosen" if point == chosen else ""
        table.add_row(point.name, readable_bytes(point.bytes), f"{point.kld:.5f}", mark)
    console.print(table)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def _one_line(text: str) -> str:
    """Return the beginning of ``text`` as one line."""
    line = " ".join(text.split())
    return line if len(line) <= _SAMPLE_CHARACTERS else f"{line[: _SAMPLE_CHARACTERS - 3]}..."


def _peak_memory_bytes() -> int:
    """Return the largest resident size this process had, 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _where(artifact: Artifact) -> str:
    """Return where a model was checked, if that is not the device that it was built for."""
    return "" if artifact.manifest.device == "cpu" else f", on the CPU, not on {artifact.manifest.device}"
