"""Around every request: its id, the size of its body, keys, origins, and a line in the log."""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import hmac
import ipaddress
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping, Sequence
from typing import Any

from ortlm.server.errors import ApiError
from ortlm.server.metrics import Metrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Shape = Callable[[ApiError], dict[str, Any]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger("ortlm.server.requests")
# What a handler adds to the line of its request.
details: contextvars.ContextVar[dict[str, Any]] = contextvars.ContextVar("details")
_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
# Files that hold nothing, and ask for the key.
_OPEN = re.compile(r"/|/page/static/[^/]*")
_HEADERS = re.compile(r"[\w-]+( *, *[\w-]+)*", re.ASCII)


class Keys:
    """The keys of which a request must have one; compared in constant time, and kept as hashes only."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.strip().encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def allow(self, headers: dict[str, str]) -> bool:
        """Return whether ``headers`` have one of the keys, as OpenAI's or as Anthropic's clients send it."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        # As the bytes that came.
        digest = hashlib.sha256(given.strip().encode("latin-1")).digest()
        # All of them, so that time does not say which one was nearest.
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


class Guard:
    """Wraps ``app``: refuses what it may not see, counts, and logs; never the text of a request or an answer.

    ``shapes``: how errors look at paths where it is not as OpenAI's.
    """

    def __init__(
        self,
        app: App,
        *,
        keys: Keys,
        metrics: Metrics,
        paths: Collection[str],
        shapes: Mapping[str, Shape] | None = None,
        origins: Sequence[str] = (),
        page: bool = False,
        body_bytes: int,
        body_seconds: float = 60.0,
    ) -> None:
        # A page of ours calls from our own origin; without one, nothing honest does.
        self._page = page
        self._app, self._keys, self._metrics, self._seconds = app, keys, metrics, body_seconds
        self._shapes = shapes or {}
        self._paths, self._origins, self._most = frozenset(paths), frozenset(origins), body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        began, status, path = time.perf_counter(), 0, str(scope["path"])
        asked = headers.get("x-request-id", "")
        request_id = asked if _ID.fullmatch(asked) else secrets.token_hex(16)
        noted: dict[str, Any] = {}
        details.set(noted)
        origin = headers.get("origin", "")
        allowed = bool(origin) and (origin in self._origins or "*" in self._origins)

        async def reply(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                # Under the name that OpenAI's clients look for, and under that of Anthropic's.
                more = [(name, request_id.encode()) for name in (b"x-request-id", b"request-id")]
                more.append((b"x-content-type-options", b"nosniff"))
                if allowed:
                    more += [(b"access-control-allow-origin", origin.encode()), (b"vary", b"Origin")]
                message["headers"] = [*message.get("headers", ()), *more]
            await send(message)

        try:
            if allowed and scope["method"] == "OPTIONS":
                await _preflight(reply, headers.get("access-control-request-headers", ""))
            else:
                self._check_source("" if allowed else origin, headers.get("host", ""), path)
                self._check(path, headers)
                await self._app(scope, self._limited(receive), reply)
        except ApiError as error:
            if not status:
                await answer(error, reply, self._shapes.get(path, ApiError.body))
        finally:
            known = path if path in self._paths else "other"
            self._metrics.answered(known, status)
            line = {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "request_id": request_id,
                "method": scope["method"],
                "path": known,
                "status": status,
                "seconds": round(time.perf_counter() - began, 4),
                **noted,
            }
            # The page renders what comes several times a second, which says nothing to whoever runs the server.
            quiet = path.startswith("/page/") and 0 < status < 400
            log.log(logging.DEBUG if quiet else logging.INFO, "%s", json.dumps(line))

    def _check_source(self, origin: str, host: str, path: str) -> None:
        """Refuse requests of pages that are not of this server, and the page under names that are not its own."""
        own = self._page and self._is_own(host)
        # A proxy in front may speak TLS.
        if origin and not (own and origin in (f"http://{host}", f"https://{host}")):
            raise _strange_origin(origin)
        if self._page and not own and (path == "/" or path.startswith("/page/")):
            raise _strange_host(host)

    def _check(self, path: str, headers: dict[str, str]) -> None:
        is_open = path == "/health" or _OPEN.fullmatch(path) is not None
        if self._keys and not is_open and not self._keys.allow(headers):
            raise ApiError(
                401,
                "the API key is missing or wrong. Send it as Authorization: Bearer KEY, or as x-api-key: KEY.",
                "authentication_error",
                code="invalid_api_key",
            )
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self._most:
            raise self._too_large()

    def _is_own(self, host: str) -> bool:
        """Return whether ``host`` names this server for sure: anybody can let a name of theirs lead here."""
        name = host.rpartition(":")[0] if re.search(r":\d*$", host) else host
        if (
            name == "localhost"
            or "*" in self._origins
            or {f"http://{host}", f"https://{host}"} & self._origins
        ):
            return True
        try:
            ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
        except ValueError:
            return False
        return True

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {self._most:,} bytes, which is the limit here.",
            code="body_too_large",
        )

    def _limited(self, receive: Receive) -> Receive:
        taken, whole = 0, False

        async def limited() -> MutableMapping[str, Any]:
            nonlocal taken, whole
            if whole:
                # Whoever asks for more waits for the client to leave.
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self._seconds)
            except asyncio.TimeoutError as error:
                raise ApiError(
                    408, f"nothing more of the body came for {self._seconds:g} seconds.", code="body_too_slow"
                ) from error
            whole = not message.get("more_body", False)
            taken += len(message.get("body", b""))
            if taken > self._most:
                raise self._too_large()
            return message

        return limited


async def answer(error: ApiError, send: Send, shape: Shape = ApiError.body) -> None:
    """Send ``error`` as the JSON that ``shape`` makes of it."""
    body = json.dumps(shape(error), ensure_ascii=False).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *((name.lower().encode(), value.encode()) for name, value in error.headers.items()),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _strange_host(host: str) -> ApiError:
    # A page that was loaded under a name of somebody else's could read whatever it asks for.
    return ApiError(
        403,
        f"the page is not shown at {host[:200]!r}. Open it by the server's address, or start the server with "
        "--cors-origin and the origin that browsers show.",
        "permission_error",
        code="host_not_allowed",
    )


def _strange_origin(origin: str) -> ApiError:
    # Browsers send some requests before they ask whether they may; the page cannot read the answer to those, but
    # the work would be done. Behind a name that was rebound to this machine it could even read it.
    return ApiError(
        403,
        f"pages of {origin[:200]} may not call this server. Start it with --cors-origin and their origin.",
        "permission_error",
        code="origin_not_allowed",
    )


async def _preflight(send: Send, wanted: str) -> None:
    # The official clients have headers of their own, of which there are more with each version.
    usual = "authorization, content-type, x-api-key, x-request-id"
    headers = [
        (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
        (b"access-control-allow-headers", (wanted if _HEADERS.fullmatch(wanted) else usual).encode()),
        (b"access-control-max-age", b"600"),
        (b"content-length", b"0"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
