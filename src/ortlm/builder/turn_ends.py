"""The tokens that end an assistant's turn, found by looking at what the chat template writes after an answer."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

from ortlm.builder.tokenizer_files import TokenizerFiles
from ortlm.errors import BadArtifact, BadCheckpoint, Error
from ortlm.runtime.text.chat_template import ChatTemplate

_ANSWER = "ortlmanswer"
_USER: dict[str, Any] = {"role": "user", "content": "ortlmquestion"}
_ASSISTANT: dict[str, Any] = {"role": "assistant", "content": _ANSWER}
# An answer at the end, and one in the middle: some templates close only one of them.
_CONVERSATIONS = ([_USER, _ASSISTANT], [_USER, _ASSISTANT, _USER], [_USER, _ASSISTANT, _USER, _ASSISTANT])
# Tokens that are not marked as special, but written so that no answer holds them by chance.
_MARK = re.compile(r"<[^\s<>][^<>]*>|\[[^\s\[\]]+\]")


def turn_ends(folder: Path, tokenizer: TokenizerFiles) -> list[int]:
    """Return the ids of the tokens that the chat templates in ``folder`` put after an assistant's words.

    Raises BadCheckpoint if a template cannot be read. One that refuses all conversations tells nothing.
    """
    try:
        template = ChatTemplate.open(folder, tokenizer.opened.special.names)
    except BadArtifact as error:
        raise BadCheckpoint(str(error)) from error
    endings: list[int] = []
    for name in template.templates if template else ():
        for conversation in _CONVERSATIONS:
            with contextlib.suppress(Error):
                assert template is not None
                text = template.render(conversation, name=name, add_generation_prompt=False)
                endings += _after_answers(text, tokenizer)
    return list(dict.fromkeys(endings))


def _after_answers(text: str, tokenizer: TokenizerFiles) -> list[int]:
    special, endings = tokenizer.special_ids, []
    for after in text.split(_ANSWER)[1:]:
        rest = after.lstrip()
        matching = [
            token
            for token, at in tokenizer.ids.items()
            if token.strip() and rest.startswith(token.strip()) and (at in special or _MARK.fullmatch(token))
        ]
        if matching:
            endings.append(tokenizer.ids[max(matching, key=len)])
    return endings
