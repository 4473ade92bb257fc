# ruff: noqa: E501 - an answer is easier to read in one line
"""URLs of any form, and servers that answer with any bytes, end in an image or an error of ortlm, in time."""

from __future__ import annotations

import io
import time

import pytest
from hypothesis import strategies as st
from PIL import Image

from ortlm.runtime.multimodal.download import shown_url
from ortlm.runtime.multimodal.image_loading import open_image
from tests.fuzz.harness import damaged_bytes, fuzz
from tests.runtime.multimodal.hostile import hostile_server

with io.BytesIO() as file:
    Image.new("RGB", (9, 9)).save(file, "PNG")
    IMAGE = file.getvalue()
ANSWERS = [
    b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(IMAGE) + IMAGE,
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % len(IMAGE)
    + IMAGE
    + b"\r\n0\r\nA: b\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 200\r\n\r\n" + IMAGE,
    b"HTTP/1.1 302 Found\r\nLocation: http://user:pass@127.0.0.1:1/a?b#c\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 404 Not Found\r\n\r\n",
]
SECONDS = 0.3


@fuzz(
    st.tuples(
        st.one_of(*(damaged_bytes(answer) for answer in ANSWERS)),
        st.lists(st.integers(0, 300), max_size=4),
        st.sampled_from([0.0, 0.0, 0.01, 5.0]),
    )
)
def test_answers(example):
    raw, cuts, pause = example
    ends = sorted({min(cut, len(raw)) for cut in cuts} | {len(raw)})
    script = []
    for begin, end in zip([0, *ends], ends, strict=False):
        script += [raw[begin:end], pause]
    with pytest.MonkeyPatch.context() as patch, hostile_server(lambda path: script) as url:
        patch.setenv("no_proxy", "*")
        began = time.monotonic()
        try:
            open_image(f"{url}/x", timeout=SECONDS, most_bytes=100_000)
        finally:
            assert time.monotonic() - began < SECONDS + 5  # the rest for a busy machine


_PARTS = st.sampled_from(
    ["http", "https", "HTTP", "ftp", "file", "data", ":", "//", "/", "?", "#", "@", "[", "]", "::1", "127.0.0.1", "0", ":1",
     ":99999", ":x", "user:secret@", "é", "xn--a", "%", "%zz", "%00", "\x00", "\r\n", "\x1b", " ", "..", "\ud800", "a" * 300,
     "\u3002", "。", "ß", ";base64,", "image/png", "localhost", "=" * 5]
)  # fmt: skip


@fuzz(
    st.one_of(
        st.lists(_PARTS, max_size=9).map("".join),
        st.lists(_PARTS, max_size=7).map(lambda p: "http://127.0.0.1:1" + "".join(p)),
    )
)
def test_urls(url):
    assert "secret@" not in shown_url(url)
    # Nothing is connected to.
    open_image(url, timeout=SECONDS, allow=lambda address: False)
