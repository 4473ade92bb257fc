"""Every algorithm that finds codes, by name, and what it needs to know of the model's inputs."""

from __future__ import annotations

from dataclasses import dataclass

from ortlm.errors import BadOption, nearest
from ortlm.quant.rtn import Quantizer, clip_search, rtn


@dataclass(frozen=True, slots=True)
class Calibrated:
    """An algorithm that looks at what a matrix is multiplied by.

    With ``equalizes``, scales of its inputs are moved into the weights before them (AWQ). With ``feeds_back``,
    inputs are rounded one after the other, each compensating for earlier errors (GPTQ); without, each block
    takes the range that loses least by the importance of its inputs.
    """

    equalizes: bool = False
    feeds_back: bool = False


# The place for better quantizers: a name here, and a function of type Quantizer.
DATA_FREE: dict[str, Quantizer] = {"rtn": rtn, "clip_search": clip_search}
CALIBRATED = {
    "importance": Calibrated(),
    "awq": Calibrated(equalizes=True),
    "gptq": Calibrated(feeds_back=True),
    "awq_gptq": Calibrated(equalizes=True, feeds_back=True),
}


# Of matrices whose codes the checkpoint has: they are carried over, and no function finds them.
KEPT = "kept"


def check_algorithm(name: str) -> None:
    """Raise BadOption, with the known names, if there is no algorithm called ``name``."""
    known = (*DATA_FREE, *CALIBRATED)
    if name not in known:
        raise BadOption(
            f"there is no quantization algorithm {name!r}; there are {', '.join(known)}."
            + nearest(name, known)
        )


def quantizer(name: str) -> Quantizer:
    """Return what rounds by the algorithm ``name``; for a calibrated one, what does so without data.

    Raises BadOption if there is no such algorithm.
    """
    check_algorithm(name)
    return DATA_FREE.get(name, rtn)
