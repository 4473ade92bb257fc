"""How finished answers are written: JSON for programs, texts and tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ortlm.cli.output import say, tell, write_generated

if TYPE_CHECKING:
    from ortlm.runtime.generation.stream import Generation, Timings
    from ortlm.runtime.language_model import LanguageModel
    from ortlm.runtime.sampling.logprobs import TokenLogprob


def summary(timings: Timings) -> str:
    """Return one line about speed, and about drafts if there were any."""
    fresh = timings.prompt_tokens - timings.cached_tokens
    rate = fresh / timings.prompt_seconds if timings.prompt_seconds else 0.0
    drafts = ""
    if timings.proposed_tokens:
        drafts = f"; drafts: {timings.accepted_tokens} of {timings.proposed_tokens} accepted"
    images = f"images: {timings.image_seconds:.2f} s; " if timings.image_seconds else ""
    return (
        f"{images}prompt: {timings.prompt_tokens} tokens ({timings.cached_tokens} from the cache), "
        f"{timings.prompt_seconds:.2f} s, {rate:.1f} tokens/s; "
        f"answer: {timings.new_tokens} tokens, {timings.decode_seconds:.2f} s, "
        f"{timings.tokens_per_second:.1f} tokens/s{drafts}"
    )


def as_json(made: Generation, lm: LanguageModel) -> dict[str, Any]:
    """Return all that is known of an answer; token texts are those that each token has alone."""
    timings = made.timings
    return {
        **answer(made, lm),
        "usage": {
            "prompt_tokens": timings.prompt_tokens,
            "completion_tokens": timings.new_tokens,
            "cached_tokens": timings.cached_tokens,
        },
        "timings": timings.to_dict(),
    }


def answer(made: Generation, lm: LanguageModel) -> dict[str, Any]:
    """Return an answer with its alternatives; keys of what was not asked for are left out."""
    data: dict[str, Any] = {"text": made.text, "tokens": made.token_ids, "finish_reason": made.finish_reason}
    if made.score is not None:
        data["score"] = made.score
    if made.logprobs:
        data["logprobs"] = [_entry(entry, lm) for entry in made.logprobs]
    if made.prompt_logprobs:
        data["prompt_logprobs"] = [_entry(entry, lm) for entry in made.prompt_logprobs]
    if made.alternatives:
        data["alternatives"] = [answer(other, lm) for other in made.alternatives]
    return data


def show(made: Generation, lm: LanguageModel) -> None:
    """Write texts to stdout, several with headings between them, and log-probabilities to stderr."""
    _table("prompt", made.prompt_logprobs, lm)
    for number, one in enumerate((made, *made.alternatives), 1):
        if made.alternatives:
            say(f"--- {number} ---")
        write_generated(f"{one.text}\n")
        _table("answer", one.logprobs, lm)


def _table(title: str, entries: Sequence[TokenLogprob | None], lm: LanguageModel) -> None:
    for entry in entries:
        if entry is not None:
            top = "  ".join(f"{_text(token, lm)!r} {value:.3f}" for token, value in entry.top)
            line = f"{title} {_text(entry.token_id, lm)!r:>16} {entry.logprob:9.4f}   {top}"
            tell(line.rstrip())


def _entry(entry: TokenLogprob | None, lm: LanguageModel) -> dict[str, Any] | None:
    if entry is None:
        return None
    top = [{"token": _text(token, lm), "id": token, "logprob": value} for token, value in entry.top]
    return {"token": _text(entry.token_id, lm), "id": entry.token_id, "logprob": entry.logprob, "top": top}


def _text(token: int, lm: LanguageModel) -> str:
    return lm.tokenizer.decode([token], skip_special_tokens=False)
