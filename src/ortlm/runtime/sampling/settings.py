"""What a caller may ask of a generation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict

import numpy as np

from ortlm._utils.checked_json import is_number, shown
from ortlm._utils.limits import MOST_ROWS
from ortlm.errors import BadOption, nearest
from ortlm.runtime.engine.types import Processor

if TYPE_CHECKING:
    from ortlm.runtime.structured_output.guidance import Guidance


class DraftSource(Protocol):
    """A loaded model whose continuations are proposed as drafts, such as ``ortlm.load`` returns."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids that its logits are over."""


class Options(TypedDict, total=False):
    """The fields of Settings as keyword arguments."""

    max_new_tokens: int | None
    max_length: int | None
    min_new_tokens: int | None
    min_length: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    presence_penalty: float
    frequency_penalty: float
    no_repeat_ngram_size: int | None
    logit_bias: Mapping[int, float]
    sequence_bias: Mapping[Sequence[int], float] | None
    bad_words: Sequence[str | Sequence[int]] | None
    suppress_tokens: Sequence[int] | None
    begin_suppress_tokens: Sequence[int] | None
    guidance: Guidance | Sequence[Guidance | None] | None
    processors: Processor | Sequence[Processor]
    num_return_sequences: int
    seed: int | Sequence[int] | None
    num_beams: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    num_beam_groups: int
    diversity_penalty: float
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int | None
    prompt_logprobs: int | None
    draft: DraftSource | Literal["lookup"] | None
    draft_tokens: int
    adapter: str | None


