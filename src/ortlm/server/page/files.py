"""The files of the page, and the headers that they are sent with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

INDEX = "index.html"
_TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
# The page loads its own files and talks to its own server, and nothing else.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # HTML becomes part of the page in one place: render.js.
        "require-trusted-types-for 'script'",
        "trusted-types ortlm",
    )
)
_HEADERS = {
    # Asked for each time, and answered with 304: after an update no old file goes with a new one.
    "Cache-Control": "no-cache",
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
}


@dataclass(frozen=True, slots=True)
class File:
    """A file of the page: its bytes, and the headers that go with them."""

    body: bytes
    headers: Mapping[str, str]

    def is_known(self, if_none_match: str) -> bool:
        """Return whether a browser that sends this header has the file already."""
        known = {tag.strip().removeprefix("W/") for tag in if_none_match.split(",")}
        return self.headers["ETag"] in known or "*" in known


def read_files() -> dict[str, File]:
    """Return the page's files by name; ``index.html`` is the page itself."""
    found = {}
    for entry in files(__package__).joinpath("static").iterdir():
        kind = _TYPES.get(entry.name.rpartition(".")[2])
        if kind is not None:
            body = entry.read_bytes()
            tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
            found[entry.name] = File(body, {**_HEADERS, "Content-Type": kind, "ETag": tag})
    return found
