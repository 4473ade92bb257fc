# ruff: noqa: E501 - an answer is easier to read in one line
"""A download ends by its deadline, within its size, and connects to no address that is refused."""

from __future__ import annotations

import io
import itertools
import socket
import threading
import time
from ipaddress import ip_address

import pytest
from PIL import Image

from ortlm.errors import BadImage, BadOption
from ortlm.runtime.multimodal.addresses import public_address
from ortlm.runtime.multimodal.download import download, shown_url
from ortlm.runtime.multimodal.image_loading import open_image
from tests.runtime.multimodal.hostile import drip, hostile_server


def image() -> bytes:
    with io.BytesIO() as file:
        Image.new("RGB", (4, 3), (200, 10, 10)).save(file, "PNG")
        return file.getvalue()


IMAGE = image()
OK = b"HTTP/1.1 200 OK\r\n"
WHOLE = [OK + b"Content-Length: %d\r\n\r\n" % len(IMAGE) + IMAGE]
FOREVER = 1000
SLOW = {
    "nothing": [1e9],
    "status line": drip(b"HTTP/1.1 200 " + b"O" * FOREVER),
    "header bytes": [OK, *drip(b"X-A: " + b"a" * FOREVER)],
    "header lines": [OK, *(piece for i in range(FOREVER) for piece in (b"X-%d: a\r\n" % i, 0.1))],
    "body": [OK + b"\r\n", *drip(b"x" * FOREVER)],
    "sized body": [OK + b"Content-Length: 5000\r\n\r\n", *drip(b"x" * FOREVER)],
    "chunk sizes": [OK + b"Transfer-Encoding: chunked\r\n\r\n", *drip(b"0" * FOREVER)],
    "chunks": [OK + b"Transfer-Encoding: chunked\r\n\r\n", *drip(b"1\r\nx\r\n" * FOREVER)],
    "trailers": [OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", *drip(b"A: " + b"b" * FOREVER)],
    "slow informational": [
        piece for _ in range(FOREVER) for piece in (b"HTTP/1.1 100 Continue\r\n\r\n", 0.1)
    ],
    "fast informational": itertools.repeat(b"HTTP/1.1 100 Continue\r\n\r\n" * 100, 10**6),
    "redirects": [0.2, b"HTTP/1.1 302 Found\r\nLocation: /redirects\r\nContent-Length: 0\r\n\r\n"],
    "redirect that drips": [b"HTTP/1.1 302 Found\r\nLocation: /", *drip(b"a" * FOREVER)],
    "error that drips": [b"HTTP/1.1 500 ", *drip(b"a" * FOREVER)],
}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.mark.parametrize("name", SLOW)
def test_one_deadline_for_all_of_it(name):
    with hostile_server(lambda path: SLOW[name]) as url:
        began = time.monotonic()
        with pytest.raises(BadImage, match=r"did not arrive within 0.5 s|more than the 1.0 MB"):
            open_image(f"{url}/x", timeout=0.5, most_bytes=1_000_000)
        assert time.monotonic() - began < 0.5 + 1 + 3  # the last for a busy machine


def test_one_deadline_for_names_that_nobody_answers(monkeypatch):
    gone = threading.Event()

    def resolve(*_, **__):
        gone.wait(30)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    began = time.monotonic()
    with pytest.raises(BadImage, match=r"did not arrive within 0.5 s"):
        open_image("http://example.test/x.png", timeout=0.5)
    assert time.monotonic() - began < 4
    gone.set()


FAULTY = {
    "no http": ([b"SSH-2.0-OpenSSH\r\n"], "cannot be fetched"),
    "hung up": ([], "cannot be fetched"),
    "half a header": ([OK + b"Content-Le"], "cannot be fetched"),
    "broken off": ([OK + b"Content-Length: 500\r\n\r\nabc"], "broke off after 3 B of 500 B"),
    "broken chunk": ([OK + b"Transfer-Encoding: chunked\r\n\r\n9\r\nabc"], "broke off after 3 B; try again"),
    "bad chunk": ([OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc"], "broke off"),
    "bad length": ([OK + b"Content-Length: -5\r\n\r\nabc"], "cannot be fetched"),
    "two lengths": ([OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabc"], "cannot be fetched"),
    "huge length": ([OK + b"Content-Length: 99999999999999999\r\n\r\n"], "more than the 1.0 MB"),
    "endless": (itertools.chain([OK + b"\r\n"], itertools.repeat(bytes(1 << 16), 1000)), "more than the 1.0 MB"),
    "endless header": (itertools.chain([OK + b"X: "], itertools.repeat(b"a" * (1 << 16), 1000)), "cannot be fetched"),
    "status": ([b"HTTP/1.1 418 \x1b[2J\r\nContent-Length: 0\r\n\r\n"], "the server answered 418|cannot be fetched"),
    "empty": ([OK + b"Content-Length: 0\r\n\r\n"], "is empty"),
    "page": ([OK + b"Content-Type: image/png\r\nContent-Length: 6\r\n\r\n<html>"], "no image that can be read"),
    "round": ([b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n"], "redirected more than 10 times"),
    "other scheme": ([b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n"], "http:// and https:// only"),
    "data scheme": ([b"HTTP/1.1 302 Found\r\nLocation: data:image/png;base64,AAAA\r\n\r\n"], "http:// and https:// only"),
    "odd place": ([b"HTTP/1.1 302 Found\r\nLocation: http://[::1/x\r\n\r\n"], "cannot be fetched"),
    "no place": ([b"HTTP/1.1 302 Found\r\nLocation: http:///x\r\n\r\n"], "redirected more than 10 times"),
    "long place": ([b"HTTP/1.1 302 Found\r\nLocation: /" + b"a" * 70_000 + b"\r\n\r\n"], "at most 65536"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTY)
def test_faulty_servers(name):
    script, message = FAULTY[name]
    with hostile_server(lambda path: script) as url, pytest.raises(BadImage, match=message) as told:
        open_image(f"{url}/x", timeout=20, most_bytes=1_000_000)
    assert str(told.value).isprintable()


def test_redirects_lead_on():
    def answer(path: str):
        if path == "/last?a=b%20c":
            return WHOLE
        return [b"HTTP/1.1 308 Found\r\nLocation: last?a=b%20c\r\nContent-Length: 0\r\n\r\n"]

    with hostile_server(answer) as url:
        assert open_image(f"{url}/first").size == (4, 3)


def test_passwords_and_tokens_are_not_shown():
    for url in (
        "http://user:secret@127.0.0.1:1/a.png?token=secret#secret",
        "http://secret@127.0.0.1:1/a.png?secret",
        "ftp://user:secret@host/a.png?secret",
        "http://user:secret@[::1/a.png?secret",
        "http://user:secret@127.0.0.1:x/a.png?secret",
        "http://a:secret@b@127.0.0.1:1/a.png",
        "http:/user:secret@127.0.0.1/a.png",
        "http:user:secret@127.0.0.1/a.png",
    ):
        with pytest.raises(BadImage) as told:
            open_image(url, timeout=2)
        assert "secret" not in str(told.value)
        assert "a.png" in str(told.value)
    assert shown_url("http://h/\x1b[2J\na") == "http://h/\\u001b[2J a"
    assert len(shown_url("http://h/" + "a" * 9999)) < 150


def test_passwords_go_to_their_server_only():
    seen = []

    def elsewhere(path: str):
        return WHOLE

    with hostile_server(elsewhere) as other, Recorder(seen, f"{other}/x") as url:
        assert open_image(url.replace("http://", "http://user:pass%20word@")).size == (4, 3)
    assert "Authorization: Basic dXNlcjpwYXNzIHdvcmQ=" in seen[0]
    assert "user" not in seen[0]


class Recorder:
    """A server that writes down what it is asked, and sends on."""

    def __init__(self, seen: list[str], to: str) -> None:
        self.seen, self.to = seen, to

    def __enter__(self) -> str:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}/start"

    def serve(self) -> None:
        connection, _ = self.listener.accept()
        with connection:
            self.seen.append(connection.recv(1 << 16).decode())
            connection.sendall(
                f"HTTP/1.1 302 Found\r\nLocation: {self.to}\r\nContent-Length: 0\r\n\r\n".encode()
            )

    def __exit__(self, *_: object) -> None:
        self.thread.join(5)
        self.listener.close()


# --- addresses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    ["0.0.0.0", "10.1.2.3", "100.64.0.1", "127.0.0.1", "127.255.255.254", "169.254.169.254", "172.31.0.1",
     "192.0.0.170", "192.168.1.1", "198.18.0.1", "203.0.113.5", "224.0.0.1", "240.0.0.1", "255.255.255.255",
     "168.63.129.16", "::", "::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "64:ff9b::7f00:1",
     "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "100::1", "2001::1", "2001:db8::1", "2002:7f00:1::", "fc00::1",
     "fd00:ec2::254", "fe80::1", "fec0::1", "ff02::1", "5f00::1", "3fff::1"],
)  # fmt: skip
def test_addresses_that_are_not_public(address):
    assert not public_address(ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        "8.8.8.8",
        "1.1.1.1",
        "172.32.0.1",
        "100.128.0.1",
        "::ffff:8.8.8.8",
        "64:ff9b::808:808",
        "2606:4700:4700::1111",
    ],
)
def test_addresses_that_are_public(address):
    assert public_address(ip_address(address))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "0177.0.0.1", "[::ffff:127.0.0.1]",
                                  "[::1]", "0", "127.1"])  # fmt: skip
def test_a_server_does_not_reach_itself(host):
    with hostile_server(lambda path: WHOLE) as url:
        port = url.rpartition(":")[2]
        with pytest.raises(BadImage, match=r"address .* is not allowed here|cannot be fetched"):
            open_image(f"http://{host}:{port}/x", allow=public_address, timeout=5)
        assert open_image(f"{url}/x").size == (4, 3)
        assert open_image(f"{url}/x", allow=lambda address: str(address) == "127.0.0.1").size == (4, 3)


def resolving(monkeypatch, *answers: list[str]) -> list[str]:
    """Let names lead to ``answers``, one for each question, and every public address to this machine."""
    asked: list[str] = []
    left = iter(answers)
    real = socket.getaddrinfo

    def resolve(host, port, *args, **options):
        if host.replace(".", "").isdigit():
            return real(host, port, *args, **options)
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in next(left)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return asked


def test_what_was_checked_is_what_is_connected_to(monkeypatch):
    connected = []
    real = socket.create_connection

    def connect(address, *args, **options):
        connected.append(address[0])
        return real(("127.0.0.1", address[1]), *args, **options)

    monkeypatch.setattr(socket, "create_connection", connect)
    # The second answer would lead to this machine.
    asked = resolving(monkeypatch, ["8.8.8.8"], ["127.0.0.1"])
    with hostile_server(lambda path: WHOLE) as url:
        port = url.rpartition(":")[2]
        assert open_image(f"http://example.test:{port}/x", allow=public_address).size == (4, 3)
        assert (asked, connected) == (["example.test"], ["8.8.8.8"])
        # Of several, only those that are allowed.
        resolving(monkeypatch, ["127.0.0.1", "10.0.0.1", "8.8.4.4"])
        assert open_image(f"http://example.test:{port}/x", allow=public_address).size == (4, 3)
        assert connected[1:] == ["8.8.4.4"]


@pytest.mark.parametrize("allow", [None, public_address])
def test_a_redirect_does_not_lead_inside(monkeypatch, allow):
    real = socket.create_connection
    monkeypatch.setattr(
        socket, "create_connection", lambda address, *a, **o: real(("127.0.0.1", address[1]), *a, **o)
    )
    with hostile_server(lambda path: WHOLE) as inside:
        for place in (inside, inside.replace("127.0.0.1", "inner.test")):
            redirect = f"HTTP/1.1 302 Found\r\nLocation: {place}/x\r\nContent-Length: 0\r\n\r\n".encode()
            with hostile_server(lambda path, redirect=redirect: [redirect]) as outside:
                resolving(monkeypatch, ["8.8.8.8"], ["10.0.0.7"])
                port = outside.rpartition(":")[2]
                with pytest.raises(BadImage, match=r"the address (127.0.0.1|10.0.0.7) is not allowed here"):
                    open_image(f"http://outer.test:{port}/x", allow=allow, timeout=5)


def test_proxies_of_the_environment(monkeypatch):
    monkeypatch.delenv("no_proxy")
    with hostile_server(lambda path: WHOLE if path.startswith("http://far.test/") else []) as proxy:
        monkeypatch.setenv("http_proxy", proxy)
        assert open_image("http://far.test/x", timeout=5).size == (4, 3)
        # A proxy would choose the address by itself.
        resolving(monkeypatch, ["10.0.0.7"])
        with pytest.raises(BadImage, match=r"10.0.0.7 is not allowed here"):
            open_image("http://far.test/x", allow=public_address, timeout=5)
    monkeypatch.setenv("http_proxy", "socks5://user:secret@127.0.0.1:1")
    with pytest.raises(
        BadImage, match=r"the proxy 'socks5://127.0.0.1:1' is of a kind that is not supported"
    ):
        open_image("http://far.test/x", timeout=5)


def test_a_text_is_no_path_where_addresses_are_checked(tmp_path):
    (tmp_path / "a.png").write_bytes(IMAGE)
    assert open_image(str(tmp_path / "a.png")).size == (4, 3)
    assert open_image(tmp_path / "a.png", allow=public_address).size == (4, 3)
    for text in (str(tmp_path / "a.png"), "file:///etc/passwd", "/etc/passwd"):
        with pytest.raises(BadImage):
            open_image(text, allow=public_address)


def test_sizes():
    with hostile_server(lambda path: WHOLE) as url:
        assert download(url, most_bytes=len(IMAGE), timeout=5, name="x") == IMAGE
        with pytest.raises(BadOption, match=r"x has more than the"):
            download(url, most_bytes=len(IMAGE) - 1, timeout=5, name="x")