@dataclass(frozen=True, slots=True)
class Settings:
    """How to continue a prompt. None means: not asked for.

    Decoding is greedy unless something of sampling is asked for: ``do_sample``, a ``temperature`` above 0,
    ``top_k``, ``top_p``, ``min_p`` or ``typical_p``. Only then do the publisher's defaults fill what was not
    asked for; the publisher's repetition penalty, shortest lengths, and tokens that must not be written or are
    less likely always do. Temperature 0 is greedy.

    Length, in tokens:
        ``max_new_tokens``: at most this many; None is until the context is full. ``max_length``: the same with
        the prompt. ``min_new_tokens`` and ``min_length`` (with the prompt) forbid the end before that.
    Sampling, in the order of their work:
        ``repetition_penalty``: above 1 makes tokens that occurred, in prompt or answer, less likely.
        ``presence_penalty`` is subtracted once from the logits of tokens in the answer, ``frequency_penalty``
        once for each time that they occurred. ``no_repeat_ngram_size`` n lets no n tokens occur twice.
        ``logit_bias``: token id to what is added to its logit. ``bad_words``: texts, or lists of token ids,
        that must not be written. ``suppress_tokens`` are never written, ``begin_suppress_tokens`` not as the first
        of an answer. ``sequence_bias``: token ids to what is added to the last one's logit where the others stand
        before it. ``processors``: functions of your own, ``(history, logits) -> logits``, run
        after these and before the following: history is int64 [B, T], prompts included, rows padded on the
        right with -1; logits are float32 [B, V].
        ``top_k``: among the k most likely tokens; 0 is all. ``top_p``: among the most likely that together reach
        probability p; 1 is all. ``min_p``: not below p times the probability of the most likely; 0 is all.
        ``typical_p``: among the tokens whose information is nearest to the expected one; 1 is all.
    Search:
        ``num_return_sequences`` answers to each prompt. ``seed`` makes sampling repeatable: answer i is drawn
        with seed + i, or with the i-th of several seeds. ``num_beams`` above 1 is beam search, with
        ``length_penalty`` (the exponent of the generated length that divides a score), ``early_stopping``
        (True, False or "never", as in transformers), and diverse beams by ``num_beam_groups`` and
        ``diversity_penalty``.
    End:
        ``stop``: texts that end the answer and do not appear in it. ``stop_token_ids``: tokens that do the
        same, besides the model's own. ``ignore_eos``: run on past the model's own stop tokens.
    Form and content:
        ``guidance``: what the answer has to look like, see Guidance. ``adapter``: the name of a LoRA adapter
        that is loaded.
    Report and speed:
        ``logprobs`` n: log-probabilities of each new token and of the n most likely; ``prompt_logprobs`` the
        same for the prompt. ``draft``: "lookup" proposes what followed the same words before, a loaded model
        proposes its own continuation; the results stay those of the model alone. ``draft_tokens``: at most
        this many at once.

    Raises BadOption for a value out of range, and for values that contradict each other.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    sequence_bias: Mapping[Sequence[int], float] | None = None
    bad_words: Sequence[str | Sequence[int]] | None = None
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    guidance: Guidance | Sequence[Guidance | None] | None = None
    processors: Sequence[Processor] = ()
    num_return_sequences: int = 1
    seed: int | tuple[int, ...] | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    draft: DraftSource | Literal["lookup"] | None = None
    draft_tokens: int = 15
    adapter: str | None = None

    def __post_init__(self) -> None:
        for name in _MAY_BE_NUMPY:
            value = getattr(self, name)
            if type(value) not in _PLAIN_TYPES:
                object.__setattr__(self, name, _plain(value))
        self._normalize()
        self._check_numbers()
        self._check_beams()
        if self.do_sample and self.temperature == 0:
            raise BadOption(
                "do_sample asks for sampling, but temperature 0 is greedy. Leave out one of them."
            )
        if self.num_return_sequences > 1 and self.num_beams == 1 and self.do_sample is False:
            raise BadOption(
                f"num_return_sequences is {self.num_return_sequences}, but greedy decoding has one answer only. "
                "Ask for sampling (temperature=…) or for beams (num_beams=…)."
            )
        if self.draft is not None and self.num_beams > 1:
            raise BadOption("draft does not go with beam search: beams have no single next token to propose.")

    @classmethod
    def of(cls, base: Settings | None = None, options: Mapping[str, Any] | None = None) -> Settings:
        """Return ``base`` with ``options`` in place of its fields. Raises BadOption for unknown names."""
        if base is not None and not isinstance(base, cls):
            raise BadOption(f"settings must be Settings, found {type(base).__name__}.")
        for name in options or ():
            if name not in _NAMES:
                raise BadOption(f"there is no option {name!r}." + nearest(name, _NAMES))
        if base is None:
            return cls(**(options or {}))
        return replace(base, **options) if options else base

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random; greedy otherwise."""
        if self.do_sample is not None:
            return self.do_sample
        if self.temperature == 0:
            return False
        asked = (self.temperature, self.top_k, self.top_p, self.min_p, self.typical_p)
        return any(value is not None for value in asked)

    def with_defaults(self, published: Mapping[str, Any]) -> Settings:
        """Fill what was not asked for from the publisher's ``published`` values, as the class describes.

        Values that make no sense are passed over: packages exist with ``top_p: 0.0``.
        """
        filled: dict[str, Any] = {"do_sample": self.samples}
        keys = ("temperature", "top_k", "top_p", "min_p", "typical_p") if self.samples else ()
        for key in (*keys, "repetition_penalty"):
            value = published.get(key)
            if getattr(self, key) is None and _usable(key, value):
                filled[key] = value
        for key, (name, off) in _PRESCRIBED.items():
            if getattr(self, key) is None:
                value = published.get(name)
                filled[key] = off if value is None else value
        if isinstance(filled.get("sequence_bias"), list):
            filled["sequence_bias"] = {tuple(tokens): bias for tokens, bias in filled["sequence_bias"]}
        return replace(self, **filled)

    def seeds(self, rows: int) -> list[int | None]:
        """Return the seed of every one of ``rows`` answers. Raises BadOption for another number of seeds."""
        if self.seed is None:
            return [None] * rows
        if isinstance(self.seed, int):
            return [self.seed + row for row in range(rows)]
        if len(self.seed) != rows:
            raise BadOption(f"seed has {len(self.seed)} numbers for {rows} answers; give one each, or one.")
        return list(self.seed)

    def _normalize(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        # None is how a caller says that nothing is asked for, whatever the field.
        for name, empty in _EMPTY.items():
            if getattr(self, name) is None:
                put(name, empty)
        put("stop", (self.stop,) if isinstance(self.stop, str) else _listed("stop", self.stop))
        put("stop_token_ids", tuple(_plain(t) for t in _listed("stop_token_ids", self.stop_token_ids)))
        own = (self.processors,) if callable(self.processors) else _listed("processors", self.processors)
        put("processors", own)
        self._check_guidance()
        if self.bad_words is not None:
            put("bad_words", tuple(_bad_word(word) for word in _listed("bad_words", self.bad_words)))
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            if getattr(self, name) is not None:
                put(name, tuple(_token(token) for token in _listed(name, getattr(self, name))))
        if self.sequence_bias is not None:
            put("sequence_bias", _sequence_bias(self.sequence_bias))
        if not isinstance(self.logit_bias, Mapping):
            raise BadOption(f"logit_bias must map token ids to numbers, found {self.logit_bias!r}.")
        put("logit_bias", {_token(k): _plain(v) for k, v in self.logit_bias.items()})
        if isinstance(self.seed, Sequence):
            put("seed", tuple(_plain(s) for s in _listed("seed", self.seed)))
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise BadOption(f"stop must hold texts of at least one character, found {text!r}.")
        for process in self.processors:
            if not callable(process):
                raise BadOption(
                    f"processors must hold functions (history, logits) -> logits, found {process!r}."
                )

    def _check_guidance(self) -> None:
        from ortlm.runtime.structured_output.guidance import Guidance

        wanted = self.guidance
        for item in wanted if isinstance(wanted, (list, tuple)) else (wanted,):
            if item is not None and not isinstance(item, Guidance):
                raise BadOption(
                    f"guidance must be a Guidance, such as Guidance.regex(…), or a list of them; found {item!r}."
                )

    def _check_numbers(self) -> None:
        for name in ("do_sample", "ignore_eos"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "do_sample" and value is None):
                raise BadOption(f"{name} must be True or False, found {value!r}.")
        for token in self.stop_token_ids:
            _whole("stop_token_ids", token)
        for seed in self.seed if isinstance(self.seed, tuple) else (self.seed,):
            _whole("seed", seed)
        for name in ("max_new_tokens", "max_length", "logprobs", "prompt_logprobs"):
            _whole(name, getattr(self, name))
        _whole("top_k", self.top_k, hint="0 keeps all tokens")
        for name in ("min_new_tokens", "min_length", "no_repeat_ngram_size"):
            _whole(name, getattr(self, name), hint="0 is off")
        for name in ("num_return_sequences", "num_beams", "num_beam_groups", "draft_tokens"):
            _whole(name, getattr(self, name), needed=True, least=1, most=MOST_ROWS)
        _number("temperature", self.temperature, above=0.0, included=True, hint="0 is greedy")
        _number("top_p", self.top_p, above=0.0, most=1.0, hint="1 keeps all tokens")
        _number("min_p", self.min_p, above=0.0, included=True, most=1.0, hint="0 keeps all tokens")
        _number("typical_p", self.typical_p, above=0.0, most=1.0, hint="1 keeps all tokens")
        _number("repetition_penalty", self.repetition_penalty, above=0.0, hint="1 is none")
        for name in ("presence_penalty", "frequency_penalty", "length_penalty"):
            _finite(name, getattr(self, name))
        _number("diversity_penalty", self.diversity_penalty, above=0.0, included=True, hint="0 is none")
        for token, bias in self.logit_bias.items():
            if not is_number(bias) and not (isinstance(bias, float) and math.isinf(bias)):
                raise BadOption(f"logit_bias of token {token} must be a number, found {bias!r}.")

    def _check_beams(self) -> None:
        if self.early_stopping not in (True, False, "never"):
            raise BadOption(f'early_stopping must be True, False or "never", found {self.early_stopping!r}.')
        if self.num_beams > 1 and self.num_return_sequences > self.num_beams:
            raise BadOption(
                f"num_return_sequences is {self.num_return_sequences}, more than num_beams, {self.num_beams}."
            )
        if self.num_beams % self.num_beam_groups:
            raise BadOption(
                f"num_beams ({self.num_beams}) must be a multiple of num_beam_groups ({self.num_beam_groups})."
            )
        if self.diversity_penalty and self.num_beam_groups == 1:
            raise BadOption("diversity_penalty acts between groups of beams; set num_beam_groups above 1.")
        if self.num_beam_groups > 1 and self.samples:
            raise BadOption("num_beam_groups (diverse beams) does not go with sampling.")


# Looked up for every generation.
_NAMES = tuple(entry.name for entry in fields(Settings))
_MAY_BE_NUMPY = tuple(name for name in _NAMES if name not in ("processors", "guidance", "draft", "adapter"))
_PLAIN_TYPES = frozenset((int, float, bool, str, tuple, dict, type(None)))
_EMPTY = {
    entry.name: {} if entry.default is MISSING else entry.default
    for entry in fields(Settings)
    if entry.default is not None
}


def _plain(value: Any) -> Any:
    """Return a number of numpy as Python's, anything else as it is."""
    item = getattr(value, "item", None)
    return item() if callable(item) and getattr(value, "ndim", 0) == 0 else value


def _listed(name: str, value: object) -> tuple[Any, ...]:
    if isinstance(value, np.ndarray):
        return tuple(value.tolist())
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise BadOption(f"{name} must be a list, found {value!r}.")
    return tuple(value)


def _bad_word(word: object) -> str | tuple[int, ...]:
    if isinstance(word, str) and word:
        return word
    if not isinstance(word, str) and isinstance(word, Sequence) and len(word):
        return tuple(_token(token) for token in word)
    raise BadOption(f"bad_words must hold texts or lists of token ids, none of them empty; found {word!r}.")


def _sequence_bias(biases: object) -> dict[tuple[int, ...], float]:
    if not isinstance(biases, Mapping):
        raise BadOption(f"sequence_bias must map token ids, as tuples, to numbers; found {biases!r}.")
    result = {}
    for tokens, bias in biases.items():
        ids = tuple(_token(token) for token in _listed("sequence_bias", tokens))
        if not ids:
            raise BadOption("sequence_bias must map token ids to numbers; found none.")
        _finite("sequence_bias", _plain(bias))
        result[ids] = float(bias)
    return result


# What a publisher may prescribe whether or not tokens are drawn: the key in generation_config.json, and "off".
_PRESCRIBED: dict[str, tuple[str, Any]] = {
    "min_new_tokens": ("min_new_tokens", 0),
    "min_length": ("min_length", 0),
    "no_repeat_ngram_size": ("no_repeat_ngram_size", 0),
    "bad_words": ("bad_words_ids", ()),
    "suppress_tokens": ("suppress_tokens", ()),
    "begin_suppress_tokens": ("begin_suppress_tokens", ()),
    "sequence_bias": ("sequence_bias", {}),
}


def _token(given: object) -> int:
    token = _plain(given)
    if isinstance(token, bool) or not isinstance(token, int) or token < 0:
        raise BadOption(f"a token id must be a whole number, 0 or more, found {given!r}.")
    return token


def _usable(key: str, value: object) -> bool:
    if not is_number(value):
        return False
    if key == "top_k":
        return isinstance(value, int) and value >= 0
    if key == "min_p":
        return 0 <= value <= 1
    return 0 < value <= 1 if key in ("top_p", "typical_p") else value > 0


def _whole(
    name: str,
    value: object,
    *,
    needed: bool = False,
    least: int = 0,
    most: int | None = None,
    hint: str = "",
) -> None:
    if value is None and not needed:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise BadOption(f"{name} must be a whole number, {least} or more, found {shown(value)}{_in(hint)}.")
    if most is not None and value > most:
        raise BadOption(f"{name} must be at most {most:,}, found {shown(value)}.")


def _finite(name: str, value: object) -> None:
    if not is_number(value):
        raise BadOption(f"{name} must be a finite number, found {shown(value)}.")


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
    if isinstance(value, (int, float)) and is_number(value):
        low = value >= above if included else value > above
        if low and value <= most and value != float("inf"):
            return
    lower = f"{above:g} or more" if included else f"more than {above:g}"
    upper = f" and at most {most:g}" if most != float("inf") else ""
    raise BadOption(f"{name} must be a number {lower}{upper}, found {value!r}{_in(hint)}.")


def _in(hint: str) -> str:
    return f" ({hint})" if hint else ""
