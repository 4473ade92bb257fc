"""A small model that says what a test wants: whatever it is asked, it chooses the tokens of a script."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ortlm


def with_template(
    trained: Path, folder: Path, template: str, tokens: Sequence[str], *, special: bool
) -> Path:
    """Copy the model ``trained`` to ``folder``, with another chat template and ``tokens`` in place of its last."""
    shutil.copytree(trained, folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    path = folder / "tokenizer.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    model = found["model"]
    by_id = {number: token for token, number in model["vocab"].items()}
    for at, token in enumerate(tokens):
        number = len(by_id) - 1 - at
        old = by_id[number]
        del model["vocab"][old]
        model["merges"] = [pair for pair in model["merges"] if "".join(pair) != old]
        found["added_tokens"].append(
            {
                "id": number, "content": token, "special": special, "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": False,
            }
        )  # fmt: skip
    path.write_text(json.dumps(found), encoding="utf-8")
    return folder


@contextlib.contextmanager
def says(lm: ortlm.LanguageModel, text: str) -> Iterator[None]:
    """Let every answer to messages be ``text``, in which special tokens may stand, and then end."""
    from ortlm.server import chat

    usual = chat.settings_of
    ids = [*lm.tokenizer.encode(text, add_special_tokens=False), min(lm.manifest.stop_token_ids)]

    def scripted(*args: Any, **how: Any) -> Any:
        given = iter(ids)

        def force(_: Any, logits: Any) -> Any:
            forced = np.full_like(logits, -np.inf)
            forced[..., next(given)] = 0
            return forced

        return replace(usual(*args, **how), processors=force)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "settings_of", scripted)
        yield


@contextlib.contextmanager
def prompts(lm: ortlm.LanguageModel, engine: Any) -> Iterator[list[str]]:
    """Note the prompt of each request, as text with special tokens."""
    usual, seen = engine.submit, []

    def submit(ids: Any, *args: Any, **how: Any) -> Any:
        seen.append(lm.tokenizer.decode(ids, skip_special_tokens=False))
        return usual(ids, *args, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "submit", submit)
        yield seen
