"""The statistics of an evaluation, under the names of llama-perplexity's report on KL divergence.

Everything is computed in float64 from one number per scored token. Errors are standard errors of a mean of
independent tokens; those of differences and ratios take into account that both models read the same tokens.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

# 95 % of a normal distribution lie within so many standard errors.
_REACH = 1.959964
_NAMED = {100.0: "maximum", 50.0: "median", 0.0: "minimum"}
_KLD_PERCENTILES = (99.9, 99.0, 95.0, 90.0, 50.0, 10.0, 5.0, 1.0, 0.1)
_DELTA_P_PERCENTILES = (99.9, 99.0, 95.0, 90.0, 75.0, 50.0, 25.0, 10.0, 5.0, 1.0, 0.1)


@dataclass(frozen=True, slots=True)
class Figure:
    """An estimate and its standard error."""

    value: float
    error: float

    def to_dict(self) -> dict[str, float | None]:
        """Return value, standard error, and the limits of the 95 % confidence interval."""
        reach = _REACH * self.error
        named = {
            "value": self.value,
            "standard_error": self.error,
            "low": self.value - reach,
            "high": self.value + reach,
        }
        return {name: finite(number) for name, number in named.items()}


@dataclass(frozen=True, slots=True)
class Scores:
    """What two models say of N tokens, [N] each.

    ``nll`` and ``base_nll`` are -ln of the probability that the evaluated model and the reference give the token,
    ``kld`` is the KL divergence of the evaluated model's distribution from the reference's, in nats, ``same_top``
    whether both find the same token most likely.
    """

    nll: Doubles
    base_nll: Doubles
    kld: Doubles
    same_top: NDArray[np.bool_]

    def of(self, tokens: NDArray[np.bool_]) -> Scores:
        """Return those of the tokens that are true in ``tokens`` [N]."""
        return Scores(self.nll[tokens], self.base_nll[tokens], self.kld[tokens], self.same_top[tokens])

    @property
    def delta_p(self) -> Doubles:
        """How much more probable the evaluated model finds each token than the reference, -1 to 1."""
        change: Doubles = np.exp(-self.nll) - np.exp(-self.base_nll)
        return change


@dataclass(frozen=True, slots=True)
class Statistics:
    """All figures of an evaluation. KL divergences are in nats; Δp and the share of same tops in percent.

    Percentiles are pairs of a percentage and a value, from the highest to the lowest, with the maximum (100) and
    the minimum (0).
    """

    scored_tokens: int
    ppl: Figure
    base_ppl: Figure
    correlation: float
    ln_ppl_ratio: Figure
    ppl_ratio: Figure
    ppl_difference: Figure
    kld: Figure
    kld_percentiles: tuple[tuple[float, float], ...]
    delta_p: Figure
    delta_p_percentiles: tuple[tuple[float, float], ...]
    delta_p_rms: Figure
    same_top: Figure

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON has it; numbers that are infinite are null."""
        data: dict[str, Any] = {}
        for name in asdict(self):
            value = getattr(self, name)
            if isinstance(value, Figure):
                data[name] = value.to_dict()
            elif isinstance(value, tuple):
                data[name] = {percentile_key(percent): finite(number) for percent, number in value}
            else:
                data[name] = finite(value) if isinstance(value, float) else value
        return data


def statistics(scores: Scores) -> Statistics:
    """Return the statistics of ``scores``, of two tokens at least."""
    a, b = mean(scores.nll), mean(scores.base_nll)
    covariance = _covariance_of_means(scores.nll, scores.base_nll)
    ppl, base_ppl = _exp(a), _exp(b)
    spread = a.error * b.error
    ln_ratio = Figure(a.value - b.value, _root(a.error**2 + b.error**2 - 2 * covariance))
    difference = Figure(
        ppl.value - base_ppl.value,
        _root(ppl.error**2 + base_ppl.error**2 - 2 * ppl.value * base_ppl.value * covariance),
    )
    delta = 100 * scores.delta_p
    squared = mean(delta**2)
    rms = math.sqrt(squared.value)
    share = float(scores.same_top.mean())
    count = len(scores.nll)
    return Statistics(
        scored_tokens=count,
        ppl=ppl,
        base_ppl=base_ppl,
        correlation=min(1.0, covariance / spread) if spread else math.nan,
        ln_ppl_ratio=ln_ratio,
        ppl_ratio=_exp(ln_ratio),
        ppl_difference=difference,
        kld=mean(scores.kld),
        kld_percentiles=_percentiles(scores.kld, _KLD_PERCENTILES),
        delta_p=mean(delta),
        delta_p_percentiles=_percentiles(delta, _DELTA_P_PERCENTILES),
        delta_p_rms=Figure(rms, 0.5 / rms * squared.error if rms else 0.0),
        same_top=Figure(100 * share, 100 * math.sqrt(share * (1 - share) / (count - 1))),
    )


