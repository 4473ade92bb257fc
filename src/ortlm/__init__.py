"""Turn Hugging Face language models into quantized ONNX models and run them with ONNX Runtime.

    import ortlm

    ortlm.build("Phi-3.5-mini-instruct", output="phi", precision="int4", target="cpu")
    lm = ortlm.load("phi")
    print(lm.generate("The capital of France is", max_new_tokens=16))

Nothing is imported before it is used: running a model never loads what builds one.
"""

from __future__ import annotations

import importlib
import os

from ortlm import errors
from ortlm._version import __version__

# ONNX Runtime's wheels send telemetry unless this is set before their library is loaded; the hub's library adds it
# to its requests. Processes that are started from here inherit both. What a user has set stays.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

# Type checkers know the name; importing it would take most of the time that `import ortlm` takes.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ortlm.artifact import Artifact, open_artifact
    from ortlm.builder.options import BuildOptions
    from ortlm.builder.pipeline import build
    from ortlm.runtime.generation.generator import Generator
    from ortlm.runtime.generation.stream import Generation, Step, Stream, Timings
    from ortlm.runtime.language_model import LanguageModel, load
    from ortlm.runtime.multimodal.addresses import public_address
    from ortlm.runtime.sampling.logprobs import TokenLogprob
    from ortlm.runtime.sampling.settings import Settings
    from ortlm.runtime.structured_output.guidance import Guidance

_LAZY = {
    "Artifact": "ortlm.artifact",
    "open_artifact": "ortlm.artifact",
    "BuildOptions": "ortlm.builder.options",
    "build": "ortlm.builder.pipeline",
    "Generator": "ortlm.runtime.generation.generator",
    "Generation": "ortlm.runtime.generation.stream",
    "Step": "ortlm.runtime.generation.stream",
    "Stream": "ortlm.runtime.generation.stream",
    "Timings": "ortlm.runtime.generation.stream",
    "LanguageModel": "ortlm.runtime.language_model",
    "load": "ortlm.runtime.language_model",
    "public_address": "ortlm.runtime.multimodal.addresses",
    "TokenLogprob": "ortlm.runtime.sampling.logprobs",
    "Settings": "ortlm.runtime.sampling.settings",
    "Guidance": "ortlm.runtime.structured_output.guidance",
}

__all__ = [
    "Artifact",
    "BuildOptions",
    "Generation",
    "Generator",
    "Guidance",
    "LanguageModel",
    "Settings",
    "Step",
    "Stream",
    "Timings",
    "TokenLogprob",
    "__version__",
    "build",
    "errors",
    "load",
    "open_artifact",
    "public_address",
]


# Type checkers would take every name for one that there is.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module 'ortlm' has no attribute {name!r}")
        found = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
