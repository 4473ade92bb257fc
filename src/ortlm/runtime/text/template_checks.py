"""What calls of filters and methods cost, which is asked before they run."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from ortlm.runtime.text.template_budget import Budget, TemplateLimit

# Lines of `batch` and `slice`, places after the point of `round`.
_PARTS, _PLACES = 100_000, 1000
# Codecs that take linear time; of the others some are quadratic.
_CODECS = {"utf8", "ascii", "latin1", "utf16", "utf32", "utf16le", "utf16be", "utf32le", "utf32be"}
_PLAIN_CODEC_LENGTH = 1000
_PERCENT = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(\*|\d*)(?:\.(\*|\d*))?[hlL]?(.)", re.DOTALL)

Check = Callable[..., Any]


def size_of(value: Any) -> int:
    """Return about how many bytes ``value``, a text or bytes, adds to a longer one."""
    return max(len(value), sys.getsizeof(value) - 80) if isinstance(value, (str, bytes)) else 32


def _width(budget: Budget, value: Any, width: Any = 80, *_: Any) -> None:
    if isinstance(width, int):
        budget.room(4 * width)


def _indent(budget: Budget, value: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    if isinstance(value, str):
        size = len(width) if isinstance(width, str) else width if isinstance(width, int) else 0
        budget.room(sys.getsizeof(value) + 4 * size * (value.count("\n") + 1))


def _replace(budget: Budget, value: Any, old: Any, new: Any, *_: Any, **__: Any) -> None:
    if isinstance(value, (str, bytes)) and isinstance(old, type(value)) and isinstance(new, type(value)):
        times = value.count(old) if old else len(value) + 1  # type: ignore[arg-type]
        budget.room(sys.getsizeof(value) + times * size_of(new))


def _join(budget: Budget, value: Any, d: Any = "", *_: Any, **__: Any) -> None:
    count = len(value) if hasattr(value, "__len__") else 0
    budget.room(budget.weigh(value) + count * size_of(d))


def _sum(budget: Budget, value: Any, attribute: Any = None, start: Any = 0) -> None:
    if isinstance(start, (list, tuple)) and hasattr(value, "__len__"):
        budget.step(len(value) * budget.weigh(value) // 8192)


def _parts(budget: Budget, value: Any, count: Any, *_: Any, **__: Any) -> None:
    if isinstance(count, int):
        if count > _PARTS:
            raise TemplateLimit(f"it makes {count:,} parts of a list, more than {_PARTS:,}")
        budget.step(max(count, 0))


def _round(budget: Budget, value: Any, precision: Any = 0, *_: Any, **__: Any) -> None:
    if isinstance(precision, int) and abs(precision) > _PLACES:
        raise TemplateLimit(f"it rounds to {precision:,} places, more than {_PLACES}")


def _slow(budget: Budget, value: Any, *_: Any, **__: Any) -> None:
    budget.step(len(value) if hasattr(value, "__len__") else 1)


def _wordwrap(
    budget: Budget, value: Any, width: Any = 79, _: Any = True, wrapstring: Any = None, *__: Any, **___: Any
) -> None:
    if isinstance(value, str):
        words, columns = value.split(), max(width if isinstance(width, int) else 1, 1)
        # What is left of a long word is copied for each of its lines.
        budget.step(len(value) + max(map(len, words), default=0) ** 2 // (1000 * columns))
        lines = len(value) // columns + len(words)
        budget.room(sys.getsizeof(value) + lines * size_of(wrapstring or "\n"))


def _urlize(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> None:
    _quadratic(budget, value)
    if isinstance(value, str):
        added = sum(budget.weigh(v) for v in (*args, *kwargs.values()))
        budget.room(len(value) * (32 + added))


def _quadratic(budget: Budget, value: Any, *_: Any, **__: Any) -> None:
    if isinstance(value, str):
        budget.step(len(value) ** 2 // 1000)


def _pprint(budget: Budget, value: Any, *_: Any, **__: Any) -> None:
    budget.step(budget.weigh(value) * (budget.depth(value) + 1) // 8)


def _format(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> None:
    if isinstance(value, str):
        check_percent(budget, value, kwargs or args)


def _json(
    budget: Budget,
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> None:
    deep = len(indent) if isinstance(indent, str) else indent if isinstance(indent, int) else 0
    apart = sum(len(text) for text in separators if isinstance(text, str)) if separators else 0
    budget.room(budget.weigh(value) * (1 + (max(deep, 0) * budget.depth(value) + apart) / 16))


def check_percent(budget: Budget, form: str | bytes, values: Any) -> None:
    """Refuse ``form % values`` if it would be too large."""
    text = form.decode("latin-1") if isinstance(form, bytes) else form
    weights = [budget.weigh(v) for v in values] if isinstance(values, tuple) else [budget.weigh(values)]
    size, number, starred = sys.getsizeof(form), 0, False
    for width, places, _ in _PERCENT.findall(text):
        number += 1
        starred = starred or "*" in (width, places)
        for digits in (width, places):
            if digits.isdecimal():
                size += int(digits) if len(digits) < 10 else sys.maxsize
    if starred and isinstance(values, tuple):
        size += sum(abs(v) for v in values if isinstance(v, int))
    budget.step(number)
    repeated = isinstance(values, Mapping)
    budget.room(size + (number * max(weights) if repeated and weights else sum(weights)))


FILTERS: dict[str, Check] = {
    "batch": _parts,
    "center": _width,
    "format": _format,
    "indent": _indent,
    "join": _join,
    "pprint": _pprint,
    "replace": _replace,
    "round": _round,
    "slice": _parts,
    "striptags": _quadratic,
    "sum": _sum,
    "title": _slow,
    "tojson": _json,
    "urlize": _urlize,
    "wordwrap": _wordwrap,
}
# Their cost follows from what an iterator still has to give.
LISTED = {"join", "sum", "tojson", "pprint"}


def _expandtabs(budget: Budget, value: Any, tabsize: Any = 8) -> None:
    if isinstance(tabsize, int):
        budget.room(
            sys.getsizeof(value) + 4 * value.count("\t" if isinstance(value, str) else b"\t") * tabsize
        )


def _translate(budget: Budget, value: Any, table: Any, *_: Any) -> None:
    largest = max((size_of(v) for v in table.values()), default=1) if isinstance(table, dict) else 4
    budget.room(len(value) * largest)


def _split(budget: Budget, value: Any, sep: Any = None, maxsplit: Any = -1) -> None:
    if isinstance(sep, (str, bytes)) and isinstance(sep, type(value)) and sep:
        pieces = value.count(sep)
    else:
        pieces = len(value) // 2
        if len(value) > 1 << 16:
            spaces = (" ", "\n", "\t", "\r") if isinstance(value, str) else (b" ", b"\n", b"\t", b"\r")
            pieces = sum(value.count(space) for space in spaces)
    if isinstance(maxsplit, int) and maxsplit >= 0:
        pieces = min(pieces, maxsplit)
    budget.room(sys.getsizeof(value) + 64 * pieces)


def _codec(budget: Budget, value: Any, encoding: Any = "utf-8", *_: Any) -> None:
    plain = isinstance(encoding, str) and re.sub(r"[^a-z0-9]", "", encoding.lower()) in _CODECS
    if not plain and len(value) > _PLAIN_CODEC_LENGTH:
        raise TemplateLimit(f"it uses the codec {encoding!r:.40} on {len(value):,} characters")


def _joined(budget: Budget, value: Any, items: Any) -> None:
    _join(budget, items, value)


def _to_bytes(budget: Budget, value: Any, length: Any = 1, *_: Any, **__: Any) -> None:
    if isinstance(length, int):
        budget.room(length)


METHODS: dict[str, Check] = {
    "center": _width,
    "decode": _codec,
    "encode": _codec,
    "expandtabs": _expandtabs,
    "join": _joined,
    "ljust": _width,
    "replace": _replace,
    "rjust": _width,
    "rsplit": _split,
    "split": _split,
    "splitlines": _split,
    "striptags": _quadratic,
    "to_bytes": _to_bytes,
    "translate": _translate,
    "zfill": _width,
}


def ask(check: Check, budget: Budget, *args: Any, **kwargs: Any) -> None:
    """Run ``check``; where the arguments do not fit, the function itself says so better."""
    try:
        check(budget, *args, **kwargs)
    except TypeError:
        return
