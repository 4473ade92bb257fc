"""Plots as inline SVG: axes, labels, no script. Colors are variables of the page, light or dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

# Small enough that letters stay readable on a phone, where a plot is 340 pixels wide.
_WIDTH, _HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 14, 14, 50
_INK, _GRID, _FILL, _MARK = "var(--ink)", "var(--line)", "var(--fill)", "var(--mark)"


@dataclass(frozen=True, slots=True)
class Scale:
    """From numbers between ``low`` and ``high`` to pixels between ``start`` and ``end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return where ``value`` lies; what is outside lies at the edge."""
        low, high = self._of(self.low), self._of(self.high)
        share = (self._of(max(value, self.low)) - low) / ((high - low) or 1.0)
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    def _of(self, value: float) -> float:
        return math.log10(value) if self.log else value


def histogram(data: Mapping[str, Any], marks: Mapping[str, float]) -> str:
    """Return the distribution of KL divergences on a logarithmic axis, with lines at ``marks``."""
    edges, counts = data["edges"], data["counts"]
    filled = [i for i, count in enumerate(counts) if count]
    # Whole decades, so that the axis has round ends.
    low = 10 ** math.floor(round(math.log10(edges[filled[0]]), 6))
    high = 10 ** math.ceil(round(math.log10(edges[filled[-1] + 1]), 6))
    x = Scale(low, high, _LEFT, _WIDTH - _RIGHT, log=True)
    # The marks' names stand above the bars.
    y = Scale(0, max(counts), _HEIGHT - _BOTTOM, _TOP + 22)
    parts = [
        _grid_y(y, _round_ticks(max(counts)), lambda v: f"{v:,.0f}"),
        _grid_x(x, _decades(low, high), _power),
    ]
    for i in filled:
        left, right, top = x(edges[i]), x(edges[i + 1]), y(counts[i])
        title = f"{counts[i]:,} tokens between {edges[i]:.1e} and {edges[i + 1]:.1e}"
        parts.append(
            f'<rect x="{left + 0.5:.1f}" y="{top:.1f}" width="{max(1.0, right - left - 1):.1f}" '
            f'height="{y(0) - top:.1f}" fill="{_FILL}"><title>{title}</title></rect>'
        )
    ordered = sorted(marks.items(), key=lambda mark: mark[1])
    for at, (name, value) in enumerate(ordered):
        place = x(value)
        # The smaller one's name to its left, so that two that are close do not meet.
        anchor, shift = ("end", -4) if at < len(ordered) / 2 else ("start", 4)
        parts.append(
            f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{_TOP}" y2="{y(0):.1f}" stroke="{_MARK}" '
            f'stroke-width="1.5" stroke-dasharray="4 3"/>'
            + _text(place + shift, _TOP + 11, name, anchor=anchor, color=_MARK)
        )
    return _svg("Distribution of KL divergence", parts, "KL divergence of a token (nats)", "tokens")


def curve(points: Sequence[tuple[str, float]], *, title: str, x_label: str, y_label: str) -> str:
    """Return ``points`` in equal steps on a logarithmic axis; those that are 0 lie on its bottom."""
    positive = [value for _, value in points if value > 0] or [1.0]
    low, high = _decade_range(min(positive), max(positive))
    x = Scale(0, max(1, len(points) - 1), _LEFT + 14, _WIDTH - _RIGHT - 14)
    y = Scale(low, high, _HEIGHT - _BOTTOM, _TOP, log=True)
    parts = [_grid_y(y, _decades(low, high), _power)]
    places = [(x(i), y(value)) for i, (_, value) in enumerate(points)]
    parts.append(_line(places))
    for (name, value), (left, top) in zip(points, places, strict=True):
        parts.append(_dot(left, top, f"{name}: {value:.3g}"))
        parts.append(_text(left, _HEIGHT - _BOTTOM + 16, name, size=11))
    return _svg(title, parts, x_label, y_label)


def frontier(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return sizes against KL divergences; ``rows`` have name, bytes and kld."""
    sizes, klds = [row["bytes"] / 1e6 for row in rows], [row["kld"] for row in rows]
    low, high = _decade_range(min(filter(None, klds), default=1e-6), max(klds) or 1.0)
    margin = 0.08 * (max(sizes) - min(sizes)) or 1.0
    x = Scale(max(0.0, min(sizes) - margin), max(sizes) + margin, _LEFT, _WIDTH - _RIGHT)
    y = Scale(low, high, _HEIGHT - _BOTTOM, _TOP, log=True)
    ticks = [v for v in _round_ticks(x.high, 6) if v >= x.low]
    parts = [_grid_y(y, _decades(low, high), _power), _grid_x(x, ticks, lambda v: f"{v:,.4g}")]
    parts.append(_line([(x(size), y(kld)) for size, kld in zip(sizes, klds, strict=True)]))
    for row, size, kld in zip(rows, sizes, klds, strict=True):
        here = row["name"] == "this artifact"
        parts.append(_dot(x(size), y(kld), f"{row['name']}: {size:,.4g} MB, {kld:.3g}", mark=here))
        left = x(size) > _WIDTH * 0.7
        parts.append(
            _text(
                x(size) + (-8 if left else 8),
                y(kld) - 7,
                row["name"],
                anchor="end" if left else "start",
                size=12,
            )
        )
    return _svg("Size against KL divergence", parts, "size (MB)", "mean KL divergence (nats)")


