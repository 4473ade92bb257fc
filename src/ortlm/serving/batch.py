"""Rows that run together: one token of each per step, or several where the first ones were drafted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ortlm.dtypes import Array
from ortlm.runtime.engine.decode_loop import Loop
from ortlm.runtime.engine.types import Logits
from ortlm.serving.request import Request


class Batch:
    """The rows of one adapter on one side of the switch of position encodings.

    ``requests[i]`` owns row i of the loop, which ``make`` returns when there is a first one. ``even``: where their
    number is odd, a row that is nobody's is computed too. Kernels for packed weights take rows in pairs, and round
    a single last one in another way, so that an answer would depend on how many others there are.
    """

    def __init__(self, make: Callable[[], Loop], *, even: bool = False) -> None:
        self._make = make
        self._loop: Loop | None = None
        self._even = even
        self._filled_up = False
        self.requests: list[Request] = []

    @property
    def tokens(self) -> int:
        """How many tokens all rows hold together."""
        return sum(len(request.row.tokens) for request in self.requests)

    def join(self, request: Request, states: Sequence[Array]) -> None:
        """Add the row of ``request``, whose tokens so far have ``states``."""
        self._take_out_filler()
        loop = self._loop or self._make()
        loop.join(request.row.tokens, states)
        self._loop = loop
        self.requests.append(request)

    def leave(self, request: Request) -> None:
        """Let go of the row of ``request``; the last row takes its place."""
        self._take_out_filler()
        row = self.requests.index(request)
        last = self.requests.pop()
        if row < len(self.requests):
            self.requests[row] = last
        if self._loop is not None:
            self._loop.leave(row)
        if not self.requests:
            self._loop = None

    def states(self, request: Request) -> list[Array]:
        """Return a copy of the states of ``request``, without what was drafted and is not part of its row."""
        assert self._loop is not None
        row, lengths = self.requests.index(request), [len(past) for past in self._loop.history]
        if lengths[row] > len(request.row.tokens):
            lengths[row] = len(request.row.tokens)
            self._loop.trim(lengths)
        return [state.copy() for state in self._loop.row(row)]

    @property
    def takes_drafts(self) -> bool:
        """Whether a step can feed several tokens of each row."""
        return self._loop is not None and self._loop.takes_several(len(self._loop.history))

    def step(self, drafts: Sequence[Sequence[int]] = ()) -> Logits:
        """Feed every request's next token, and after it what is in ``drafts`` for it, if there are any.

        Return the logits float32 [B, K, V] of each row's last tokens, with K = 1 without drafts: those after a
        draft of d tokens and the token before it are the last d + 1. The next step overwrites them. To be followed
        by ``settle`` once it is known which drafts became part of their rows.
        """
        assert self._loop is not None
        self._fill_up(self._loop)
        tokens = [request.next_token for request in self.requests]
        fed = [[token, *draft] for token, draft in zip(tokens, drafts or [[]] * len(tokens), strict=True)]
        if self._filled_up:
            fed.append(tokens[-1:])
        if any(drafts):
            logits = self._loop.append(fed, keep=max(map(len, fed)))
        else:
            logits = self._loop.step([row[0] for row in fed])[:, None]
        for request, token in zip(self.requests, tokens, strict=True):
            request.row.tokens.append(token)
        return logits

    def settle(self) -> None:
        """Take out of the cache what was drafted and is not part of its row."""
        if self._loop is None:
            return
        history = self._loop.history
        lengths = [len(request.row.tokens) for request in self.requests]
        lengths += map(len, history[len(lengths) :])
        if any(len(past) > length for past, length in zip(history, lengths, strict=True)):
            self._loop.trim(lengths)

    def drop(self) -> list[Request]:
        """Forget all that was computed, and return whose it was."""
        requests, self.requests, self._loop, self._filled_up = self.requests, [], None, False
        return requests

    def _fill_up(self, loop: Loop) -> None:
        if self._filled_up or not self._even or len(self.requests) % 2 == 0:
            return
        history = self.requests[-1].row.tokens
        states = loop.row(len(self.requests) - 1)
        short = loop.switch_tokens is None or len(history) <= loop.switch_tokens
        if short and all(state.window is None and not state.fixed for state in loop.states):
            # One token of it costs the least.
            history, states = history[:1], [state[:, :, :1] for state in states]
        loop.join(history, [state.copy() for state in states])
        self._filled_up = True

    def _take_out_filler(self) -> None:
        if self._filled_up and self._loop is not None:
            self._loop.leave(len(self.requests))
        self._filled_up = False
