"""How much a tokenizer may make of a text, read off its parts before any text goes through them.

Normalizers, pre-tokenizers, post-processors and decoders are programs that come with a file. A few of them in a
row turn one character into billions. Honest ones put a mark in front of a text, write a space as another character
or take ligatures apart, all of which is little.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from ortlm._utils.checked_json import shown
from ortlm.errors import Error

# A text may become so many times as long; honest tokenizers stay below 70, where a table of ligatures meets steps
# that only might put a mark between any two characters.
MOST_GROWTH = 256
# So many tokens may stand around a text.
MOST_AROUND = 1024
# A token may be so long; the longest honest ones are runs of a few hundred spaces.
MOST_TOKEN_CHARACTERS = 65_536

_PARTS = ("normalizer", "pre_tokenizer", "decoder")


def check_growth(tokenizer: Any, where: str, error: type[Error]) -> None:
    """Raise ``error`` if ``tokenizer`` may multiply what goes through it; ``where`` begins the message."""
    reading = 1.0
    for name in _PARTS:
        part = getattr(tokenizer, name)
        growth = _growth(_json(part)) if part is not None else 1.0
        if name != "decoder":
            reading *= growth
        if max(growth, reading) > MOST_GROWTH:
            raise error(
                f"{where}: its {name} makes up to {_readable(max(growth, reading))} characters of one; no text "
                f"needs more than {MOST_GROWTH}. It is damaged, or was made to exhaust memory."
            )
    if tokenizer.post_processor is not None:
        parts = _json(tokenizer.post_processor)
        unknown = next(_unknown_tokens(parts), None)
        if unknown is not None:
            # The library panics at the first text.
            raise error(
                f"{where}: its post_processor puts {shown(unknown)} around texts, which is not among its "
                "special_tokens. It is damaged; copy the file of the base model into the folder."
            )
        copies, around = _template(parts)
        if copies > MOST_GROWTH or around > MOST_AROUND:
            raise error(
                f"{where}: its post_processor repeats a text {_readable(copies)} times with {_readable(around)} "
                f"tokens around it; at most {MOST_GROWTH} and {MOST_AROUND} are allowed. It is damaged, or was "
                "made to exhaust memory."
            )


def _json(part: Any) -> dict[str, Any]:
    found = json.loads(part.__getstate__())
    return found if isinstance(found, dict) else {}


def _growth(part: Mapping[str, Any]) -> float:
    """Return how many characters ``part`` makes of one at most; forms of Unicode, which end there, count as 1."""
    found, byte_levels = 1.0, 0
    for step in _steps(part):
        # The first writes bytes as letters; another one after it writes the bytes of those letters.
        byte_levels += step.get("type") == "ByteLevel"
        found = min(found * max(_step_growth(step), 2.0 if byte_levels > 1 else 1.0), 1e300)
    return found


def _steps(part: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    inner = part.get("normalizers") or part.get("pretokenizers") or part.get("decoders")
    if isinstance(inner, list):
        for step in inner:
            yield from _steps(step)
    else:
        yield part


def _step_growth(part: Mapping[str, Any]) -> float:
    kind = part.get("type")
    if kind == "Replace":
        pattern = part.get("pattern") or {}
        content = len(part.get("content") or "")
        if "String" in pattern:
            return max(1.0, math.ceil(content / max(1, len(pattern["String"]))))
        return max(1.0, content + 1.0)
    if kind == "Prepend":
        return 1.0 + len(part.get("prepend") or "")
    if kind == "Precompiled":
        return max(1.0, _longest_replacement(part.get("precompiled_charsmap") or ""))
    if kind == "Metaspace":
        return 2.0
    if kind in ("WordPiece", "BPEDecoder", "CTC"):
        return 1.0 + max((len(v) for v in part.values() if isinstance(v, str)), default=0)
    return 1.0


def _longest_replacement(encoded: str) -> float:
    """Return the length of the longest text in a table of SentencePiece: a trie after its size, then texts."""
    table = base64.b64decode(encoded)
    texts = table[4 + int.from_bytes(table[:4], "little") :]
    return float(max(map(len, texts.split(b"\0")), default=0)) / 2


def _template(part: Mapping[str, Any]) -> tuple[float, float]:
    """Return how often a post-processor repeats a text, and how many tokens it puts around it."""
    if isinstance(part.get("processors"), list):
        copies, around = 1.0, 0.0
        for step in part["processors"]:
            more, tokens = _template(step)
            copies, around = min(copies * more, 1e300), min(around * more + tokens, 1e300)
        return copies, around
    if part.get("type") != "TemplateProcessing":
        return 1.0, 2.0 if part.get("type") in ("BertProcessing", "RobertaProcessing") else 0.0
    single = part.get("single") or []
    special = part.get("special_tokens") or {}
    names = [piece["SpecialToken"]["id"] for piece in single if "SpecialToken" in piece]
    return (
        float(sum("Sequence" in piece for piece in single)),
        float(sum(len(special[name]["ids"]) for name in names if name in special)),
    )


def _unknown_tokens(part: Mapping[str, Any]) -> Iterator[str]:
    """Yield the special tokens that the templates of a post-processor name and do not describe."""
    for step in part.get("processors") or (part,):
        if step.get("type") == "TemplateProcessing":
            named = [
                piece["SpecialToken"]["id"]
                for pieces in (step.get("single") or [], step.get("pair") or [])
                for piece in pieces
                if "SpecialToken" in piece
            ]
            yield from (name for name in named if name not in (step.get("special_tokens") or {}))


def _readable(number: float) -> str:
    return f"{number:,.0f}" if number < 1e9 else "over a billion"
