"""The text and bytes of single tokens, as log-probabilities are reported."""

from __future__ import annotations

from functools import cached_property

from ortlm.runtime.engine.token_ids import FIRST_IMAGE_TOKEN
from ortlm.runtime.sampling.logprobs import TokenLogprob
from ortlm.runtime.text.tokenizer import Tokenizer


class TokenTexts:
    """What each token of ``tokenizer`` adds to a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    @cached_property
    def _anchor(self) -> tuple[list[int], str]:
        # A token's space in front shows after another one only.
        ids = self._tokenizer.encode("a", add_special_tokens=False)[-1:]
        return ids, self._tokenizer.decode_raw(ids)

    def text(self, token: int) -> str:
        """Return the text of ``token`` within a text; bytes that are no whole character are U+FFFD."""
        if token >= FIRST_IMAGE_TOKEN:
            return ""
        found = self._known.get(token)
        if found is None:
            ids, before = self._anchor
            both = self._tokenizer.decode_raw([*ids, token], skip_special_tokens=False)
            alone = self._tokenizer.decode_raw([token], skip_special_tokens=False)
            found = both[len(before) :] if both.startswith(before) else alone
            self._known[token] = found
        return found

    def data(self, token: int) -> list[int]:
        """Return the bytes of ``token``."""
        found = None if token >= FIRST_IMAGE_TOKEN else self._tokenizer.token_bytes(token)
        return list(self.text(token).encode() if found is None else found)

    def chat(self, found: TokenLogprob) -> dict[str, object]:
        """Return an entry of ``logprobs.content`` of chat completions."""
        return {
            **self._entry(found.token_id, found.logprob),
            "top_logprobs": [self._entry(token, logprob) for token, logprob in found.top],
        }

    def top(self, found: TokenLogprob) -> dict[str, float]:
        """Return the most likely tokens by their texts, the chosen one among them, for completions.

        Of several tokens with one text the most likely counts.
        """
        texts: dict[str, float] = {}
        for token, logprob in (*found.top, (found.token_id, found.logprob)):
            text = self.text(token)
            texts[text] = max(logprob, texts.get(text, logprob))
        return texts

    def _entry(self, token: int, logprob: float) -> dict[str, object]:
        return {"token": self.text(token), "logprob": max(logprob, -9999.0), "bytes": self.data(token)}
