"""What a caller may ask of a generation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ortlm.errors import BadOption


@dataclass(frozen=True, slots=True)
class Settings:
    """How to continue a prompt. None means: not asked for.

    Decoding is greedy unless something of sampling is asked for: ``do_sample``, a ``temperature`` above 0,
    ``top_k`` or ``top_p``. Only then do the publisher's defaults (temperature, top_k, top_p) fill what was
    not asked for; the publisher's repetition penalty always does. Temperature 0 is greedy.

    ``max_new_tokens``: at most so many tokens; None is until the context is full.
    ``top_k``: sample among the k likeliest tokens; 0 is all. ``top_p``: among the likeliest that together
    reach probability p; 1 is all. ``repetition_penalty``: above 1 makes tokens that occurred less likely.
    ``seed``: makes sampling repeatable. ``stop``: texts that end the answer and do not appear in it.
    ``stop_token_ids``: tokens that do the same, beside the model's own. ``ignore_eos``: run on past the
    model's own stop tokens.

    Raises BadOption for a value out of range.
    """

    max_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "seed", "temperature", "top_p", "repetition_penalty"):
            object.__setattr__(self, name, _plain(getattr(self, name)))
        stop = (self.stop,) if isinstance(self.stop, str) else _listed("stop", self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", _listed("stop_token_ids", self.stop_token_ids))
        for token in self.stop_token_ids:
            _whole("stop_token_ids", _plain(token))
        if self.do_sample is not None and not isinstance(self.do_sample, bool):
            raise BadOption(f"do_sample must be True, False or None, found {self.do_sample!r}.")
        _whole("max_new_tokens", self.max_new_tokens)
        _whole("top_k", self.top_k, hint="0 keeps all tokens")
        _whole("seed", self.seed)
        _number("temperature", self.temperature, above=0.0, included=True, hint="0 is greedy")
        _number("top_p", self.top_p, above=0.0, most=1.0, hint="1 keeps all tokens")
        _number("repetition_penalty", self.repetition_penalty, above=0.0, hint="1 is none")
        for text in stop:
            if not isinstance(text, str) or not text:
                raise BadOption(f"stop must hold texts of at least one character, found {text!r}.")
        if self.do_sample and self.temperature == 0:
            raise BadOption(
                "do_sample asks for sampling, but temperature 0 is greedy. Leave out one of them."
            )

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random; greedy otherwise."""
        if self.do_sample is not None:
            return self.do_sample
        if self.temperature == 0:
            return False
        return any(value is not None for value in (self.temperature, self.top_k, self.top_p))

    def over(self, base: Settings) -> Settings:
        """Return ``base`` with everything that was asked for here."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return replace(base, **given)

    def with_defaults(self, published: Mapping[str, Any]) -> Settings:
        """Fill what was not asked for from the publisher's ``published`` values, as the class describes.

        Values that make no sense are passed over: packages exist with ``top_p: 0.0``.
        """
        found: dict[str, Any] = {"do_sample": self.samples}
        keys = ("temperature", "top_k", "top_p") if self.samples else ()
        for key in (*keys, "repetition_penalty"):
            value = published.get(key)
            if getattr(self, key) is None and _usable(key, value):
                found[key] = value
        return replace(self, **found)


def _plain(value: Any) -> Any:
    """Return a number of numpy as Python's, anything else as it is."""
    item = getattr(value, "item", None)
    return item() if callable(item) else value


def _listed(name: str, value: object) -> tuple[Any, ...]:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise BadOption(f"{name} must be a list, found {value!r}.")
    return tuple(value)


def _usable(key: str, value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return False
    if key == "top_k":
        return isinstance(value, int) and value >= 0
    return 0 < value <= 1 if key == "top_p" else value > 0


def _whole(name: str, value: object, *, hint: str = "") -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise BadOption(f"{name} must be a whole number, 0 or more, found {value!r}{_in(hint)}.")


def _number(
    name: str,
    value: object,
    *,
    above: float,
    included: bool = False,
    most: float = float("inf"),
    hint: str = "",
) -> None:
    if value is None:
        return
    # NaN fails every comparison, so it falls through to the error.
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low = value >= above if included else value > above
        if low and value <= most and value != float("inf"):
            return
    lower = f"{above:g} or more" if included else f"more than {above:g}"
    upper = f" and at most {most:g}" if most != float("inf") else ""
    raise BadOption(f"{name} must be a number {lower}{upper}, found {value!r}{_in(hint)}.")


def _in(hint: str) -> str:
    return f" ({hint})" if hint else ""
