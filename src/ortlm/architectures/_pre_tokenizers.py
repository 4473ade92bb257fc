"""How texts are split before byte-level BPE, by the names that GGUF files have for it.

A name stands for the pre-tokenizer of the tokenizer.json that a file was made from, and that is what is built
here. Most of llama.cpp's own expressions say the same; where they only come close (letters by case), the model's
own counts. Source: llama.cpp, conversion/base.py (which tokenizer has which name) and src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_TRIPLES = rf"{_ENDINGS}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|{_SPACES}"
_SINGLES = rf"{_ENDINGS}|{_WORD}|\p{{N}}|{_MARKS}|{_SPACES}"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_BY_CASE = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+%s|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*%s|%s|"
    rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_CODER = rf"{_ENDINGS}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_O200K = _BY_CASE % (f"{_ENDINGS}?", f"{_ENDINGS}?", r"\p{N}{1,3}")
_TEKKEN = _BY_CASE % ("", "", r"\p{N}")


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How a text is split: by the expression ``splits``, or by GPT-2's own if it is None.

    ``digits``: each digit stands alone before. ``composes``: texts become NFC. ``ignores_merges``: what is a
    token as a whole is not merged. ``begins``: a text begins with a token of its own unless the file says
    otherwise.
    """

    splits: str | None = None
    digits: bool = False
    composes: bool = False
    ignores_merges: bool = False
    begins: bool = False

    def parts(self) -> dict[str, Any]:
        """Return normalizer and pre-tokenizer of a tokenizer.json."""
        steps: list[dict[str, Any]] = []
        if self.digits:
            steps.append({"type": "Digits", "individual_digits": True})
        if self.splits is not None:
            steps.append(
                {"type": "Split", "pattern": {"Regex": self.splits}, "behavior": "Isolated", "invert": False}
            )
        steps.append(
            {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": self.splits is None,
            }
        )
        return {
            "normalizer": {"type": "NFC"} if self.composes else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        }


_GPT2 = PreTokenizer()
_DIGITS = PreTokenizer(digits=True)
_LLAMA3 = PreTokenizer(_TRIPLES, ignores_merges=True, begins=True)
_CL100K = PreTokenizer(_TRIPLES)
_QWEN2 = PreTokenizer(_SINGLES, composes=True)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "olmo": _GPT2,
    "mpt": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "codeshell": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "lfm2": _LLAMA3,
    "dbrx": _CL100K,
    "smaug-bpe": _CL100K,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "gpt-4o": PreTokenizer(_O200K),
    "glm4": _CL100K,
    "chatglm-bpe": _CL100K,
    "exaone4": _GPT2,
    "seed-coder": PreTokenizer(_CODER),
    "tekken": PreTokenizer(_TEKKEN, ignores_merges=True, begins=True),
}
