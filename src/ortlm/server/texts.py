"""Embeddings, and what the tokenizer makes of texts."""

from __future__ import annotations

import asyncio
import base64
from functools import partial
from typing import Any

import numpy as np

from ortlm.errors import BadOption
from ortlm.server.chat import checked_message
from ortlm.server.errors import ApiError, refused
from ortlm.server.served import ServedModel
from ortlm.server.wire import DetokenizeBody, EmbeddingBody, TokenizeBody, first_given

_MOST_INPUTS = 2048


async def embeddings(served: ServedModel, body: EmbeddingBody) -> dict[str, Any]:
    """Return the embedding of each input: the mean of its tokens' last hidden states, of length 1."""
    given = body.input
    many: list[Any] = (
        [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
    )
    if not many or len(many) > _MOST_INPUTS:
        raise refused("input", f"input has {len(many)} texts; from 1 to {_MOST_INPUTS} are possible.")
    lm, rows = served.lm, []
    for one in many:
        try:
            ids = lm.encode(one)
        except BadOption as error:
            raise ApiError(400, str(error), param="input") from error
        if len(ids) > lm.manifest.context_tokens:
            raise ApiError(
                400,
                f"an input has {len(ids)} tokens, but the context holds {lm.manifest.context_tokens}.",
                param="input",
                code="context_length_exceeded",
            )
        rows.append(ids)
    found = []
    for number, ids in enumerate(rows):
        # One by one, so that running answers wait for one text at most.
        (vector,) = await asyncio.wrap_future(served.engine.run(partial(lm.embed, [ids])))
        shown: Any = vector.tolist()
        if body.encoding_format == "base64":
            shown = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        found.append({"object": "embedding", "index": number, "embedding": shown})
    count = int(np.sum([len(ids) for ids in rows]))
    return {
        "object": "list",
        "data": found,
        "model": served.name,
        "usage": {"prompt_tokens": count, "total_tokens": count},
    }


def tokenize(served: ServedModel, body: TokenizeBody) -> dict[str, Any]:
    """Return the token ids of a text or of messages."""
    name, given = first_given(prompt=body.prompt, content=body.content)
    tokenizer = served.lm.tokenizer
    if body.messages is not None:
        if given is not None:
            raise refused("messages", f"give {name} or messages, not both.")
        add = body.add_generation_prompt is not False
        try:
            messages = [
                checked_message(served, number, message) for number, message in enumerate(body.messages)
            ]
            given = served.lm.render(messages, add_generation_prompt=add)
        except BadOption as error:
            raise ApiError(400, str(error), param="messages") from error
        ids = tokenizer.encode(given, add_special_tokens=bool(body.add_special_tokens))
    elif given is None:
        raise refused("prompt", "prompt is missing: a text.")
    else:
        ids = tokenizer.encode(given, add_special_tokens=body.add_special_tokens is not False)
    return {"tokens": ids, "count": len(ids), "max_model_len": served.engine.context_tokens}


def detokenize(served: ServedModel, body: DetokenizeBody) -> dict[str, Any]:
    """Return the text of token ids."""
    size = served.lm.vocab_size
    for token in body.tokens:
        if not 0 <= token < size:
            raise refused("tokens", f"token id {token} is outside the vocabulary 0 … {size - 1}.")
    text = served.lm.tokenizer.decode(body.tokens, skip_special_tokens=False)
    return {"prompt": text, "content": text}


def tokenizer_info(served: ServedModel) -> dict[str, Any]:
    """Return what clients need to know of the tokenizer, under the names of tokenizer_config.json."""
    special = served.lm.tokenizer.special_tokens
    template = served.lm.chat_template
    shown = (
        None
        if template is None
        else template.templates.get("default", next(iter(template.templates.values())))
    )
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": served.engine.context_tokens,
        "bos_token": special.get("bos_token"),
        "eos_token": special.get("eos_token"),
        "pad_token": special.get("pad_token"),
        "unk_token": special.get("unk_token"),
        "chat_template": shown,
    }
