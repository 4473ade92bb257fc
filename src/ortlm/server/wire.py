"""What requests may hold. A parameter is honored, known to change nothing, or refused by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from ortlm.server.errors import ApiError, invalid, refused

_T = TypeVar("_T", bound="Body")
Number = float | int

# Who asked, what for, and where it is to be kept: no answer depends on them.
_BOOKKEEPING = frozenset(
    {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
        "prompt_cache_options", "prompt_cache_retention", "request_id", "prediction", "stream_options",
    }
)  # fmt: skip
# The same of the objects within a request.
_INNER_BOOKKEEPING = frozenset({"cache_control", "description"})


class Body(BaseModel):
    """A request's JSON object; numbers and truth values are not converted into each other."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None


class StreamOptions(BaseModel):
    """What else a stream holds."""

    model_config = ConfigDict(strict=True, extra="allow")

    include_usage: bool = False
    include_obfuscation: bool | None = None
    continuous_usage_stats: Literal[False] | None = None


class Sampling(Body):
    """How to choose tokens: OpenAI's parameters, and those of vLLM and llama.cpp as further fields."""

    temperature: Number | None = None
    top_p: Number | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
    n: int | None = Field(None, ge=1, le=128)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: int | None = None
    min_p: Number | None = None
    typical_p: Number | None = None
    repetition_penalty: Number | None = None
    no_repeat_ngram_size: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    priority: int | None = None
    structured_whitespace: bool | None = None


class Shown(BaseModel):
    """An object that is shown to the model with all of its fields, known or not."""

    model_config = ConfigDict(strict=True, extra="allow")


class Function(Shown):
    """A function that a model may call."""

    name: str = Field(pattern=r"^[\w.:-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """A tool: of all kinds, functions are there."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["function"]
    function: Function


class NamedFunction(BaseModel):
    """The name of a function."""

    model_config = ConfigDict(strict=True, extra="allow")

    name: str


class ToolChoice(BaseModel):
    """The one function that is to be called."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(BaseModel):
    """A schema with a name."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    name: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """The form of an answer."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatBody(Sampling):
    """``POST /v1/chat/completions``."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=0)
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    reasoning_effort: str | None = None
    modalities: list[Literal["text"]] | None = None
    return_token_ids: bool | None = None


class CompletionBody(Sampling):
    """``POST /v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    best_of: int | None = None
    response_format: ResponseFormat | None = None


class EmbeddingBody(Body):
    """``POST /v1/embeddings``."""

    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None


class TokenizeBody(Body):
    """``POST /tokenize``."""

    prompt: str | None = None
    content: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None


class DetokenizeBody(Body):
    """``POST /detokenize``."""

    tokens: list[int]


# Values that ask for nothing, of parameters that are not there.
_NOTHING: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "verbosity": ("medium",),
    "best_of": (1,),
    "functions": ([],),
    "return_token_ids": (False,),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1, 1.0),
    "cache_prompt": (True,),
    "previous_response_id": (),
    "include": ([], ["reasoning.encrypted_content"]),
    "top_logprobs": (0,),
}


def parse(kind: type[_T], data: bytes) -> _T:
    """Return the body of a request as ``kind``. Raises ApiError for what it may not hold."""
    try:
        # NaN and infinities are no JSON, and no answer could repeat them.
        value = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is no valid JSON: {error}.", code="invalid_json") from error
    return validated(kind, value)


def validated(kind: type[_T], value: Any) -> _T:
    """Return ``value``, a body that has been parsed, as ``kind``; see ``parse``."""
    try:
        body = kind.model_validate(value)
    except ValidationError as error:
        raise invalid(error) from error
    _check_extra(body, "", _NOTHING)
    return body


def _check_extra(body: BaseModel, where: str, nothing: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse fields that are not known, in ``body`` and in the objects that it holds."""
    extra = {} if isinstance(body, Shown) else body.model_extra or {}
    for name, value in extra.items():
        known = _INNER_BOOKKEEPING if where else _BOOKKEEPING
        if name in known or value is None or value in nothing.get(name, ()):
            continue
        full = f"{where}{name[:64]}"
        raise refused(
            full,
            f"{full} is not supported here, and leaving it out may change the answer. Remove it from the request.",
        )
    for name, value in body:
        for number, item in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(item, BaseModel):
                at = f"{where}{name}.{number}." if isinstance(value, list) else f"{where}{name}."
                _check_extra(item, at, {})


def first_given(**values: Any) -> tuple[str, Any]:
    """Return the name and value of what is not None. Raises ApiError if two contradict each other."""
    given = [(name, value) for name, value in values.items() if value is not None]
    if len({repr(value) for _, value in given}) > 1:
        raise ApiError(
            400, f"{' and '.join(name for name, _ in given)} differ; give one of them.", param=given[0][0]
        )
    return given[0] if given else (next(iter(values)), None)
