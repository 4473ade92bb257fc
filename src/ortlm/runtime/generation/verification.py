"""Which drafted tokens hold: one run of the model reads them all, and each step takes or rejects one.

Source: https://arxiv.org/abs/2211.17192.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ortlm.runtime.engine.types import Logits, Tokens
from ortlm.runtime.generation.speculative import Draft, Proposer
from ortlm.runtime.sampling.sampler import accept


@dataclass(frozen=True, slots=True)
class _Ahead:
    """Drafted tokens of a row that the model has seen already, and the logits after each."""

    tokens: Sequence[int]
    probabilities: Sequence[NDArray[np.float64]]
    logits: Logits

    def rest(self) -> _Ahead | None:
        """Return what is left when the first token has been confirmed."""
        if len(self.tokens) == 1:
            return None
        return _Ahead(self.tokens[1:], self.probabilities[1:], self.logits[1:])


class Verification:
    """The drafted tokens that the last run has read and no step has judged yet, row by row.

    ``proposed_tokens`` counts those that were drafted, ``accepted_tokens`` those of them that were confirmed.
    """

    def __init__(self) -> None:
        self.proposed_tokens = 0
        self.accepted_tokens = 0
        # Rows without such tokens are not in it.
        self._ahead: dict[int, _Ahead] = {}

    def forget(self) -> None:
        """Let go of all drafted tokens: what comes next is not what they were drafted for."""
        self._ahead.clear()

    def draft(
        self, proposer: Proposer, row: int, tokens: NDArray[np.int64], room: int, random: np.random.Generator
    ) -> Draft | None:
        """Return at most ``room`` tokens that ``proposer`` drafts after ``tokens`` int64 [T] of ``row``."""
        if room < 1:
            return None
        draft = proposer.propose(row, tokens, room, random)
        self.proposed_tokens += len(draft.tokens) if draft else 0
        return draft

    def read(self, drafts: Sequence[Draft | None], logits: Logits) -> Logits:
        """Take the ``logits`` [B, K, V] of the last K positions of every row, which end with its draft.

        Return those before the drafted tokens, [B, V].
        """
        keep = logits.shape[1]
        counts = [len(draft.tokens) if draft else 0 for draft in drafts]
        for row, (draft, count) in enumerate(zip(drafts, counts, strict=True)):
            if draft is not None:
                self._ahead[row] = _Ahead(
                    list(draft.tokens), draft.probabilities, logits[row, keep - count :]
                )
        return np.stack([logits[row, keep - 1 - count] for row, count in enumerate(counts)])

    def redraw(self, tokens: Tokens, logits: Logits, randoms: Sequence[np.random.Generator]) -> None:
        """Replace those of ``tokens`` int64 [B] whose draft was drawn, by that one or by another in its place.

        ``logits`` [B, V] are processed. A draft that was not drawn needs no rejection: drawing and comparing is
        the same.
        """
        for row, ahead in self._ahead.items():
            if ahead.probabilities:
                tokens[row], _ = accept(ahead.tokens[0], ahead.probabilities[0], logits[row], randoms[row])

    def advance(
        self, tokens: Tokens, logits: Logits | None, going: Iterable[int]
    ) -> tuple[list[int], Logits | None]:
        """Compare ``tokens`` int64 [B], which were just chosen by ``logits`` [B, V], with what was drafted.

        Return the rows whose draft was right, and the logits after them: None, and nothing drafted is left, unless
        they are known for every row that is ``going`` on.
        """
        right = [row for row, ahead in self._ahead.items() if ahead.tokens[0] == tokens[row]]
        self.accepted_tokens += len(right)
        if not right or logits is None or not set(going) <= set(right):
            self._ahead.clear()
            return right, None
        following = logits.copy()
        for row in right:
            ahead = self._ahead.pop(row)
            following[row] = ahead.logits[0]
            rest = ahead.rest()
            if rest is not None:
                self._ahead[row] = rest
        return right, following


def draft_room(
    length: int, *, remaining: int, wanted: int, context_tokens: int, switch_tokens: int | None
) -> int:
    """Return how many tokens may be drafted after a row of ``length`` tokens, 0 or less for none.

    At most ``wanted``, and one fewer than the ``remaining`` tokens that the answer may still get, because the
    model gives the last one itself. A longrope model rotates by another table above ``switch_tokens`` tokens.
    """
    room = min(remaining - 1, context_tokens - length, wanted)
    if switch_tokens is not None and length <= switch_tokens:
        # Drafts must not turn the whole text over to another rotation before it gets there itself.
        room = min(room, switch_tokens - length)
    return room
