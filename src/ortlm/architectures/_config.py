"""Typed reading of ``config.json``, so that a wrong value is reported by its key and not by a crash later."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, Final, TypeVar

from ortlm.architectures._keys import FULL, SLIDING, Keys, WithDefaults, quoted, shown
from ortlm.errors import BadCheckpoint, UnsupportedModel

T = TypeVar("T")


class _Missing(Enum):
    KEY = "missing"


_REQUIRED: Final = _Missing.KEY

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu2": "relu2",
}

# Beyond these no size of a model makes sense, and sums of them still fit 64 bits.
MOST = 2**31 - 1
# What float32 holds with room for products.
_SMALLEST, _LARGEST = 1e-30, 1e30


class Config:
    """The values of ``config.json``, or of the object ``at`` inside it.

    Each reader returns the value of one key. A key that is absent or null gives ``default``; without one
    the key must be there. Raises ``BadCheckpoint`` with the key, what was found and what is expected.
    """

    def __init__(self, values: Mapping[str, Any], *, at: str = "config.json") -> None:
        self.values = values
        self.at = at

    def integer(
        self, key: str, default: int | _Missing = _REQUIRED, *, least: int = 1, most: int = MOST
    ) -> int:
        """Return a whole number from ``least`` to ``most``."""
        wanted = f"a whole number >= {least}" + (f", at most {most:,}" if most < MOST else "")
        return self._read(key, default, lambda v: _whole(v) and least <= v <= most, wanted)

    def number(self, key: str, default: float | _Missing = _REQUIRED, *, least: float = -_LARGEST) -> float:
        """Return a finite number of at least ``least``."""
        wanted = "a number" if least == -_LARGEST else f"a number >= {least:g}"
        return float(self._read(key, default, lambda v: _finite(v) and v >= least, wanted))

    def positive(self, key: str, default: float | _Missing = _REQUIRED, *, most: float = _LARGEST) -> float:
        """Return a number above zero, of at most ``most``, that float32 can hold."""
        wanted = "a number > 0" if most == _LARGEST else f"a number > 0, at most {most:g}"
        return float(self._read(key, default, lambda v: _finite(v) and _SMALLEST <= v <= most, wanted))

    def positive_or_none(self, key: str, default: float | None = None) -> float | None:
        """Return a number above zero, None where the key is null, or ``default`` where it is absent."""
        if key in self.values and self.values[key] is None:
            return None
        return default if key not in self.values and default is None else self.positive(key, default or 0.0)

    def flag(self, key: str, default: bool | _Missing = _REQUIRED) -> bool:
        """Return true or false."""
        return self._read(key, default, lambda v: isinstance(v, bool), "true or false")

    def text(self, key: str, default: str | _Missing = _REQUIRED) -> str:
        """Return a string."""
        return self._read(key, default, lambda v: isinstance(v, str), "a string")

    def positives(self, key: str, *, length: int) -> list[float]:
        """Return a list of ``length`` finite numbers above zero."""
        found: list[float] = self._read(
            key,
            _REQUIRED,
            lambda v: isinstance(v, list) and len(v) == length and all(_finite(x) and x > 0 for x in v),
            f"a list of {length} numbers > 0",
        )
        return [float(x) for x in found]

    def integers(self, key: str, *, length: int) -> list[int] | None:
        """Return a list of ``length`` or more whole numbers cut to ``length``, or None if there is none."""
        if self.values.get(key) is None:
            return None
        found: list[int] = self._read(
            key,
            _REQUIRED,
            lambda v: isinstance(v, list) and len(v) >= length and all(_whole(x) for x in v),
            f"a list of {length} whole numbers, one for each layer",
        )
        return found[:length]

    def indices(self, key: str) -> list[int]:
        """Return a list of whole numbers, which may be empty or absent."""
        return self._read(
            key,
            [],
            lambda v: isinstance(v, list) and all(_whole(x) and x >= 0 for x in v),
            "a list of numbers of layers",
        )

    def part(self, key: str) -> Config | None:
        """Return the object under ``key``, or None if it is absent, null or empty."""
        if self.values.get(key) is None:
            return None
        found: dict[str, Any] = self._read(key, _REQUIRED, lambda v: isinstance(v, Mapping), "an object")
        return Config(found, at=f'{self.at}: "{key}"') if found else None

    def activation(self, key: str, default: str | _Missing = _REQUIRED) -> str:
        """Return the activation named by ``key`` as ``spec`` calls it."""
        name = self.text(key, default)
        if name not in _ACTIVATIONS:
            raise UnsupportedModel(
                f'{self.at}: "{key}" is {quoted(name)}, an activation that is not supported. '
                f"Known: {', '.join(_ACTIVATIONS)}."
            )
        return _ACTIVATIONS[name]

    def layer_types(self, layers: int, *, windowed: bool) -> list[str] | None:
        """Return ``FULL`` or ``SLIDING`` for each layer as ``layer_types`` says, or None if it is absent.

        ``windowed``: the other keys give a window, without which no layer can be sliding.
        """
        found = self.layer_kinds(layers, (FULL, SLIDING))
        if found is not None and SLIDING in found and not windowed:
            raise BadCheckpoint(
                f'{self.at}: "layer_types" has "{SLIDING}", but "sliding_window" is null or switched off, so that '
                'nobody knows the window. Set "sliding_window", or make all layers '
                f'"{FULL}".'
            )
        return found

    def layer_kinds(self, layers: int, known: Sequence[str]) -> list[str] | None:
        """Return which of ``known`` each layer is as ``layer_types`` says, or None if it is absent."""
        if self.values.get("layer_types") is None:
            return None
        found: list[str] = self._read(
            "layer_types",
            _REQUIRED,
            lambda v: isinstance(v, list) and len(v) == layers,
            f'a list with one entry for each of the {layers} layers of "num_hidden_layers"',
        )
        for i, kind in enumerate(found):
            if kind not in known:
                raise UnsupportedModel(
                    f'{self.at}: "layer_types" has {shown(kind)} for layer {i}, which is not supported here. '
                    f"Known: {', '.join(map(quoted, known))}."
                )
        return found

    def has(self, key: str, default: object = None) -> bool:
        """Whether ``key`` has a value that is not null; absent it has ``default``."""
        return self.values.get(key, default) is not None

    def window(self, max_tokens: int, *, default: int | None = None) -> int | None:
        """Return ``sliding_window`` in tokens, or None if it is null or not below ``max_tokens``."""
        if self.values.get("sliding_window", default) is None:
            return None
        window = self.integer("sliding_window", default or 0)
        return window if window < max_tokens else None

    def ignore(self, *keys: str) -> None:
        """Say that ``keys`` are known here and change nothing, whatever they hold."""
        if isinstance(self.values, (Keys, WithDefaults)):
            for key in keys:
                self.values.ignore(key)

    def refuse(self, key: str, reason: str) -> None:
        """Raise ``UnsupportedModel`` if ``key`` is switched on."""
        if self.values.get(key):
            raise self.unsupported(key, reason)

    def expect(self, key: str, *fine: object) -> None:
        """Pass over ``key`` where it states what the family does anyway: absent, null, or one of ``fine``.

        Raises ``UnsupportedModel`` for another value.
        """
        value = self.values.get(key)
        if value is not None and not any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in fine
        ):
            raise self.unsupported(key, f"only {' or '.join(map(_json, fine))} can be built")

    def unsupported(self, key: str, reason: str) -> UnsupportedModel:
        """Return the error that a model with this value of ``key`` is not built, for ``reason``."""
        found = shown(self.values[key]) if key in self.values else "missing"
        return UnsupportedModel(f'{self.at}: "{key}" is {found}: {reason}.')

    def wrong(self, key: str, expected: str) -> BadCheckpoint:
        """Return the error that the value of ``key`` is not what is ``expected``."""
        found = shown(self.values[key]) if key in self.values else "missing"
        return BadCheckpoint(
            f'{self.at}: "{key}" is {found}, expected {expected}. '
            "Compare the file with the original of the model."
        )

    def _read(self, key: str, default: T | _Missing, good: Callable[[Any], bool], expected: str) -> T:
        value = self.values.get(key)
        if value is None:
            if isinstance(default, _Missing):
                raise self.wrong(key, expected)
            return default
        if not good(value):
            raise self.wrong(key, expected)
        found: T = value
        return found


def _json(value: object) -> str:
    return quoted(value) if isinstance(value, str) else str(value).lower()


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    # Compared before anything is converted: a whole number of JSON may be beyond any float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST
