"""Which tokenizer class transformers takes for a checkpoint, and what the class makes of tokenizer.json.

Most classes take the file as it is. Some build the tokenizer again from the file's vocabulary and merges, with a
normalizer, a pre-tokenizer and a decoder of their own, and the ids that follow are the reference.
Source: transformers 5.24, ``AutoTokenizer`` and the classes' files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# By model_type; a name that is missing here leaves the choice to tokenizer_config.json.
_REGISTERED = {
    "gemma": "GemmaTokenizer",
    "gemma2": "GemmaTokenizer",
    "gemma3": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
    "granite": "TokenizersBackend",
    "mistral": "MistralCommonBackend",
    "olmo2": "TokenizersBackend",
    "phi": "GPT2Tokenizer",
    "phi3": "TokenizersBackend",
    "phi3_v": "TokenizersBackend",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
}
# Their published tokenizer_config.json files name a wrong class.
_OVERRULED = {"phi3", "phi3_v", "qwen2"}
# A tokenizer.json that was made here, for a checkpoint that had none: it is as it should be, for every family.
FINISHED = "ortlm"
_AS_IT_IS = ("TokenizersBackend", "PreTrainedTokenizerFast", "PythonBackend", "MistralCommonBackend")

_BYTES_PRE_TOKENIZER = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
_BYTES_DECODER = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
_PIECES_DECODER = (
    {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
)
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What takes the place of parts of tokenizer.json.

    ``parts`` are its normalizer, pre-tokenizer and decoder, ``model`` are settings of its model. ``names`` are
    special tokens where tokenizer_config.json has none; with ``restates`` all special tokens match exactly.
    """

    parts: Mapping[str, Any]
    model: Mapping[str, Any]
    names: Mapping[str, str] = field(default_factory=dict)
    restates: bool = False


def rebuilt_tokenizer(
    model_type: str, settings: Mapping[str, Any], config_class: str | None, *, byte_level: bool
) -> Rebuilt | None:
    """Return what transformers builds again, None if it takes tokenizer.json as it is.

    ``settings`` is tokenizer_config.json, ``config_class`` is config.json's tokenizer_class; ``byte_level`` says
    whether tokenizer.json names a part of that kind. None also where a class is for the other kind of vocabulary:
    it would lose spaces or all of a text.
    """
    declared = settings.get("tokenizer_class") or config_class
    if declared == FINISHED:
        return None
    name = _chosen(model_type, declared if isinstance(declared, str) else None, byte_level)
    for_bytes, make = _CLASSES.get(name or "", (byte_level, None))
    return make(settings) if make and for_bytes == byte_level else None


def _chosen(model_type: str, declared: str | None, byte_level: bool) -> str | None:
    declared = (
        declared.removesuffix("Fast") if declared and declared != "PreTrainedTokenizerFast" else declared
    )
    registered = _REGISTERED.get(model_type)
    overruled = model_type in _OVERRULED
    if declared == "LlamaTokenizer" and byte_level and not overruled and registered != "MistralCommonBackend":
        return None
    if declared and registered and declared != registered:
        if registered in _AS_IT_IS:
            return None
        return registered if overruled else declared
    return declared or registered


def _pieces(settings: Mapping[str, Any]) -> Rebuilt:
    prefix = settings.get("add_prefix_space")
    prefix = True if prefix is None else bool(prefix)
    legacy = bool(settings.get("legacy", False))
    scheme = ("always" if legacy else "first") if prefix else "never"
    strip = ({"type": "Strip", "content": " ", "start": 1, "stop": 0},) if prefix else ()
    return Rebuilt(
        parts={
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Metaspace",
                "replacement": "\u2581",
                "prepend_scheme": scheme,
                "split": False,
            },
            "decoder": {"type": "Sequence", "decoders": [*_PIECES_DECODER, *strip]},
        },
        model=bpe_settings(fuse_unk=True, byte_fallback=True),
        names={"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    )


def _plain_pieces(settings: Mapping[str, Any]) -> Rebuilt:
    names = {
        "unk_token": "<unk>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    }
    unknown = settings.get("unk_token", names["unk_token"])
    if isinstance(unknown, Mapping):
        unknown = unknown.get("content")
    return Rebuilt(
        parts={
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"String": " "},
                "behavior": "MergedWithPrevious",
                "invert": False,
            },
            "decoder": {"type": "Sequence", "decoders": list(_PIECES_DECODER)},
        },
        model=bpe_settings(unk_token=unknown, fuse_unk=True, byte_fallback=True),
        names=names,
    )


def _words(settings: Mapping[str, Any]) -> Rebuilt:
    end = "<|endoftext|>"
    return Rebuilt(
        parts={
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": _WORDS}, "behavior": "Isolated", "invert": False},
                    {**_BYTES_PRE_TOKENIZER, "add_prefix_space": _prefix(settings), "use_regex": False},
                ],
            },
            "decoder": _BYTES_DECODER,
        },
        model=bpe_settings(continuing_subword_prefix="", end_of_word_suffix=""),
        names={"unk_token": end, "eos_token": end, "pad_token": end},
        restates=True,
    )


def _bytes(settings: Mapping[str, Any]) -> Rebuilt:
    end = "<|endoftext|>"
    return Rebuilt(
        parts={
            "normalizer": None,
            "pre_tokenizer": {**_BYTES_PRE_TOKENIZER, "add_prefix_space": _prefix(settings)},
            "decoder": _BYTES_DECODER,
        },
        model=bpe_settings(continuing_subword_prefix="", end_of_word_suffix=""),
        names={"unk_token": end, "bos_token": end, "eos_token": end},
    )


def _prefix(settings: Mapping[str, Any]) -> bool:
    return bool(settings.get("add_prefix_space") or False)


def bpe_settings(**settings: Any) -> dict[str, Any]:
    """Return what a BPE model of ``tokenizer.json`` says next to its vocabulary, usual but for ``settings``."""
    usual = {
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return usual | settings


# Whether a class is for vocabularies of bytes written as letters, and what it makes.
_CLASSES: dict[str, tuple[bool, Callable[[Mapping[str, Any]], Rebuilt]]] = {
    "LlamaTokenizer": (False, _pieces),
    "GemmaTokenizer": (False, _plain_pieces),
    "Qwen2Tokenizer": (True, _words),
    "GPT2Tokenizer": (True, _bytes),
    "CodeGenTokenizer": (True, _bytes),
}
