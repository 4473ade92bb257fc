"""What happens, line by line, for whoever switches it on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ortlm.errors import nearest
from ortlm.genai.errors import GenaiError, GenaiTypeError, official

_DEFAULTS = {
    "enabled": False,
    "ansi_tags": True,
    "warning": True,
    "generate_next_token": False,
    "append_next_tokens": False,
    "hit_eos": False,
    "hit_max_length": False,
    "model_input_values": False,
    "model_output_shapes": False,
    "model_output_values": False,
    "model_logits": False,
    "ort_lib": False,
    "value_stats": True,
}
_options = dict(_DEFAULTS)
_write: Callable[[str], object] | None = None


@official
def set_log_options(**options: bool | str) -> None:
    """Switch kinds of lines on or off; nothing is written before ``enabled=True``.

    ``filename`` sends lines to a file instead of to stderr, "" back to it. ``ort_lib`` has no effect.
    Raises GenaiError for unknown names; nothing has changed then.
    """
    named, filename = "filename" in options, options.pop("filename", None)
    if named and not isinstance(filename, str):
        raise GenaiError(f"filename must be text, found {filename!r}.")
    for name, value in options.items():
        if name not in _options:
            raise GenaiError(f"there is no log option {name!r}." + nearest(name, [*_options, "filename"]))
        if not isinstance(value, bool):
            raise GenaiError(f"log option {name} must be True or False, found {value!r}.")
    if isinstance(filename, str):
        set_log_callback(_to_file(filename) if filename else None)
    _options.update({name: bool(value) for name, value in options.items()})


def set_log_callback(callback: Callable[[str], object] | None) -> None:
    """Hand lines to ``callback`` instead of writing them to stderr or a file; None writes to stderr."""
    global _write
    if callback is not None and not callable(callback):
        raise GenaiTypeError(f"a callback is a function or None, found {type(callback).__name__}.")
    _write = callback


def logs(name: str) -> bool:
    """Return whether lines of this kind are wanted."""
    return _options["enabled"] and _options[name]


def log(name: str, text: str) -> None:
    """Write a line of the kind ``name`` if it is wanted."""
    if logs(name):
        label = f"\x1b[93m{name}\x1b[0m" if _options["ansi_tags"] else name
        (_write or sys.stderr.write)(f"  {label}   {text}\n")


def log_values(name: str, tensor: str, values: NDArray[Any], *, only_shape: bool = False) -> None:
    """Write shape, values and statistics of a tensor if lines of the kind ``name`` are wanted."""
    if not logs(name):
        return
    shape = " ".join(map(str, values.shape))
    if only_shape:
        log(name, f"{tensor} [ {shape} ] {values.dtype}")
        return
    listed = np.array2string(values.ravel(), threshold=10, max_line_width=10_000)
    log(name, f"{tensor} [ {shape} ] {values.dtype} {listed}")
    if values.dtype.kind == "f":
        stats = (
            f"Min: {values.min():g} Max: {values.max():g} Mean: {values.mean():g} StdDev: {values.std():g}"
        )
        log("value_stats", stats)


def _to_file(filename: str) -> Callable[[str], object]:
    def write(text: str) -> None:
        with Path(filename).open("a", encoding="utf-8") as file:
            file.write(text)

    try:
        Path(filename).open("a").close()
    except OSError as error:
        raise GenaiError(f"the log cannot be written to {filename}: {error}") from error
    return write
