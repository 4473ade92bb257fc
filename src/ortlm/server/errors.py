"""Errors as OpenAI's clients know them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ortlm.errors import BadArtifact, BadOption, ContextFull, Overloaded, ShutDown, TimedOut

_log = logging.getLogger(__name__)

# Fields of Settings as the API calls them.
_PARAMETERS = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "guidance": "response_format",
    "the JSON schema": "response_format",
    "bad_words": "bad_words",
    "num_return_sequences": "n",
    "prompt_logprobs": "logprobs",
}
_SAME = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty", "seed",
    "frequency_penalty", "logit_bias", "stop", "stop_token_ids", "logprobs", "no_repeat_ngram_size",
)  # fmt: skip
_BEGINNING = re.compile(f"({'|'.join([*map(re.escape, _PARAMETERS), *_SAME])})\\b")


# Where files are on this machine is nobody's business.
_PATH = re.compile(r"(^|[\s'\"(])(/|[A-Za-z]:\\)\S")
_TYPES = {"float", "int", "str", "bool", "constrained"}


@dataclass(eq=False)
class ApiError(Exception):
    """What a request is answered with instead of what it asked for."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    retry_after: int | None = None

    def body(self) -> dict[str, Any]:
        """Return the JSON object of the answer."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        """The headers that go with it."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def refused(param: str, message: str) -> ApiError:
    """Return the error for a parameter that cannot be honored."""
    return ApiError(400, message, param=param)


def as_api_error(error: BaseException, *, retry_after: int = 1) -> ApiError:
    """Return what to answer after ``error``."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        # Of one API's request as another one's.
        return invalid(error)
    message = str(error)
    if isinstance(error, ContextFull):
        return ApiError(400, message, param="messages", code="context_length_exceeded")
    if isinstance(error, BadOption):
        found = _BEGINNING.match(message)
        name = found[1] if found else None
        return ApiError(400, message, param=_PARAMETERS.get(name, name) if name else None)
    if isinstance(error, Overloaded):
        return ApiError(429, message, "rate_limit_error", code="overloaded", retry_after=retry_after)
    if isinstance(error, TimedOut):
        return ApiError(504, message, "timeout_error", code="timeout")
    if isinstance(error, ShutDown):
        return ApiError(503, message, "unavailable_error", code="shutting_down", retry_after=retry_after)
    if isinstance(error, BadArtifact) and not _PATH.search(message):
        return ApiError(400, message, code="unsupported_by_model")
    # What went wrong inside is for the log, not for strangers.
    _log.error("a request failed: %s", error, exc_info=error)
    return ApiError(500, "the server failed on this request; its log says why.", "server_error")


def invalid(error: ValidationError) -> ApiError:
    """Return what to answer to a body that is no JSON, or not what the endpoint takes."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no valid JSON: {first['msg']}.", code="invalid_json")
    # Names of a union's alternatives are of no use to whoever sent the request.
    path = [
        part
        for part in first["loc"]
        if isinstance(part, int) or (re.fullmatch(r"[a-z_]+", str(part)) and part not in _TYPES)
    ]
    where = ".".join(map(str, path)) or None
    return ApiError(400, f"{where or 'the body'}: {first['msg']}.", param=where)
