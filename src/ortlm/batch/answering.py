"""A row to its result: the request is answered exactly as the server would answer it."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from ortlm._utils.checked_json import shown
from ortlm.batch.rows import MOST_LINE_BYTES, Row
from ortlm.errors import Error, nearest
from ortlm.server import chat, completions, texts
from ortlm.server.errors import ApiError, as_api_error, refused
from ortlm.server.models import Models
from ortlm.server.served import ServedModel
from ortlm.server.wire import Body, ChatBody, CompletionBody, EmbeddingBody, validated

_log = logging.getLogger(__name__)

_KINDS: dict[str, type[Body]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/embeddings": EmbeddingBody,
}
_FIELDS = ("custom_id", "method", "url", "body")
# Statuses of faults that may be gone at the next try.
_PASSING = (500, 503, 504)
_WAIT_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Result:
    """What became of row ``number``: ``value`` is its line of the results, but for its id.

    ``failed``: it belongs to the errors. ``tokens``: of prompt and answer. ``retries``: how often it was tried
    again.
    """

    number: int
    value: dict[str, Any]
    failed: bool
    prompt_tokens: int = 0
    new_tokens: int = 0
    retries: int = 0


@dataclass(frozen=True, slots=True)
class _NotARequest(Exception):
    """A row that asks for nothing that can be answered."""

    code: str
    message: str
    param: str | None = None


class Answerer:
    """Answers rows with ``models``; what fails for a reason not its own is tried ``retries`` times more."""

    def __init__(self, models: Models, *, retries: int = 2) -> None:
        self._models, self._retries = models, retries
        self._running = 0

    async def answer(self, row: Row) -> Result:
        """Return the result of ``row``. Raises Error if the engine has failed, and nobody can answer any more."""
        try:
            name, kind, body = _request(row)
        except _NotARequest as problem:
            return not_answered(row, problem.code, problem.message, param=problem.param)
        self._running += 1
        try:
            status, answer, retries = await self._answer(kind, body)
        finally:
            self._running -= 1
        usage: Mapping[str, int] = answer.get("usage") or {}
        return Result(
            row.number,
            {
                "custom_id": name,
                "response": {
                    "status_code": status,
                    "request_id": f"req_{secrets.token_hex(16)}",
                    "body": answer,
                },
                "error": None,
            },
            failed=status != 200,
            prompt_tokens=usage.get("prompt_tokens", 0),
            new_tokens=usage.get("completion_tokens", 0),
            retries=retries,
        )

    async def _answer(self, kind: type[Body], body: Any) -> tuple[int, dict[str, Any], int]:
        retries = 0
        while True:
            try:
                return 200, await self._whole(kind, body), retries
            except Exception as error:
                self._check_engines()
                said = as_api_error(error)
            if said.status == 429 and self._running > 1:
                # Others have the places; that is no fault, and they end.
                await asyncio.sleep(_WAIT_SECONDS)
                continue
            if said.status not in _PASSING or retries >= self._retries:
                return said.status, said.body(), retries
            retries += 1

    async def _whole(self, kind: type[Body], value: Any) -> dict[str, Any]:
        body = validated(kind, value)
        slot, adapter = self._models.get(body.model)
        if getattr(body, "stream", None):
            raise refused(
                "stream", "stream is not available in a batch, whose answers are whole. Leave it out."
            )
        async with self._models.use(slot) as served:
            if isinstance(body, ChatBody):
                return await chat.answer(await asyncio.to_thread(chat.submit, served, adapter, body))
            if isinstance(body, CompletionBody):
                return await completions.answer(
                    await asyncio.to_thread(completions.submit, served, adapter, body)
                )
            assert isinstance(body, EmbeddingBody)
            return await _embeddings(served, adapter, body)

    def _check_engines(self) -> None:
        failed = self._models.failed_engine()
        if failed is not None:
            name, error = failed
            raise Error(f"the engine of {name} has failed: {error}")


async def _embeddings(served: ServedModel, adapter: str | None, body: EmbeddingBody) -> dict[str, Any]:
    if adapter is not None:
        raise ApiError(400, "embeddings are made without adapters; name the model alone.", param="model")
    return await texts.embeddings(served, body)


def not_answered(row: Row, code: str, message: str, *, param: str | None = None, retries: int = 0) -> Result:
    """Return the result of a row that no model has seen, or that none could answer."""
    name = None if row.first_line is not None else _name(row)
    error = {"code": code, "message": message, "param": param, "line": row.line}
    return Result(
        row.number, {"custom_id": name, "response": None, "error": error}, failed=True, retries=retries
    )


def _request(row: Row) -> tuple[str, type[Body], Any]:
    """Return custom_id, kind and body of ``row``. Raises _NotARequest."""
    if row.text is None:
        raise _NotARequest(
            "line_too_long",
            f"line {row.line} has more than {MOST_LINE_BYTES:,} bytes, the most of a request.",
        )
    try:
        value = from_json(row.text, allow_inf_nan=False)
    except ValueError as error:
        raise _NotARequest("invalid_json", f"line {row.line} is no valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise _NotARequest("invalid_json", f"line {row.line} holds {shown(value)}, expected an object.")
    name = value.get("custom_id")
    if not isinstance(name, str) or not name:
        raise _NotARequest(
            "invalid_custom_id",
            f"line {row.line}: custom_id must be a text, found {shown(name)}.",
            "custom_id",
        )
    if row.first_line is not None:
        raise _NotARequest(
            "duplicate_custom_id",
            f"line {row.line}: custom_id {shown(name)} is that of line {row.first_line} already, which is "
            f"answered.",
            "custom_id",
        )
    for key in value:
        if key not in _FIELDS:
            said = f"line {row.line}: {shown(key)} is no field of a request; there is {', '.join(_FIELDS)}."
            raise _NotARequest("unknown_field", said + nearest(key, _FIELDS), key[:64])
    if value.get("method") != "POST":
        raise _NotARequest(
            "invalid_method",
            f"line {row.line}: method must be POST, found {shown(value.get('method'))}.",
            "method",
        )
    url = value.get("url")
    if not isinstance(url, str) or url not in _KINDS:
        raise _NotARequest(
            "unknown_url", f"line {row.line}: url is {shown(url)}; there is {', '.join(_KINDS)}.", "url"
        )
    if not isinstance(value.get("body"), dict):
        raise _NotARequest(
            "invalid_body",
            f"line {row.line}: body must be an object, found {shown(value.get('body'))}.",
            "body",
        )
    return name, _KINDS[url], value["body"]


def _name(row: Row) -> str | None:
    try:
        value = None if row.text is None else from_json(row.text, allow_inf_nan=False)
    except ValueError:
        return None
    name = value.get("custom_id") if isinstance(value, dict) else None
    return name if isinstance(name, str) and name else None


def as_line(result: Result, run: str) -> bytes:
    """Return ``result`` as a line of the results of ``run``, whose id names its row."""
    value = {"id": f"batch_req_{run}_{result.number}", **result.value}
    return json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"
