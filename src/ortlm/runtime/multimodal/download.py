"""Fetches a file from a URL: one deadline for all of it, a limit of size, and addresses that may be refused.

httpcore speaks HTTP; the network below it is ours. Its timeouts are for single reads, which a server that sends a
byte a second never misses. So every read, write and connection is given the time that is left of the whole.
"""

from __future__ import annotations

import ipaddress
import queue
import re
import socket
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Iterable
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

import httpcore2 as httpcore

from ortlm._utils.formatting import printable, readable_bytes
from ortlm._version import __version__
from ortlm.errors import BadImage
from ortlm.runtime.multimodal.addresses import Address, Allow, public_address

_MOST_REDIRECTS = 10
_MOST_URL = 1 << 16
_REDIRECTS = (301, 302, 303, 307, 308)
_PORTS = {"http": 80, "https": 443}
# Headers, and what marks the chunks of a body.
_MOST_EXTRA_BYTES = 1 << 20
_SECRET = re.compile(r"[^/]*@")
_SAFE = "%/:=&?~#+!$,;'@()*[]"


class _Refused(Exception):
    """A reason why a URL is not fetched, for the user."""


class _Late(Exception):
    """The time is over."""


def shown_url(url: str) -> str:
    """Return ``url`` as messages show it: without passwords, and without its query, where tokens are."""
    head, mark, _ = url.partition("?")
    # In every part, because a mistyped address has its password anywhere.
    bare = _SECRET.sub("", head.partition("#")[0])
    text = printable(bare).replace("\n", " ")
    if len(text) > 120:
        text = f"{text[:100]}... ({len(url)} characters)"
    return f"{text}?..." if mark else text


def download(url: str, *, most_bytes: int, timeout: float, name: str, allow: Allow | None = None) -> bytes:
    """Return what the server sends for ``url``, of at most ``most_bytes``, within ``timeout`` seconds.

    ``allow`` says of every address that would be connected to, redirects included, whether it may be. Without it
    every address may be, but a redirect does not lead from a public one to one that is not. The proxies that the
    environment names are used only without ``allow``, since a proxy chooses addresses by itself. Raises BadImage,
    which calls the URL ``name``.
    """
    fetch = _Fetch(time.monotonic() + timeout, most_bytes, allow)
    try:
        return fetch.follow(url)
    except (_Late, httpcore.TimeoutException, TimeoutError) as error:
        raise BadImage(
            f"{name} did not arrive within {timeout:g} s; try again, allow more time, or download it first."
        ) from error
    except _Refused as error:
        raise BadImage(f"{name} {error}") from error
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.ProxyError, OSError) as error:
        if fetch.late():
            raise BadImage(
                f"{name} did not arrive within {timeout:g} s; try again or allow more time."
            ) from error
        raise BadImage(
            f"{name} cannot be fetched: {_line(error)}. Check the address and the network."
        ) from error
    # What strangers write into addresses and headers makes parsers raise this.
    except (ValueError, httpcore.UnsupportedProtocol) as error:
        raise BadImage(f"{name} cannot be fetched: {_line(error)}. Check the address.") from error


