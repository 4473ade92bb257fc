"""What a model prescribes to every generation: all that a generator knows of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ortlm.runtime.engine.backend import DeviceTensor
from ortlm.runtime.generation.speculative import Proposer
from ortlm.runtime.sampling.settings import Settings
from ortlm.runtime.structured_output.guidance import Guidance
from ortlm.runtime.structured_output.matcher import Guide


@dataclass(frozen=True, slots=True)
class Rules:
    """What a model prescribes to every generation.

    ``published`` are the publisher's sampling defaults, ``forbidden`` bool [V] the ids without a token, None if
    there are none. ``guide`` makes a matcher of a Guidance, the stop tokens and the prompt; ``words`` turns a text
    into the token sequences that write it; ``proposer`` makes what drafts tokens for some settings; ``adapter``
    returns the tensors of an adapter by input, those of none for None; ``fingerprint`` tells the model with an
    adapter from any other. ``images``: prompts may hold tokens of images, and those only with the adapter
    ``images_adapter`` if it has a name. ``bound`` is above all ids that have a token, None if all have one;
    ``gaps`` bool [bound] are those below it that have none, None if there are none.
    """

    context_tokens: int
    vocab_size: int
    stop_token_ids: frozenset[int] = frozenset()
    published: Mapping[str, Any] = field(default_factory=dict)
    forbidden: NDArray[np.bool_] | None = None
    guide: Callable[[Guidance, Collection[int], Sequence[int]], Guide] | None = None
    words: Callable[[str], list[tuple[int, ...]]] | None = None
    proposer: Callable[[Settings], Proposer | None] | None = None
    adapter: Callable[[str | None], Mapping[str, DeviceTensor]] | None = None
    fingerprint: Callable[[str | None], str] | None = None
    images: bool = False
    images_adapter: str | None = None
    # Ids without a token are nearly always the last ones, so that nothing need be looked up for the others.
    bound: int | None = field(init=False, default=None)
    gaps: NDArray[np.bool_] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.forbidden is None:
            return
        bound = int(np.flatnonzero(~self.forbidden)[-1]) + 1
        gaps = self.forbidden[:bound]
        object.__setattr__(self, "bound", bound)
        object.__setattr__(self, "gaps", gaps if gaps.any() else None)
