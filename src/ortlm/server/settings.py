"""Parameters of requests to Settings."""

from __future__ import annotations

from typing import Any

from ortlm.errors import BadOption
from ortlm.runtime.sampling.settings import Settings
from ortlm.runtime.structured_output.guidance import Guidance
from ortlm.server.errors import ApiError, as_api_error, refused
from ortlm.server.wire import ResponseFormat, Sampling

# Those that are called the same, and mean the same.
_SAME = (
    "top_p", "seed", "presence_penalty", "frequency_penalty", "top_k", "min_p", "typical_p", "repetition_penalty",
    "no_repeat_ngram_size", "ignore_eos", "stop_token_ids", "bad_words",
)  # fmt: skip
_MOST_STOPS, _MOST_BIASES = 64, 1024


def settings_of(
    body: Sampling,
    *,
    max_tokens: int | None,
    adapter: str | None,
    guidance: Guidance | None = None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    index: int = 0,
) -> Settings:
    """Return what ``body`` asks of the answer number ``index``.

    Without a temperature tokens are drawn, at the temperature that the publisher recommends, or at 1.
    Raises ApiError with the parameter's name for values that cannot be used.
    """
    options: dict[str, Any] = {name: value for name in _SAME if (value := getattr(body, name)) is not None}
    if isinstance(body.seed, int):
        if body.seed < -(1 << 63):
            raise refused("seed", f"seed must be {-(1 << 63)} or more, found {body.seed}.")
        seed = body.seed + index
        # Negative ones are seeds of their own, above those of 63 bits.
        options["seed"] = seed if seed >= 0 else seed + (1 << 64)
    if body.temperature is None:
        options["do_sample"] = True
    else:
        options["temperature"] = body.temperature
        if body.temperature == 0:
            idle = ("top_p", "top_k", "min_p", "typical_p", "seed")
            # They change nothing then, but wrong values are wrong all the same.
            _checked({name: options.pop(name) for name in idle if name in options})
    if body.stop is not None:
        stops = [body.stop] if isinstance(body.stop, str) else body.stop
        if len(stops) > _MOST_STOPS:
            raise refused("stop", f"stop has {len(stops)} texts; at most {_MOST_STOPS} are possible.")
        options["stop"] = [text for text in stops if text] if body.stop != "" else []
    if body.logit_bias:
        options["logit_bias"] = _bias(body.logit_bias)
    if body.min_tokens:
        if max_tokens is not None and body.min_tokens > max_tokens:
            raise refused(
                "min_tokens", f"min_tokens is {body.min_tokens}, more than max_tokens, {max_tokens}."
            )
        options["min_new_tokens"] = body.min_tokens
    return _checked(
        options
        | {
            "max_new_tokens": max_tokens,
            "adapter": adapter,
            "guidance": guidance,
            "logprobs": logprobs,
            "prompt_logprobs": prompt_logprobs,
        }
    )


def _checked(options: dict[str, Any]) -> Settings:
    try:
        return Settings(**options)
    except BadOption as error:
        raise as_api_error(error) from error


def guidance_of(form: ResponseFormat | None, body: Sampling) -> Guidance | None:
    """Return what ``response_format`` asks for: by default JSON without whitespace between its tokens."""
    if form is not None and form.json_schema is not None and form.type != "json_schema":
        raise refused("response_format", f'response_format of type "{form.type}" takes no json_schema.')
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        schema: dict[str, Any] = {"type": "object"}
    elif form.json_schema is None:
        raise refused("response_format", 'response_format of type "json_schema" needs json_schema.schema.')
    else:
        schema = form.json_schema.schema_
    if not body.structured_whitespace:
        own = schema.get("x-guidance")
        own = own if isinstance(own, dict) else {}
        schema = {**schema, "x-guidance": {"whitespace_flexible": False, **own}}
    try:
        return Guidance.json_schema(schema)
    except BadOption as error:
        raise ApiError(400, str(error), param="response_format") from error


def _bias(given: dict[str, int | float]) -> dict[int, float]:
    if len(given) > _MOST_BIASES:
        raise refused(
            "logit_bias", f"logit_bias has {len(given)} tokens; at most {_MOST_BIASES} are possible."
        )
    biases = {}
    for token, bias in given.items():
        if not token.isascii() or not token.isdigit():
            raise refused(
                "logit_bias", f"logit_bias maps token ids to numbers; found {token[:32]!r} as an id."
            )
        if not -100 <= bias <= 100:
            raise refused(
                "logit_bias", f"logit_bias of token {token} must be from -100 to 100, found {bias}."
            )
        # As OpenAI's: -100 bars a token.
        biases[int(token)] = float("-inf") if bias == -100 else float(bias)
    return biases