class _Fetch:
    """One download: what is left of its time, and where it has been."""

    def __init__(self, end: float, most_bytes: int, allow: Allow | None) -> None:
        self._end = end
        self._most = most_bytes
        self._allow = allow
        self._public = False
        self._received = 0

    def late(self) -> bool:
        """Return whether the time is over."""
        return time.monotonic() >= self._end

    def left(self) -> float:
        """Return the seconds that are left. Raises _Late if there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise _Late
        return left

    def count(self, received: int) -> None:
        """Count bytes from the network, whatever they are for."""
        self._received += received
        if self._received > 2 * self._most + _MOST_EXTRA_BYTES:
            raise _Refused(self._too_large())

    def permit(self, address: Address) -> bool:
        """Return whether ``address`` may be connected to."""
        if self._allow is not None:
            return bool(self._allow(address))
        return not self._public or public_address(address)

    def connected(self, address: Address) -> None:
        """Remember that ``address`` was connected to."""
        self._public = self._public or public_address(address)

    def follow(self, url: str) -> bytes:
        """Return the body of what ``url`` leads to."""
        credentials: tuple[str, str] | None = None
        for _ in range(_MOST_REDIRECTS + 1):
            if len(url) > _MOST_URL:
                raise _Refused(f"has an address of {len(url)} characters; at most {_MOST_URL} are taken.")
            parts = urlsplit(url)
            if parts.scheme not in _PORTS:
                raise _Refused(
                    f"leads to {shown_url(url)!r}, which is not fetched: images come from http:// and "
                    "https:// only."
                )
            origin = f"{parts.scheme}://{parts.hostname}:{parts.port or _PORTS[parts.scheme]}"
            if parts.username is not None:
                secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
                credentials = origin, b64encode(secret.encode()).decode()
            answer = self._get(parts, credentials[1] if credentials and credentials[0] == origin else None)
            if isinstance(answer, bytes):
                return answer
            url = urljoin(url, answer)
        raise _Refused(f"is redirected more than {_MOST_REDIRECTS} times. Check the address.")

    def _get(self, parts: SplitResult, secret: str | None) -> bytes | str:
        """Return the body of the answer, or where it says to look."""
        host, port = parts.hostname, parts.port
        if not host:
            raise _Refused("cannot be fetched: it names no server. Check the address.")
        # Names of other scripts, as the system's resolver wants them.
        ascii_host = host if host.isascii() else host.encode("idna").decode()
        shown = f"[{ascii_host}]" if ":" in ascii_host else ascii_host
        headers: dict[bytes | str, bytes | str] = {
            "Host": shown if port in (None, _PORTS[parts.scheme]) else f"{shown}:{port}",
            "User-Agent": f"ortlm/{__version__}",
            "Accept": "image/*,*/*;q=0.5",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        if secret is not None:
            headers["Authorization"] = f"Basic {secret}"
        target = quote(parts.path or "/", safe=_SAFE) + (
            f"?{quote(parts.query, safe=_SAFE)}" if parts.query else ""
        )
        address = httpcore.URL(
            scheme=parts.scheme.encode(), host=ascii_host.encode(), port=port, target=target.encode()
        )
        seconds = self.left()
        timeouts = dict.fromkeys(("connect", "read", "write", "pool"), seconds)
        with (
            self._pool(parts.scheme, ascii_host) as pool,
            pool.stream("GET", address, headers=headers, extensions={"timeout": timeouts}) as answer,
        ):
            given = {name.lower(): value for name, value in answer.headers}
            if answer.status in _REDIRECTS and b"location" in given:
                return given[b"location"].decode("latin-1")
            if not 200 <= answer.status < 300:
                reason = _line(answer.extensions.get("reason_phrase", b"").decode("latin-1"))
                raise _Refused(
                    f"cannot be fetched: the server answered {answer.status} ({reason or 'no reason'}). Check the "
                    "address."
                )
            stated = given.get(b"content-length", b"")
            length = int(stated) if stated.isdigit() and len(stated) < 19 else None
            if length is not None and length > self._most:
                raise _Refused(self._too_large())
            return self._body(answer, length)

    def _body(self, answer: httpcore.Response, length: int | None) -> bytes:
        data = bytearray()
        try:
            for piece in answer.iter_stream():
                data += piece
                if len(data) > self._most:
                    raise _Refused(self._too_large())
                self.left()
        except (httpcore.RemoteProtocolError, httpcore.ReadError) as error:
            of = f" of {readable_bytes(length)}" if length is not None else ""
            raise _Refused(f"broke off after {readable_bytes(len(data))}{of}; try again.") from error
        return bytes(data)

    def _too_large(self) -> str:
        return (
            f"has more than the {readable_bytes(self._most)} that are allowed (most_bytes={self._most}); "
            "make the image smaller or allow more."
        )

    def _pool(self, scheme: str, host: str) -> httpcore.ConnectionPool:
        proxy = _proxy(scheme, host) if self._allow is None else None
        return httpcore.ConnectionPool(proxy=proxy, network_backend=_Network(self, checks=proxy is None))


class _Network(httpcore.NetworkBackend):
    """Connects to addresses that were checked, within the time of ``fetch``."""

    def __init__(self, fetch: _Fetch, *, checks: bool) -> None:
        self._fetch, self._checks = fetch, checks
        self._plain = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        addresses = _resolve(host, port, self._fetch.left())
        if not addresses:
            raise _Refused("cannot be fetched: its server has no address. Check the address.")
        allowed = [a for a in addresses if self._fetch.permit(_parsed(a))] if self._checks else addresses
        if not allowed:
            raise _Refused(
                f"is not fetched: the address {', '.join(addresses[:3])} is not allowed here. Give the image "
                "itself, or an address on the public internet."
            )
        for number, address in enumerate(allowed):
            try:
                # Not by name: a name may lead elsewhere the next time that it is asked for.
                stream = self._plain.connect_tcp(
                    address,
                    port,
                    timeout=self._fetch.left() / (len(allowed) - number),
                    local_address=local_address,
                    socket_options=socket_options,
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if number == len(allowed) - 1:
                    raise
            else:
                if self._checks:
                    self._fetch.connected(_parsed(address))
                return _Stream(self._fetch, stream)
        raise AssertionError("there is at least one address")


class _Stream(httpcore.NetworkStream):
    """A connection, each of whose operations has no more time than is left of all."""

    def __init__(self, fetch: _Fetch, inner: httpcore.NetworkStream) -> None:
        self._fetch, self._inner = fetch, inner

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data: bytes = self._inner.read(max_bytes, timeout=self._fetch.left())
        self._fetch.count(len(data))
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, timeout=self._fetch.left())

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        inner = self._inner.start_tls(ssl_context, server_hostname, timeout=self._fetch.left())
        return _Stream(self._fetch, inner)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


def _resolve(host: str, port: int, seconds: float) -> list[str]:
    """Return the addresses of ``host``. Raises _Late after ``seconds``, and what the system raises."""
    answers: queue.SimpleQueue[list[str] | OSError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            records = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        # Names that cannot be encoded are refused with other errors than unknown ones.
        except Exception as error:
            answers.put(error if isinstance(error, OSError) else OSError("its server has no valid name"))
        else:
            answers.put(list(dict.fromkeys(str(item[4][0]) for item in records)))

    # The system's resolver has no limit of time, so it is left behind if it takes longer.
    threading.Thread(target=ask, daemon=True, name="ortlm-resolve").start()
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty:
        raise _Late from None
    if isinstance(answer, OSError):
        raise answer
    return answer


def _parsed(address: str) -> Address:
    # Without the network card that a link-local address names.
    return ipaddress.ip_address(address.partition("%")[0])


def _proxy(scheme: str, host: str) -> httpcore.Proxy | None:
    """Return the proxy that the environment, or the system, names for ``host``."""
    from urllib.request import getproxies, proxy_bypass

    url = getproxies().get(scheme)
    if not url or proxy_bypass(host):
        return None
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in _PORTS or not parts.hostname:
        raise _Refused(
            f"cannot be fetched: the proxy {shown_url(url)!r} is of a kind that is not supported; use http://."
        )
    auth = (unquote(parts.username), unquote(parts.password or "")) if parts.username is not None else None
    place = httpcore.URL(
        scheme=parts.scheme.encode(), host=parts.hostname.encode(), port=parts.port, target=b"/"
    )
    return httpcore.Proxy(place, auth=auth)


def _line(said: object) -> str:
    text = " ".join(printable(str(said) or type(said).__name__).split())
    return text[:200].rstrip(". ")
