"""Whether a model still answers as its reference does: greedy answers to a small pack of prompts, compared.

The reference need not be able to generate. It is shown a whole answer of the model in one go, and what it finds
most likely after each token is its own greedy answer up to the first token where they part. From there the model
continues after what the reference would have said, and the reference is asked again, until its answer is whole
(the way in which drafts are checked; Leviathan et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ortlm.dtypes import Floats
from ortlm.evaluation.compare import log_softmax
from ortlm.evaluation.prompts import PROMPTS, Prompt, in_script, is_refusal
from ortlm.evaluation.types import Source, Tokens
from ortlm.runtime.language_model import LanguageModel

ANSWER_TOKENS = 64
# After this many divergences the reference's answer stays a beginning.
_ROUNDS = 8
_OPENING = 8
_GRAM = 4
ABOUT = (
    f"Both models answer {len(PROMPTS)} prompts that ship with ortlm greedily, with at most {ANSWER_TOKENS} "
    "tokens. This shows change; it is no certificate of quality or safety. The reference scores an answer in one "
    "pass, and kernels for many rows round differently from those for one: self-agreement, the model's own answer "
    "scored this way, shows how much of the change comes from that. An answer counts as a refusal if it begins "
    "with a usual phrase of refusal, as valid if it has exactly the requested format, and as kept in its language "
    "if most of its letters are of the right script, which does not tell apart languages that share one. "
    f"Repetition is the share of {_GRAM}-grams that occurred before in the same answer. First tokens compares the "
    f"probabilities that both models give to the first {_OPENING} tokens of the evaluated model's answer."
)


@dataclass(slots=True)
class ComparedAnswer:
    """Answers of both models to one prompt, as tokens.

    ``base_tokens`` grow while the reference is asked; ``complete`` says that they are whole. ``diverged`` is the
    index of the first token where they diverge, None if they never do. ``agreed`` counts the tokens of the model's
    answer that are the reference's most likely ones after the same tokens, ``self_agreed`` those that are the
    model's own when it scores its answer in one pass. ``opening`` is ln(probability by the model / by the
    reference) of the answer's first tokens.
    """

    prompt: Prompt
    ids: list[int]
    tokens: list[int]
    base_tokens: list[int] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)
    complete: bool = False
    diverged: int | None = None
    agreed: int = 0
    self_agreed: int = 0
    opening: float = 0.0

    @property
    def row(self) -> Tokens:
        """What the reference has to read next."""
        return np.array([*self.ids, *self.base_tokens, *self.draft], np.int64)

    def compare(self, logits: Floats, most_likely: Tokens) -> None:
        """Take what the reference says of the whole answer, as ``follow`` does, for the first time."""
        same = most_likely == np.array(self.tokens)
        self.agreed = int(same.sum())
        self.diverged = None if same.all() else int(np.argmin(same))
        self.opening -= opening(logits, self.tokens)

    def follow(self, most_likely: Tokens, ends: Collection[int]) -> None:
        """Go on with the reference's answer, given what it finds most likely for each token of the draft, [N]."""
        same = most_likely == np.array(self.draft)
        match = len(same) if same.all() else int(np.argmin(same))
        self.base_tokens += self.draft[:match]
        if match < len(same):
            self.base_tokens.append(int(most_likely[match]))
        whole = match == len(same) or len(self.base_tokens) >= ANSWER_TOKENS
        self.complete = whole or self.base_tokens[-1] in ends
        self.draft = []


def drift(
    lm: LanguageModel, model: Source, base: Source, advance: Callable[[int], None] = lambda count: None
) -> list[ComparedAnswer]:
    """Return both models' answers to all prompts that fit. ``model`` is ``lm`` as a Source.

    ``advance`` counts the rounds in which the reference is asked.
    """
    room = lm.manifest.context_tokens - ANSWER_TOKENS
    asked = [(prompt, _encode(lm, prompt.text)) for prompt in PROMPTS]
    answers = [
        ComparedAnswer(prompt, ids, _continue(lm, ids, ANSWER_TOKENS))
        for prompt, ids in asked
        if len(ids) <= room
    ]
    unknown = lm.tokenizer.unknown_ids(lm.vocab_size)
    _read_again(model, answers, unknown)
    for number in range(_ROUNDS):
        waiting = [answer for answer in answers if not answer.complete]
        if not waiting:
            break
        for answer in waiting:
            so_far = answer.base_tokens
            answer.draft = (
                _continue(lm, [*answer.ids, *so_far], ANSWER_TOKENS - len(so_far))
                if number
                else answer.tokens
            )
        base.open([answer.row for answer in waiting])
        for at, answer in enumerate(waiting):
            logits = base.logits(at)[-1 - len(answer.draft) : -1]
            most_likely = _most_likely(logits, unknown)
            if number == 0:
                answer.compare(logits, most_likely)
            answer.follow(most_likely, lm.manifest.stop_token_ids)
        advance(1)
    return answers


