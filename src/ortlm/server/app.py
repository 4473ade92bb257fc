"""The HTTP application: which path does what."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import HTTPException
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

from ortlm._version import __version__
from ortlm.server import chat, completions, messages, openapi, responses, texts
from ortlm.server.errors import ApiError, as_api_error
from ortlm.server.messages import MessagesBody
from ortlm.server.metrics import Metrics
from ortlm.server.middleware import Guard, Keys, details
from ortlm.server.models import Models
from ortlm.server.page_routes import PageRoutes
from ortlm.server.responses import ResponsesBody
from ortlm.server.served import ServedModel
from ortlm.server.stream import failed, with_pings
from ortlm.server.wire import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    TokenizeBody,
    parse,
)
from ortlm.serving.request import Request as EngineRequest

_T = TypeVar("_T")
_B = TypeVar("_B", bound=Body)


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How a server treats requests.

    ``keys``: of which each must have one, if there are any. ``origins``: pages of these may call it ("*": all).
    ``body_bytes``: no body is larger; ``body_seconds``: no client waits longer with the next piece of it.
    ``page``: there is a chat page at ``/``.
    """

    keys: Sequence[str] = ()
    origins: Sequence[str] = ()
    body_bytes: int = 32 << 20
    body_seconds: float = 60.0
    page: bool = True