def bars(
    values: Sequence[float | None], names: Sequence[str], *, title: str, x_label: str, y_label: str
) -> str:
    """Return a bar for each of ``values``; None, for which there is no number, gives none."""
    known = [value for value in values if value is not None] or [1.0]
    y = Scale(min(0.0, *known), max(0.0, *known) or 1.0, _HEIGHT - _BOTTOM, _TOP)
    width = (_WIDTH - _LEFT - _RIGHT) / len(values)
    parts = [_grid_y(y, _round_ticks(y.high), lambda v: f"{v:,.4g}")]
    every = max(1, math.ceil(len(values) / 12))
    for i, (value, name) in enumerate(zip(values, names, strict=True)):
        left = _LEFT + i * width
        if value is not None:
            top, bottom = sorted((y(value), y(0)))
            parts.append(
                f'<rect x="{left + width * 0.12:.1f}" y="{top:.1f}" width="{width * 0.76:.1f}" '
                f'height="{bottom - top:.1f}" fill="{_FILL}"><title>{escape(name)}: {value:.1f}</title></rect>'
            )
        if i % every == 0 or i == len(values) - 1:
            parts.append(_text(left + width / 2, _HEIGHT - _BOTTOM + 16, name, size=11))
    return _svg(title, parts, x_label, y_label)


def _svg(title: str, parts: Sequence[str], x_label: str, y_label: str) -> str:
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    labels = _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 10, x_label) + (
        f'<text transform="translate(14 {middle:.0f}) rotate(-90)" text-anchor="middle" font-size="13" '
        f'fill="{_INK}">{escape(y_label)}</text>'
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}{labels}</svg>'
    )


def _grid_y(y: Scale, ticks: Sequence[float], name: Callable[[float], str]) -> str:
    return "".join(
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="{_GRID}"/>'
        + _text(_LEFT - 6, y(tick) + 4, name(tick), anchor="end", size=12)
        for tick in ticks
    )


def _grid_x(x: Scale, ticks: Sequence[float], name: Callable[[float], str]) -> str:
    base = _HEIGHT - _BOTTOM
    return "".join(
        f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{base}" y2="{base + 5}" stroke="{_INK}"/>'
        + _text(x(tick), base + 18, name(tick), size=12)
        for tick in ticks
    )


def _line(places: Sequence[tuple[float, float]]) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline points="{points}" fill="none" stroke="{_FILL}" stroke-width="2"/>'


def _dot(x: float, y: float, title: str, *, mark: bool = False) -> str:
    color = _MARK if mark else _FILL
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{5 if mark else 4}" fill="{color}">'
        f"<title>{escape(title)}</title></circle>"
    )


def _text(x: float, y: float, text: str, *, anchor: str = "middle", size: int = 13, color: str = _INK) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{color}">'
        f"{escape(text)}</text>"
    )


def _decade_range(low: float, high: float) -> tuple[float, float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return 10.0**first, 10.0 ** max(last, first + 1)


def _decades(low: float, high: float) -> list[float]:
    first, last = round(math.log10(low)), round(math.log10(high))
    step = max(1, math.ceil((last - first) / 8))
    return [10.0**power for power in range(first, last + 1, step)]


def _power(value: float) -> str:
    power = round(math.log10(value))
    return f"{value:g}" if -3 <= power <= 3 else f"1e{power}"


def _round_ticks(high: float, count: int = 5) -> list[float]:
    """Return round numbers from 0 to ``high``, about ``count`` of them."""
    rough = high / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [i * step for i in range(int(high / step) + 1)]
