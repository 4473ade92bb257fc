"""The chat page at ``/``: its files, and what it asks of the server besides the API."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

from ortlm.runtime.prompts import Prompts
from ortlm.server.errors import ApiError, as_api_error, refused
from ortlm.server.models import Models
from ortlm.server.page.about import facts, quality
from ortlm.server.page.files import INDEX, read_files
from ortlm.server.page.markdown import MOST_CHARACTERS, render
from ortlm.server.wire import Body, parse


class RenderBody(Body):
    """``POST /page/render``: Markdown."""

    text: str


class PageRoutes:
    """The page over ``models``: adds its paths to ``api``, none of which is in the API's description."""

    def __init__(self, api: FastAPI, models: Models) -> None:
        self._models, self._files = models, read_files()
        # Of each model: how often it had been loaded, and what was found then.
        self._facts: dict[str, tuple[int, dict[str, Any]]] = {}
        # One at a time, and those that wait take no thread.
        self._rendering = asyncio.Lock()
        for path, methods, work in (
            ("/", ["GET", "HEAD"], self.index),
            ("/page/static/{name}", ["GET", "HEAD"], self.file),
            ("/page/models", ["GET"], self.list_models),
            ("/page/quality", ["GET"], self.show_quality),
            ("/page/render", ["POST"], self.render),
        ):
            api.add_api_route(
                path, _answered(work), methods=methods, response_model=None, include_in_schema=False
            )

    async def index(self, request: Request) -> Response:
        """Return the page."""
        return self._send(INDEX, request)

    async def file(self, request: Request) -> Response:
        """Return one of its files."""
        return self._send(request.path_params["name"], request)

    async def list_models(self, _: Request) -> Response:
        """List what can be asked, with what the page has to know of each."""
        found = await asyncio.to_thread(lambda: [self._about(name) for name in self._models.names])
        return JSONResponse({"models": found})

    async def show_quality(self, request: Request) -> Response:
        """Return what was measured of the model that the query names."""
        slot, _ = self._models.get(request.query_params.get("model"))
        return JSONResponse(await asyncio.to_thread(quality, slot.artifact))

    async def render(self, request: Request) -> Response:
        """Return Markdown as HTML."""
        body = parse(RenderBody, await request.body())
        if len(body.text) > MOST_CHARACTERS:
            raise refused(
                "text", f"text has {len(body.text):,} characters; at most {MOST_CHARACTERS:,} are rendered."
            )
        async with self._rendering:
            return JSONResponse({"html": await asyncio.to_thread(render, body.text)})

    def _send(self, name: str, request: Request) -> Response:
        file = self._files.get(name)
        if file is None:
            raise ApiError(404, "there is no such path.")
        if file.is_known(request.headers.get("if-none-match", "")):
            return Response(status_code=304, headers=dict(file.headers))
        return Response(file.body, headers=dict(file.headers))

    def _about(self, name: str) -> dict[str, Any]:
        slot, adapter = self._models.get(name)
        # A model that is not loaded stays so; its tokenizer is read once.
        loads, found = self._facts.get(slot.name, (-1, {}))
        if loads != slot.loads:
            served, artifact = slot.served, slot.artifact
            reader = Prompts(artifact.tokenizer_path, None) if served is None else served.lm
            loads, found = slot.loads, facts(artifact, reader)
            self._facts[slot.name] = loads, found
        return {"name": name, "adapter": adapter, "context_tokens": slot.context_tokens, **found}


def _answered(work: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            return await work(request)
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception as error:
            told = as_api_error(error)
            return JSONResponse(told.body(), status_code=told.status, headers=told.headers)

    return endpoint
