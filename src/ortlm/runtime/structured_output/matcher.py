"""Which tokens keep an answer within its guidance, asked again for every token.

    vocabulary = Vocabulary(lm.tokenizer, lm.vocab_size)
    guide = vocabulary.guide(Guidance.regex("[0-9]{4}"), stop_ids=lm.manifest.stop_token_ids, prompt=ids)
    guide.allowed([])  # which tokens may come first

llguidance is imported when the first Vocabulary is made.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import tokenizers
from numpy.typing import NDArray

from ortlm.errors import BadOption, Error
from ortlm.runtime.engine.token_ids import common_prefix_length
from ortlm.runtime.engine.types import History, Logits, Processor
from ortlm.runtime.structured_output.guidance import TITLES, Guidance, brief, on_deep_stack, refused
from ortlm.runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

Allowed = NDArray[np.bool_]

_NEVER = np.float32(-np.inf)
_END = "<|guidance:end|>"
# What may be left of a token without the space in front, next to a token.
_NOTHING = -1
_NO_TOKEN = -2


class Vocabulary:
    """The tokens of one model, as grammars see them.

    Takes a third of a second for 32,000 tokens, so make it once; threads may share it. ``size`` is the
    width V of the model's logits; ids without a token are never allowed. Raises BadOption if it cannot be told
    which bytes the tokens of the tokenizer stand for.
    """

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        from llguidance import LLTokenizer

        # The end of an answer is a token of its own, so that a model may have any number of stop tokens,
        # none, or such as are text, too.
        inner = tokenizers.Tokenizer.from_str(tokenizer.to_json())
        inner.add_special_tokens([tokenizers.AddedToken(_END, special=True, normalized=False)])
        self.end = dict(inner.get_vocab(with_added_tokens=True))[_END]
        self.size = size
        try:
            self.tokens = LLTokenizer(inner.to_str(), n_vocab=max(size, self.end + 1), eos_token=self.end)
        except ValueError as error:
            raise BadOption(
                f"guidance cannot be used with this model's tokenizer: {error}. Those that work are byte-level "
                "or have byte fallback. Generate without guidance."
            ) from error
        self.known = np.ones(size, dtype=np.bool_)
        self.known[tokenizer.unknown_ids(size)] = False
        # In a vocabulary with holes it may have got the id of a token, which cannot be told from it then.
        self.known[self.end : self.end + 1] = False
        self._special_ids = tokenizer.special_ids
        self.bare = self._without_space(tokenizer)

    def guide(
        self, guidance: Guidance, *, stop_ids: Collection[int] = (), prompt: Sequence[int] = ()
    ) -> Guide:
        """Return a guide for one answer to ``prompt`` that may be ended by any token of ``stop_ids``.

        Raises BadOption if the grammar names tokens that do not exist, or if no answer is possible.
        """
        begins = not len(prompt) or int(prompt[-1]) in self._special_ids
        return Guide(self, guidance, stop_ids, bare=self.bare if begins else {})

    def text(self, token: int) -> str:
        """Return the text of one token, for messages."""
        return self.tokens.decode_str([token])

    def _without_space(self, tokenizer: Tokenizer) -> dict[int, int]:
        """Return, for every token that loses a space where a text begins, the token of what is left.

        There, sentencepiece writes every word with a space in front, and decoding takes it away again.
        """
        spaced: dict[int, bytes] = {}
        by_bytes: dict[bytes, int] = {}
        for token in np.flatnonzero(self.known).tolist():
            content = self.tokens.decode_bytes([token])
            # The last of several: bytes come first, and where text is forced only its usual spelling is allowed.
            by_bytes[content] = token
            if content.startswith(b" "):
                spaced[token] = content[1:]
        sample = next((token for token, rest in spaced.items() if rest.isalpha()), None)
        if sample is None or tokenizer.decode([sample]).startswith(" "):
            return {}
        by_bytes[b""] = _NOTHING
        return {token: by_bytes.get(rest, _NO_TOKEN) for token, rest in spaced.items()}


class Guide:
    """Tells which tokens may follow in one answer; made by ``Vocabulary.guide``.

    Every question names all tokens of the answer so far, so a search may rewind or elsewhere between two
    questions; what the last question has in common with this one is not computed again. For one thread at a
    time; different guides may be used at the same time.

    ``bare`` are the tokens that stand for another one where the answer begins.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        guidance: Guidance,
        stop_ids: Collection[int],
        *,
        bare: Mapping[int, int],
    ) -> None:
        self._vocabulary = vocabulary
        self._guidance = guidance
        self._stop_ids = frozenset(int(token) for token in stop_ids)
        ends = sorted(filter(self._known, self._stop_ids))
        self._stops = np.array(ends, dtype=np.int64)
        # A grammar can name a special token, but text never consists of one.
        self._named = np.array([vocabulary.tokens.is_special_token(token) for token in ends], dtype=np.bool_)
        self._bare = bare
        self._spaced = np.array(list(bare), dtype=np.int64)
        self._rests = np.array(list(bare.values()), dtype=np.int64)
        self._taken: list[int] = []
        self._mask: Allowed | None = None
        # Where rewinding starts from: the beginning, and where it last went back to.
        self._anchors = [(0, self._compiled())]
        self._matcher = self._anchors[0][1].deep_copy()
        try:
            self.allowed([])
        except Error as error:
            raise refused(guidance.kind, str(error)) from error

    def allowed(self, tokens: Sequence[int] | NDArray[np.int64]) -> Allowed:
        """Return which tokens may follow the generated ``tokens``, bool [V].

        Where only one text can follow, that is the first token of its usual spelling. Where the grammar is
        complete these are the stop tokens only, so none if there are no stop tokens; likewise after a stop
        token. Raises BadOption if ``tokens`` break the grammar, Error if it became too complex or the
        vocabulary has no token that could follow.
        """
        if self._move(tokens):
            return self._only_stops()
        return self._here()

    def finished(self, tokens: Sequence[int] | NDArray[np.int64]) -> bool:
        """Return whether nothing but a stop token may follow ``tokens``; raises as ``allowed`` does."""
        if self._move(tokens):
            return True
        allowed = self._here()
        allowed[self._stops] = False
        return bool(self._compute()[self._vocabulary.end]) and not allowed.any()

    def forced(self, tokens: Sequence[int] | NDArray[np.int64]) -> list[int]:
        """Return the tokens that spell what must follow ``tokens``, often none.

        The same text may have other spellings that are allowed, too: they are a guess to be verified.
        """
        # Where a text begins there are always two spellings, and which one a model prefers is not known.
        if self._move(tokens) or (self._bare and not self._taken):
            return []
        ids: list[int] = []
        for token in self._matcher.compute_ff_tokens():
            if token in self._stop_ids or not self._known(token):
                break
            ids.append(token)
        return ids

    def _here(self) -> Allowed:
        """Return which tokens may follow where the matcher stands."""
        computed = self._compute()
        complete = bool(computed[self._vocabulary.end])
        out = computed[: self._vocabulary.size] & self._vocabulary.known
        if not self._taken and len(self._spaced):
            out[self._spaced] = computed[self._rests] & (self._rests >= 0) | (self._rests == _NOTHING)
        out[self._stops] = (out[self._stops] & self._named) | complete
        if not complete and not out.any():
            raise self._stuck()
        return out

    def _only_stops(self) -> Allowed:
        out = np.zeros(self._vocabulary.size, dtype=np.bool_)
        out[self._stops] = True
        return out

    def _compute(self) -> Allowed:
        """Return llguidance's mask where the matcher stands, its end token included."""
        if self._mask is None:
            packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            # After an error the mask is one that ends the answer.
            self._check()
            self._mask = np.unpackbits(packed, bitorder="little").view(np.bool_)
        return self._mask

    def _move(self, tokens: Sequence[int] | NDArray[np.int64]) -> bool:
        """Bring the matcher to the place after ``tokens``; return whether a stop token is among them."""
        wanted: list[int] = tokens.tolist() if isinstance(tokens, np.ndarray) else [int(t) for t in tokens]
        same = common_prefix_length(self._taken, wanted)
        stop = next((at for at in range(same, len(wanted)) if wanted[at] in self._stop_ids), None)
        if same < len(self._taken):
            self._back_to(same)
        self._take(wanted[len(self._taken) : stop])
        if stop is None:
            return False
        if not (self._known(wanted[stop]) and self._here()[wanted[stop]]):
            raise self._broken(wanted[stop])
        return True

    def _take(self, tokens: list[int]) -> None:
        if not tokens:
            return
        spelled = tokens
        if not self._taken:
            first = self._bare.get(tokens[0], tokens[0])
            spelled = tokens[1:] if first == _NOTHING else [first, *tokens[1:]]
        known = next((at for at, token in enumerate(spelled) if not self._known(token)), len(spelled))
        count = self._matcher.try_consume_tokens(spelled[:known]) + len(tokens) - len(spelled)
        self._mask = None
        self._taken += tokens[:count]
        self._check()
        if count < len(tokens):
            raise self._broken(tokens[count])

    def _back_to(self, length: int) -> None:
        # LLMatcher.rollback and reset keep a mask of where they come from, and give it out as one of where
        # they lead (seen in 1.5 to 1.9), so matchers only ever go forward, and copies replace those after.
        self._anchors = [anchor for anchor in self._anchors if anchor[0] <= length]
        start, anchor = self._anchors[-1]
        again = self._taken[start:length]
        self._matcher, self._taken, self._mask = anchor.deep_copy(), self._taken[:start], None
        self._take(again)
        if again:
            self._anchors[1:] = [(length, self._matcher.deep_copy())]

    def _compiled(self) -> LLMatcher:
        from llguidance import LLMatcher

        grammar, tokens = self._guidance.grammar, self._vocabulary.tokens
        matcher = on_deep_stack(lambda: LLMatcher(tokens, grammar, log_level=0))
        if matcher.is_error():
            raise refused(self._guidance.kind, matcher.get_error())
        return matcher

    def _known(self, token: int) -> bool:
        return 0 <= token < self._vocabulary.size and bool(self._vocabulary.known[token])

    def _check(self) -> None:
        """Raise Error if the matcher gave up; it cannot continue, so the next question begins again."""
        if not self._matcher.is_error():
            return
        error = self._stuck()
        if not self._matcher.get_error().startswith("NoExtension"):
            reason = brief(self._matcher.get_error())
            error = Error(
                f"{TITLES[self._guidance.kind]} cannot be followed after {len(self._taken)} tokens of the answer: "
                f"{reason}\nMake it simpler."
            )
        self._back_to(0)
        raise error

    def _stuck(self) -> Error:
        return Error(
            f"no token of the vocabulary continues an answer of {len(self._taken)} tokens within "
            f"{TITLES[self._guidance.kind]}; allow other text there, or fewer stop tokens."
        )

    def _broken(self, token: int) -> BadOption:
        text = f" ({self._vocabulary.text(token)!r})" if self._known(token) else ""
        return BadOption(
            f"token {token}{text} at index {len(self._taken)} of the answer does not follow "
            f"{TITLES[self._guidance.kind]}. Only tokens that Guide.allowed permits may be taken."
        )


def guided(guides: Sequence[Guide | None], starts: Sequence[int]) -> Processor:
    """Return a processor that takes every token from row b that ``guides[b]`` forbids; None leaves a row alone.

    ``starts[b]`` is where the answer begins in row b of the history. A row whose guide is finished and knows no
    stop token is left alone: ask ``Guide.finished`` after every token.
    """

    def process(history: History, logits: Logits) -> Logits:
        out = logits
        for row, (guide, start) in enumerate(zip(guides, starts, strict=True)):
            if guide is None:
                continue
            answer = history[row, start:]
            allowed = guide.allowed(answer[answer >= 0])
            if allowed.any():
                out = logits.copy() if out is logits else out
                out[row] = np.where(allowed, logits[row], _NEVER)
        return out

    return process
