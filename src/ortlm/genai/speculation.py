"""Prompt-lookup drafts, counted under the names that the official runtime reports."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ortlm.runtime.generation.generator import Generator
from ortlm.runtime.generation.speculative import Draft, Lookup

# What the official runtime counts and what cannot happen here: other ways to draft, and rounds that end early.
_NEVER = (
    "tokens_buffered draft_forward_passes adaptive_k_increases adaptive_k_decreases adaptive_k_observations "
    "adaptive_k_probes cooldown_entries cooldown_steps cooldown_remaining mtp_failures dflash2_failures "
    "dflash2_disables dflash2_admission_misses target_reanchor_forward_passes "
    "target_reconciliation_forward_passes ngram_grammar_candidate_rejections ngram_history_syncs "
    "ngram_history_tokens_synced"
)
_NEVER_TIMES = (
    "total_reconciliation_ms total_target_reanchor_ms total_ngram_history_sync_ms adaptive_k_throughput"
)
_LONGEST = 16


class CountedLookup(Lookup):
    """A Lookup that counts what it finds, and the time that it takes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.hits = self.misses = self.chained = 0
        self.seconds = 0.0
        self._links = 0

    def propose(
        self, row: int, tokens: NDArray[np.int64], room: int, random: np.random.Generator
    ) -> Draft | None:
        """Return what may follow ``tokens``; see Lookup."""
        began, self._links = time.perf_counter(), 0
        draft = super().propose(row, tokens, room, random)
        self.seconds += time.perf_counter() - began
        self.hits += draft is not None
        self.misses += draft is None
        return draft

    def _following(self, tokens: NDArray[np.int64], size: int) -> list[int]:
        following = super()._following(tokens, size)
        self.chained += len(following) if self._links else 0
        self._links += 1
        return following


class Rounds:
    """What became of the drafts, step by step: a round is a run that checks some, until the next run."""

    def __init__(self) -> None:
        self._before = (0, 0, 0)
        # How many tokens of the round that continues were drafted, and how many of them were right.
        self._drafted, self._right = 0, 0
        self._full = self._partial = self._none = self._plain = 0
        self._lengths = [0] * (_LONGEST + 1)
        self._seconds = self._plain_seconds = 0.0

    def step(self, inner: Generator, seconds: float) -> None:
        """Take note of a step of ``inner`` that took so long."""
        now = (inner.runs, inner.proposed_tokens, inner.accepted_tokens)
        ran, drafted, right = (new - old for new, old in zip(now, self._before, strict=True))
        self._before = now
        if ran:
            self._close()
            self._drafted, self._right = drafted, 0
            if drafted:
                self._seconds += seconds
            else:
                self._plain += 1
                self._plain_seconds += seconds
        self._right += right

    def _close(self) -> None:
        if self._drafted:
            self._lengths[min(self._right, _LONGEST)] += 1
            self._full += self._right == self._drafted
            self._partial += 0 < self._right < self._drafted
            self._none += not self._right

    def statistics(
        self, inner: Generator, lookup: CountedLookup | None, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return every number under its official name; those of what never happens here are 0."""
        completed = self._full + self._partial + self._none
        active = int(self._drafted > 0)
        rounds = completed + active
        proposed, accepted = inner.proposed_tokens, inner.accepted_tokens
        # A round ends with one token more: the one after all drafts, or that in place of the first wrong one.
        emitted = accepted + completed
        most = int(options["max_draft_tokens"]) if lookup is not None else 0
        hits, misses, chained, looking = (
            (lookup.hits, lookup.misses, lookup.chained, 1000 * lookup.seconds) if lookup else (0, 0, 0, 0.0)
        )
        target = 1000 * self._seconds
        rate, each = _ratio(accepted, proposed), _ratio(proposed, rounds)
        expected = each + 1 if rate == 1 else _ratio(1 - rate ** (each + 1), 1 - rate)
        plain = _ratio(1000 * self._plain_seconds, self._plain) if lookup is not None else 0.0
        per_round = _ratio(target + looking, rounds)
        return {
            "rounds": rounds,
            "completed_rounds": completed,
            "interrupted_rounds": active if inner.done else 0,
            "active_rounds": 0 if inner.done else active,
            "draft_tokens_proposed": proposed,
            "draft_tokens_evaluated": proposed,
            "draft_tokens_accepted": accepted,
            "correction_tokens": self._partial + self._none,
            "bonus_tokens": self._full,
            "tokens_queued": emitted,
            "tokens_emitted": emitted,
            "tokens_discarded": proposed - accepted,
            "target_forward_passes": rounds,
            "effective_k": most,
            "standard_fallback_steps": self._plain if lookup is not None else 0,
            "full_accept_rounds": self._full,
            "partial_accept_rounds": self._partial,
            "zero_accept_rounds": self._none,
            "target_verify_forward_passes": rounds,
            "ngram_lookup_hits": hits,
            "ngram_lookup_misses": misses,
            "ngram_lookup_tokens_proposed": proposed,
            "ngram_chained_tokens_proposed": chained,
            **dict.fromkeys(_NEVER.split(), 0),
            "formula_supported": rounds > 0,
            "total_draft_ms": looking,
            "total_ngram_lookup_ms": looking,
            "total_target_ms": target,
            "total_target_verify_ms": target,
            "avg_draft_ms_per_token": _ratio(looking, proposed),
            "acceptance_rate": rate,
            "avg_draft_tokens_per_round": each,
            "mean_emitted_tokens_per_round": _ratio(emitted, rounds),
            "expected_tokens_per_round": expected if rounds else 0.0,
            "avg_target_ms_per_round": _ratio(target, rounds),
            "target_baseline_ms_per_token": plain,
            "target_overhead_ratio": _ratio(target, rounds) / plain - 1 if plain and rounds else 0.0,
            "estimated_speedup": _ratio(expected * plain, per_round),
            "observed_speedup": _ratio(_ratio(emitted, rounds) * plain, per_round),
            **dict.fromkeys(_NEVER_TIMES.split(), 0.0),
            "acceptance_length_histogram": self._lengths[: max(most, 8)],
        }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