def sections(figures: Statistics) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Return the report as titles with rows of name, value and standard error, as texts."""
    perplexity = [
        ("Mean PPL(Q)", *_texts(figures.ppl)),
        ("Mean PPL(base)", *_texts(figures.base_ppl)),
        ("Cor(ln(PPL(Q)), ln(PPL(base)))", f"{figures.correlation:.2%}", ""),
        ("Mean ln(PPL(Q)/PPL(base))", *_texts(figures.ln_ppl_ratio)),
        ("Mean PPL(Q)/PPL(base)", *_texts(figures.ppl_ratio)),
        ("Mean PPL(Q)-PPL(base)", *_texts(figures.ppl_difference)),
    ]
    kld = [("Mean KLD", *_texts(figures.kld))]
    kld += [
        (f"{percentile_name(percentile_key(at))} KLD", f"{value:.6f}", "")
        for at, value in figures.kld_percentiles
    ]
    delta = [("Mean Δp", *_texts(figures.delta_p, digits=3, unit=" %"))]
    delta += [
        (f"{percentile_name(percentile_key(at))} Δp", f"{value:.3f} %", "")
        for at, value in figures.delta_p_percentiles
    ]
    delta += [
        ("RMS Δp", *_texts(figures.delta_p_rms, digits=3, unit=" %")),
        ("Same top p", *_texts(figures.same_top, digits=3, unit=" %")),
    ]
    return [
        ("Perplexity statistics", perplexity),
        ("KL divergence statistics", kld),
        ("Token probability statistics", delta),
    ]


def mean(values: Doubles) -> Figure:
    """Return the mean of ``values`` [N] and its standard error; that of a single value is 0."""
    count = len(values)
    error = float(values.std()) / math.sqrt(count - 1) if count > 1 else 0.0
    return Figure(float(values.mean()), error)


def finite(number: float) -> float | None:
    """Return ``number``, or None if JSON cannot say it."""
    return float(number) if math.isfinite(number) else None


def percentile_key(percent: float) -> str:
    """Return what a percentile is called in JSON."""
    return _NAMED.get(percent, f"p{percent:g}")


def percentile_name(key: str) -> str:
    """Return what the percentile with this ``key`` of JSON is called in tables."""
    return key.capitalize() if key in _NAMED.values() else f"{float(key.removeprefix('p')):.1f}%"


def _percentiles(values: Doubles, wanted: tuple[float, ...]) -> tuple[tuple[float, float], ...]:
    all_wanted = (100.0, *wanted, 0.0)
    levels = np.percentile(values, all_wanted)
    return tuple((at, float(value)) for at, value in zip(all_wanted, levels, strict=True))


def _covariance_of_means(a: Doubles, b: Doubles) -> float:
    return float(((a - a.mean()) * (b - b.mean())).mean()) / (len(a) - 1)


def _exp(logarithm: Figure) -> Figure:
    """Return e to the power of an estimate; errors are small, so that they grow by the derivative."""
    value = math.exp(logarithm.value) if logarithm.value < 700 else math.inf
    return Figure(value, value * logarithm.error)


def _root(variance: float) -> float:
    # Of equal models the terms cancel, all but the last digits.
    return math.sqrt(max(0.0, variance))


def _texts(figure: Figure, *, digits: int = 6, unit: str = "") -> tuple[str, str]:
    return f"{figure.value:.{digits}f}{unit}", f"{figure.error:.{digits}f}{unit}"