def summarize(answers: Sequence[ComparedAnswer], lm: LanguageModel) -> dict[str, Any]:
    """Return the change by category, and every answer with its text, as JSON has it."""
    named = [_named(answer, lm) for answer in answers]
    categories: dict[str, Any] = {}
    for category in dict.fromkeys(answer["category"] for answer in named):
        own = [answer for answer in named if answer["category"] == category]
        categories[category] = _category(own)
    return {
        "about": ABOUT,
        "answer_tokens": ANSWER_TOKENS,
        "left_out": len(PROMPTS) - len(answers),
        "all": _category(named),
        "categories": categories,
        "answers": named,
    }


def _category(own: Sequence[dict[str, Any]]) -> dict[str, Any]:
    parted = sorted(answer["first_divergent_token"] for answer in own if answer["diverged"])
    figures: dict[str, Any] = {
        "prompts": len(own),
        "same_answer": sum(not answer["diverged"] for answer in own),
        "first_divergent_token": parted[len(parted) // 2] if parted else None,
        "same_prefix_share": _mean([answer["same_prefix_share"] for answer in own]),
        "agreement": _mean([answer["agreement"] for answer in own]),
        "self_agreement": _mean([answer["self_agreement"] for answer in own]),
        "opening_ln_ratio": _mean([abs(answer["opening_ln_ratio"]) for answer in own]),
        "repetition": _mean([answer["repetition"][0] for answer in own]),
        "base_repetition": _mean([answer["repetition"][1] for answer in own]),
        "refusal": _pairs([answer["refusal"] for answer in own]),
    }
    for name in ("valid", "language"):
        pairs = [answer[name] for answer in own if answer[name] is not None]
        if pairs:
            figures[name] = _pairs(pairs)
    return figures


def _pairs(pairs: Sequence[Sequence[bool]]) -> dict[str, int]:
    """Return how often something holds for both models, for one of them only, and for none."""
    return {
        "both": sum(a and b for a, b in pairs),
        "model_only": sum(a and not b for a, b in pairs),
        "base_only": sum(b and not a for a, b in pairs),
        "neither": sum(not a and not b for a, b in pairs),
    }


def _named(answer: ComparedAnswer, lm: LanguageModel) -> dict[str, Any]:
    prompt, count = answer.prompt, len(answer.tokens)
    texts = [lm.tokenizer.decode(tokens) for tokens in (answer.tokens, answer.base_tokens)]
    valid, script = prompt.valid, prompt.script
    return {
        "category": prompt.category,
        "prompt": prompt.text,
        "answer": texts[0],
        "base_answer": texts[1],
        "base_complete": answer.complete,
        "diverged": answer.diverged is not None,
        "first_divergent_token": answer.diverged,
        "same_prefix_share": 1.0 if answer.diverged is None else answer.diverged / count,
        "agreement": answer.agreed / count,
        "self_agreement": answer.self_agreed / count,
        "opening_ln_ratio": answer.opening,
        "repetition": [repetition(tokens) for tokens in (answer.tokens, answer.base_tokens)],
        "refusal": [is_refusal(text) for text in texts],
        "valid": None if valid is None else [valid(text) for text in texts],
        "language": None if script is None else [in_script(text, script) for text in texts],
    }


def repetition(tokens: Sequence[int]) -> float:
    """Return the share of groups of four tokens that occurred before, 0 to 1."""
    grams = [tuple(tokens[at : at + _GRAM]) for at in range(len(tokens) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _encode(lm: LanguageModel, text: str) -> list[int]:
    return lm.encode([{"role": "user", "content": text}] if lm.chat_template is not None else text)


def _continue(lm: LanguageModel, ids: Sequence[int], count: int) -> list[int]:
    made = lm.generate(ids, max_new_tokens=count, temperature=0, repetition_penalty=1.0, reuse_cache=False)
    return list(made.token_ids)


def _most_likely(logits: Floats, unknown: Tokens) -> Tokens:
    """Return what greedy decoding would choose after each row of ``logits``: never an id without a token."""
    known = logits.copy()
    known[:, unknown] = -np.inf
    tokens: Tokens = known.argmax(axis=1)
    return tokens


def _read_again(model: Source, answers: Sequence[ComparedAnswer], unknown: Tokens) -> None:
    """Note what ``model`` says when it reads its own answers at once."""
    model.open([np.array([*answer.ids, *answer.tokens], np.int64) for answer in answers])
    for at, answer in enumerate(answers):
        logits = model.logits(at)[len(answer.ids) - 1 : -1]
        answer.opening = opening(logits, answer.tokens)
        answer.self_agreed = int((_most_likely(logits, unknown) == np.array(answer.tokens)).sum())


def opening(logits: Floats, tokens: Sequence[int]) -> float:
    """Return ln of the probability that ``logits`` [N, V] give to the first of ``tokens`` [N]."""
    wanted = list(tokens[:_OPENING])
    logs = log_softmax(logits[: len(wanted)])
    return float(logs[np.arange(len(wanted)), wanted].sum())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