class Server:
    """The application over ``models``, of which ``metrics`` tells; ``app`` is what an ASGI server runs."""

    def __init__(
        self, models: Models, options: ServerOptions | None = None, metrics: Metrics | None = None
    ) -> None:
        options = options or ServerOptions()
        self.models, self.metrics = models, metrics or Metrics()
        self.metrics.watch(models.all)
        self.draining = False
        # How errors look at each path.
        self._shapes: dict[str, Callable[[ApiError], dict[str, Any]]] = {}
        self.api = FastAPI(
            title="ortlm", version=__version__, docs_url=None, redoc_url=None, openapi_url="/openapi.json"
        )
        self._add_routes()
        if options.page:
            PageRoutes(self.api, models)
        for kind in (HTTPException, StarletteHTTPException, Exception):
            self.api.add_exception_handler(kind, _failed)
        paths = [route.path for route in self.api.routes if "{" not in route.path]
        self.app = Guard(
            self.api,
            keys=Keys(options.keys),
            metrics=self.metrics,
            paths=paths,
            shapes=self._shapes,
            origins=options.origins,
            page=options.page,
            body_bytes=options.body_bytes,
            body_seconds=options.body_seconds,
        )

    def _add_routes(self) -> None:
        get, post = self._get, self._post
        get("/health", self.health)
        get("/metrics", self.show_metrics, media="text/plain")
        get("/v1/models", self.list_models)
        get("/v1/models/{name:path}", self.show_model)
        get("/tokenizer_info", self.tokenizer_info)
        post("/v1/chat/completions", ChatBody, self.chat)
        post("/v1/completions", CompletionBody, self.complete)
        post("/v1/responses", ResponsesBody, self.respond)
        post("/v1/messages", MessagesBody, self.message, shape=messages.error_body)
        post("/v1/embeddings", EmbeddingBody, self.embed)
        post("/tokenize", TokenizeBody, self.tokenize)
        post("/detokenize", DetokenizeBody, self.detokenize)
        self._route("/models/load", Body, self.load_model, name="load_model")
        self._route("/models/unload", Body, self.unload_model, name="unload_model")

    def _get(self, path: str, work: Callable[..., Any], *, media: str = "application/json") -> None:
        self.api.add_api_route(
            path,
            work,
            methods=["GET"],
            response_model=None,
            response_class=Response,
            responses=openapi.responses(media=media),
        )

    def _post(
        self,
        path: str,
        kind: type[_B],
        work: Callable[[Request, ServedModel, str | None, _B], Awaitable[Response]],
        *,
        shape: Callable[[ApiError], dict[str, Any]] = ApiError.body,
    ) -> None:
        """Let ``work`` answer at ``path``, with the model that the body names; ``shape`` makes JSON of errors."""

        async def with_model(request: Request, body: _B) -> Response:
            slot, adapter = self.models.get(body.model)
            details.get()["model"] = slot.name
            async with self.models.use(slot) as served:
                try:
                    return await work(request, served, adapter, body)
                except Exception as error:
                    raise as_api_error(error, retry_after=served.retry_after()) from error

        self._shapes[path] = shape
        self._route(path, kind, with_model, name=work.__name__)

    def _route(
        self, path: str, kind: type[_B], work: Callable[[Request, _B], Awaitable[Response]], *, name: str
    ) -> None:
        shape = self._shapes.get(path, ApiError.body)
        described = openapi.OPENAI_ERROR if shape is ApiError.body else openapi.ANTHROPIC_ERROR

        async def endpoint(request: Request) -> Response:
            try:
                self._check_ready()
                return await work(request, parse(kind, await request.body()))
            except ApiError as error:
                return JSONResponse(shape(error), status_code=error.status, headers=error.headers)
            except ClientDisconnect:
                # In the middle of its body: nobody is left to answer.
                return Response(status_code=499)

        schema = {
            "application/json": {
                "schema": kind.model_json_schema(ref_template="#/components/schemas/{model}")
            }
        }
        self.api.add_api_route(
            path,
            endpoint,
            methods=["POST"],
            response_model=None,
            response_class=Response,
            responses=openapi.responses(streams="stream" in kind.model_fields, error=described),
            name=name,
            openapi_extra={"requestBody": {"required": True, "content": _inlined(schema)}},
        )

    # --- what is there ------------------------------------------------------------------------------------

    async def health(self) -> Response:
        """Say whether requests are answered."""
        try:
            self._check_ready()
        except ApiError as error:
            return _json(error)
        return JSONResponse({"status": "ok"})

    async def show_metrics(self) -> Response:
        """Return the figures in Prometheus' text format."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def list_models(self) -> Response:
        """List what requests may name."""
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self.models.names]})

    async def show_model(self, name: str) -> Response:
        """Return one of them."""
        try:
            self.models.get(name)
        except ApiError as error:
            return _json(error)
        return JSONResponse(self._model(name))

    async def load_model(self, _: Request, body: Body) -> Response:
        """Load a model, and answer when that is done."""
        await self.models.load(self.models.get(body.model)[0])
        return JSONResponse({"success": True})

    async def unload_model(self, _: Request, body: Body) -> Response:
        """Let what a model runs end, unload it, and answer when that is done."""
        await self.models.unload(self.models.get(body.model)[0])
        return JSONResponse({"success": True})

    async def tokenizer_info(self, model: str | None = None) -> Response:
        """Return the special tokens and the chat template."""
        try:
            slot = self.models.all[0] if model is None else self.models.get(model)[0]
            async with self.models.use(slot) as served:
                return JSONResponse(texts.tokenizer_info(served))
        except ApiError as error:
            return _json(error)

    # --- what is asked ------------------------------------------------------------------------------------

    async def chat(
        self, request: Request, served: ServedModel, adapter: str | None, body: ChatBody
    ) -> Response:
        """Answer messages."""
        # A template or a grammar may take a while.
        made = await asyncio.to_thread(chat.submit, served, adapter, body)
        if body.stream:
            return _streamed(chat.events(made), made.requests)
        return await _whole(request, chat.answer(made), made.requests)

    async def complete(
        self, request: Request, served: ServedModel, adapter: str | None, body: CompletionBody
    ) -> Response:
        """Continue texts."""
        made = await asyncio.to_thread(completions.submit, served, adapter, body)
        if body.stream:
            return _streamed(completions.events(made), made.requests)
        return await _whole(request, completions.answer(made), made.requests)

    async def message(
        self, request: Request, served: ServedModel, adapter: str | None, body: MessagesBody
    ) -> Response:
        """Answer Anthropic's messages."""
        made = await asyncio.to_thread(messages.submit, served, adapter, body)
        if body.stream:
            return _streamed(messages.events(made), made.requests, last=messages.failed)
        return await _whole(request, messages.answer(made), made.requests)

    async def respond(
        self, request: Request, served: ServedModel, adapter: str | None, body: ResponsesBody
    ) -> Response:
        """Answer as OpenAI's newer API does."""
        made = await asyncio.to_thread(responses.submit, served, adapter, body)
        if body.stream:
            return _streamed(responses.events(made), made.chat.requests, last=partial(responses.failed, made))
        return await _whole(request, responses.answer(made), made.chat.requests)

    async def embed(
        self, request: Request, served: ServedModel, adapter: str | None, body: EmbeddingBody
    ) -> Response:
        """Embed texts."""
        if adapter is not None:
            raise ApiError(400, "embeddings are made without adapters; name the model alone.", param="model")
        return await _whole(request, texts.embeddings(served, body), ())

    async def tokenize(self, _: Request, served: ServedModel, __: str | None, body: TokenizeBody) -> Response:
        """Return the tokens of a text."""
        return JSONResponse(await asyncio.to_thread(texts.tokenize, served, body))

    async def detokenize(
        self, _: Request, served: ServedModel, __: str | None, body: DetokenizeBody
    ) -> Response:
        """Return the text of tokens."""
        return JSONResponse(await asyncio.to_thread(texts.detokenize, served, body))

    # --- inside -------------------------------------------------------------------------------------------

    def _check_ready(self) -> None:
        if self.draining:
            raise ApiError(
                503, "the server is shutting down.", "unavailable_error", code="shutting_down", retry_after=5
            )
        failed = self.models.failed_engine()
        if failed is not None:
            raise ApiError(
                503, f"the engine of {failed[0]} has failed.", "unavailable_error", code="engine_failed"
            )

    def _model(self, name: str) -> dict[str, Any]:
        slot, _ = self.models.get(name)
        status: dict[str, Any] = {"value": slot.state}
        if slot.failed:
            status["failed"] = True
        return {
            "id": name,
            "object": "model",
            "created": slot.created,
            "owned_by": "ortlm",
            "max_model_len": slot.context_tokens,
            "input_modalities": ["text", "image"] if slot.artifact.manifest.images is not None else ["text"],
            "status": status,
        }


