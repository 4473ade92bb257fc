"""Files of requests to the small trained model."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.serving.conftest import lm, trained

if TYPE_CHECKING:
    from ortlm.batch.results import Counts
    from ortlm.batch.run import BatchOptions

__all__ = ["lm", "trained"]

_WORDS = ["import", "os", "def", "return", "for", "range", "open", "read", "class", "self", "print"]


def request(custom_id: str, url: str, **body: Any) -> dict[str, Any]:
    """Return a row."""
    body = {"model": "tiny", **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def mixed(count: int) -> list[dict[str, Any]]:
    """Return greedy chats and completions of several lengths, some of which share a beginning."""
    drawn = random.Random(1)
    rows = []
    for number in range(count):
        text = " ".join(drawn.choices(_WORDS, k=drawn.randrange(4, 40)))
        if number % 5 == 0:
            text = "import os\nimport sys\nfrom pathlib import Path\n\ndef main() -> None:\n    " + text
        how = {"max_tokens": drawn.randrange(2, 12), "temperature": 0}
        if number % 3:
            rows.append(request(f"r{number}", "/v1/completions", prompt=text, **how))
        else:
            messages = [{"role": "user", "content": text}]
            rows.append(request(f"r{number}", "/v1/chat/completions", messages=messages, **how))
    return rows


def write(path: Path, rows: Sequence[Any]) -> Path:
    """Write ``rows`` as lines of JSON; texts as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def said(result: dict[str, Any]) -> str:
    """Return the text of an answer."""
    choice = result["response"]["body"]["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def results(folder: Path, kind: str = "output") -> dict[str, dict[str, Any]]:
    """Return the results in ``folder`` by custom_id, each of which is there once."""
    from ortlm.batch.results import shards_of

    found = list(shards_of(folder, kind))
    by_name = {row["custom_id"]: row for row in found}
    assert len(by_name) == len(found)
    return by_name


class Silent:
    """A watcher that notes what it was told."""

    def __init__(self) -> None:
        self.before = -1

    def started(self, rows: int, counts: Counts) -> None:
        self.before = counts.done

    def advanced(self, counts: Counts) -> None:
        pass


@pytest.fixture
def options(trained: Path, tmp_path: Path) -> Callable[..., BatchOptions]:
    """Return a function that writes rows and returns options that answer them."""

    def make(rows: Sequence[Any], **how: Any) -> BatchOptions:
        from ortlm.batch.run import BatchOptions

        path = write(tmp_path / "requests.jsonl", rows)
        given = {"batch": 4, "machine": {"threads": 1}, **how}
        return BatchOptions(f"tiny={trained}", path, tmp_path / "results", **given)

    return make
