"""Rows that run together: one token of each per step."""

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
        self._fill_up()

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
        self._fill_up()

    def states(self, request: Request) -> list[Array]:
        """Return a copy of the states of ``request``."""
        assert self._loop is not None
        return [state.copy() for state in self._loop.row(self.requests.index(request))]

    def step(self) -> Logits:
        """Feed every request's next token; return the logits float32 [B, V], which the next step overwrites."""
        assert self._loop is not None
        tokens = [request.next_token for request in self.requests]
        logits = self._loop.step([*tokens, tokens[-1]] if self._filled_up else tokens)
        for request, token in zip(self.requests, tokens, strict=True):
            request.row.tokens.append(token)
        return logits

    def drop(self) -> list[Request]:
        """Forget all that was computed, and return whose it was."""
        requests, self.requests, self._loop, self._filled_up = self.requests, [], None, False
        return requests

    def _fill_up(self) -> None:
        loop = self._loop
        if loop is None or not self._even or len(self.requests) % 2 == 0:
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