def _json(error: ApiError) -> Response:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


async def _failed(_: Request, error: Exception) -> Response:
    """Answer what no endpoint did: unknown paths and methods, and faults."""
    if isinstance(error, StarletteHTTPException):
        said = {404: "there is no such path.", 405: "this path does not take that method."}
        answer = _json(ApiError(error.status_code, said.get(error.status_code, str(error.detail))))
        # Such as Allow, which says what a path takes.
        answer.headers.update(error.headers or {})
        return answer
    return _json(as_api_error(error))


def _note(requests: Sequence[EngineRequest], into: dict[str, Any]) -> None:
    """Add what the log says of ``requests``: figures, never text."""
    if not requests:
        return
    first = requests[0]
    into["prompt_tokens"] = len(first.ids)
    into["cached_tokens"] = first.cached_tokens
    into["new_tokens"] = sum(request.timings.new_tokens for request in requests)
    into["finish_reason"] = first.finish_reason
    into["queue_seconds"] = round(first.queue_seconds, 4)
    if first.first_token is not None:
        into["first_token_seconds"] = round(first.first_token - first.submitted, 4)


def _streamed(
    events: AsyncIterator[bytes],
    requests: Sequence[EngineRequest],
    *,
    last: Callable[[ApiError], bytes] = failed,
) -> Response:
    noted = details.get()

    async def send() -> AsyncIterator[bytes]:
        try:
            async for event in with_pings(events, last=last):
                yield event
        finally:
            for request in requests:
                if not request.done:
                    request.cancel()
            _note(requests, noted)

    # Proxies such as nginx would hold events back.
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(send(), media_type="text/event-stream", headers=headers)


async def _whole(
    request: Request, work: Coroutine[Any, Any, dict[str, Any]], requests: Sequence[EngineRequest]
) -> Response:
    """Answer with what ``work`` returns; a client that goes away ends it, which no framework does by itself."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            return Response(status_code=499)
        return JSONResponse(working.result())
    finally:
        for task in (working, leaving):
            task.cancel()
        for one in requests:
            if not one.done:
                one.cancel()
        _note(requests, details.get())


def _inlined(schema: Any) -> Any:
    """Return ``schema`` with what its references name in place of them: OpenAPI has them elsewhere."""
    found: dict[str, Any] = schema["application/json"]["schema"].pop("$defs", {})

    def put(value: Any) -> Any:
        if isinstance(value, dict):
            name = value.get("$ref", "").rpartition("/")[2] if isinstance(value.get("$ref"), str) else ""
            return put(found[name]) if name in found else {key: put(item) for key, item in value.items()}
        return [put(item) for item in value] if isinstance(value, list) else value

    made = put(schema)
    json.dumps(made)
    return made
