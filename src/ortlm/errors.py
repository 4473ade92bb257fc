"""Every error that ortlm raises on purpose.

Error:
     ├── BadOption         an option or argument has a value that cannot be used   (exit code 2)
     │    └── BadImage     an image cannot be read, or is larger than allowed
     ├── UnsupportedModel  config.json names an architecture that is not known
     ├── BadCheckpoint     the Hugging Face folder is incomplete, damaged or contradicts itself
     ├── BadArtifact       an ONNX model folder is incomplete or damaged
     ├── NoDevice          this machine lacks the device that a model is to run on
     ├── NotEnoughSpace    the disk cannot hold what would be written
     ├── ContextFull       a sequence reached the model's context length
     ├── CannotRewind      a cache cannot rewind to a shorter length
     ├── Cancelled         cancelled while the model ran
     ├── Overloaded        too many requests are waiting already
     ├── TimedOut          a request took longer than it may
     └── ShutDown          an engine ended before a request did

A message says what was found, where, what is allowed and what to do next.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

_NEAREST_NAMES, _NEAREST_LENGTH = 2_000, 200


class Error(Exception):
    """Root of all errors raised on purpose; the command line prints it without a traceback."""


class BadOption(Error, ValueError):
    """An option or argument has a value that cannot be used."""


class BadImage(BadOption):
    """An image cannot be read, or is larger than allowed."""


class UnsupportedModel(Error):
    """The checkpoint's architecture is not known."""


class BadCheckpoint(Error):
    """A Hugging Face folder is incomplete, damaged or contradicts itself."""


class BadArtifact(Error):
    """An ONNX model folder is incomplete or damaged."""


class NoDevice(Error):
    """The machine lacks the device that a model is to run on, or what drives it."""


class NotEnoughSpace(Error):
    """The disk cannot hold what would be written."""


class ContextFull(Error):
    """A sequence reached the model's context length."""


class CannotRewind(Error):
    """A cache cannot rewind to a shorter length."""


class Cancelled(Error):
    """Cancelled while the model ran."""


class Overloaded(Error):
    """Too many requests are waiting already."""


class TimedOut(Error):
    """A request took longer than it may."""


class ShutDown(Error):
    """An engine ended before a request did, or takes no more of them."""


def is_panic(error: BaseException) -> bool:
    """Whether ``error`` is a panic of a library written in Rust, which is no Exception.

    ``except BaseException`` around such a library must let everything else through, Ctrl-C above all.
    """
    return type(error).__module__ == "pyo3_runtime"


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean: a, b?"`` for the known words most like ``word``, or an empty string."""
    # A third of what `import ortlm` would take.
    import difflib

    # Each comparison takes a while, and names from files may be many and long.
    few = list(itertools.islice((name for name in known if len(name) <= _NEAREST_LENGTH), _NEAREST_NAMES))
    found = difflib.get_close_matches(word[:_NEAREST_LENGTH], few, n=3, cutoff=0.6)
    return f" Did you mean: {', '.join(found)}?" if found else ""
