"""Many clients of every kind at one server: in a hurry, slow, broken off, and wrong.

    python -m tests.server.soak 10    for ten minutes; prints a table of memory, threads and files

Each answer that is read to its end must be that of the same request alone, and nothing may stay behind.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

import ortlm
from ortlm.builder.options import BuildOptions
from tests.serving.alone import says_alone

# How often clients behave in each way, in percent: a fifth of them leaves.
WAYS = {"whole": 32, "stream": 30, "leaves": 20, "bad": 5, "large": 3, "slow reader": 5, "slow writer": 5}
WORDS = "import os def read_lines ( path ) : for line in file return class self None with #"
BAD = (
    b"{",
    b"",
    b'{"model": "\xff"}',
    b'{"prompt": 3, "max_tokens": -1}',
    b"[" * 3000,
    b'{"prompt": "x", "n": "y"}',
)
MOST_BODY = 1 << 20
TOKENS = 512


@dataclass(frozen=True)
class Asked:
    """A request, and the text that it is answered with when it is alone."""

    path: str
    body: dict[str, Any]
    text: str


def questions(lm: ortlm.LanguageModel, count: int, random_: random.Random) -> list[Asked]:
    """Return ``count`` requests of random lengths, greedy and drawn ones, with what ``lm`` says alone."""
    found = []
    for number in range(count):
        text = " ".join(random_.choices(WORDS.split(), k=random_.choice((1, 5, 20, 80))))
        new = random_.choice((1, 4, 16, 48))
        drawn = {"temperature": 0.9, "seed": number} if number % 3 == 0 else {"temperature": 0.0}
        how = {"max_new_tokens": new, **drawn}
        if number % 2:
            said, body = says_alone(lm, text, **how), {"prompt": text}
        else:
            messages = [{"role": "user", "content": text}]
            said, body = says_alone(lm, messages, **how), {"messages": messages}
        path = "/v1/completions" if number % 2 else "/v1/chat/completions"
        found.append(Asked(path, {**body, "max_tokens": new, **drawn}, said.text))
    return found


@dataclass
class Sample:
    """What the server's process holds: memory in MB, threads, open files, after so many seconds and requests."""

    seconds: float
    requests: int
    rss: float
    threads: int
    files: int


@dataclass
class Soak:
    """A server's process and its clients; ``wrong`` says what they got that they should not have."""

    process: subprocess.Popen[str]
    url: str
    asked: Sequence[Asked]
    ended: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    draining: bool = False

    def run(self, seed: int, count: int, clients: int = 12) -> None:
        """Let ``clients`` at once send ``count`` requests."""
        with concurrent.futures.ThreadPoolExecutor(clients) as pool:
            list(pool.map(self._one, range(seed, seed + count)))

    def _one(self, seed: int) -> None:
        random_ = random.Random(seed)
        (way,) = random_.choices(list(WAYS), list(WAYS.values()))
        try:
            getattr(self, way.replace(" ", "_"))(random_)
        except (OSError, ValueError, AssertionError) as error:
            if self.draining and isinstance(error, ConnectionError):
                way = "refused"
            else:
                self.wrong.append(f"{way} {seed}: {type(error).__name__} {str(error)[:300]}")
        self.ended[way] += 1

    # --- kinds of clients ---------------------------------------------------------------------------------

    def whole(self, random_: random.Random) -> None:
        """Wait for the whole answer."""
        asked = random_.choice(self.asked)
        self._check(asked, *self._talk(asked.path, asked.body))

    def stream(self, random_: random.Random) -> None:
        """Read a stream."""
        asked = random_.choice(self.asked)
        self._check(asked, *self._talk(asked.path, {**asked.body, "stream": True}))

    def slow_reader(self, random_: random.Random) -> None:
        """Read a stream some bytes at a time."""
        asked = random_.choice(self.asked)
        self._check(asked, *self._talk(asked.path, {**asked.body, "stream": True}, piece=300, pause=0.02))

    def slow_writer(self, random_: random.Random) -> None:
        """Send a body in pieces."""
        asked = random_.choice(self.asked)
        self._check(asked, *self._talk(asked.path, asked.body, pieces=8))

    def bad(self, random_: random.Random) -> None:
        """Send what is no request."""
        status, text = self._talk("/v1/completions", random_.choice(BAD))
        if not self._ending(status, text):
            assert status == 400, (status, text)
            assert json.loads(text)["error"]["type"] == "invalid_request_error"

    def large(self, random_: random.Random) -> None:
        """Say that more comes than the server takes, and send some of it."""
        line = self._connect()
        with line:
            head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {4 * MOST_BODY}\r\n\r\n"
            with contextlib.suppress(ConnectionError):
                line.sendall(head.encode() + b"x" * random_.choice((0, 1000, 200_000)))
            found = line.recv(1000)
            # The system may drop what was said to a client that is still sending.
            assert b" 413 " in found or b" 503 " in found or not found, found

    def leaves(self, random_: random.Random) -> None:
        """Go away in the middle of the body, before the answer or within it."""
        asked = random_.choice(self.asked)
        body = json.dumps({**asked.body, "stream": random_.random() < 0.6, "max_tokens": 60}).encode()
        data = self._head(asked.path, len(body)) + body
        with self._connect() as line, contextlib.suppress(TimeoutError):
            until = random_.choice((len(data) - 3, len(data)))
            line.sendall(data[:until])
            line.settimeout(random_.uniform(0.0001, 0.2))
            if until == len(data):
                line.recv(random_.choice((1, 100, 1000)))

    # --- inside -------------------------------------------------------------------------------------------

    def _connect(self) -> socket.socket:
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=600)

    @staticmethod
    def _head(path: str, length: int) -> bytes:
        return f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n".encode()

    def _talk(
        self, path: str, body: Any, *, pieces: int = 1, piece: int = 1 << 16, pause: float = 0.0
    ) -> tuple[int, str]:
        """Return status and body of the answer."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        data = self._head(path, len(data)) + data
        size = len(data) // pieces + 1
        with self._connect() as line:
            for at in range(0, len(data), size):
                line.sendall(data[at : at + size])
                if pieces > 1:
                    time.sleep(0.01)
            found = bytearray()
            while part := line.recv(piece):
                found += part
                if pause:
                    time.sleep(pause)
        head, _, rest = bytes(found).partition(b"\r\n\r\n")
        if not head:
            raise ConnectionResetError("closed without an answer")
        if b"transfer-encoding: chunked" in head.lower():
            rest = _unchunked(rest)
        return int(head.split()[1]), rest.decode()

    def _ending(self, status: int, text: str) -> bool:
        """Whether the server says that it ends."""
        return self.draining and (status == 503 or "shutting_down" in text[-300:])

    def _check(self, asked: Asked, status: int, text: str) -> None:
        if self._ending(status, text):
            return
        if status == 429:
            self.ended["full"] += 1
            return
        assert status == 200, (status, text[:300])
        # A comment comes first where the machine had no time for the answer.
        if not text.startswith(("data: ", ": ping")):
            choice = json.loads(text)["choices"][0]
            made = choice["message"]["content"] if "message" in choice else choice["text"]
        else:
            assert text.endswith("data: [DONE]\n\n"), text[-300:]
            events = [line[6:] for line in text.split("\n\n") if line.startswith("data: {")]
            choices = [json.loads(event)["choices"][0] for event in events]
            made = "".join(
                choice["delta"].get("content", "") if "delta" in choice else choice["text"]
                for choice in choices
            )
        assert made == asked.text, (asked.body, made, asked.text)

    # --- what it holds ------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """Return the server's figures."""
        with self._connect() as line:
            line.sendall(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            found = b""
            while part := line.recv(1 << 16):
                found += part
        named = re.findall(r'^ortlm:(\w+)\{model_name="tiny"\} (\S+)$', found.decode(), re.MULTILINE)
        return {name: float(value) for name, value in named}

    def wait_until_idle(self) -> None:
        """Wait until no request has a row or waits for one, as far as they may have been left. Raises."""
        for _ in range(1000):
            found = self.metrics()
            left = {
                name: found[name]
                for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            }
            if not any(left.values()):
                return
            time.sleep(0.02)
        raise AssertionError(f"requests are left: {left}")

    def sample(self, began: float) -> Sample:
        """Note what the process holds now."""
        process = psutil.Process(self.process.pid)
        found = Sample(
            time.perf_counter() - began,
            sum(self.ended.values()),
            process.memory_info().rss / 1e6,
            process.num_threads(),
            process.num_fds(),
        )
        self.samples.append(found)
        return found


def _unchunked(data: bytes) -> bytes:
    found = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        if not length:
            return found
        found, data = found + data[:length], data[length + 2 :]
    raise AssertionError(f"a stream ended without its last chunk: {found[-200:]!r}")


@contextlib.contextmanager
def soaking(model: Path, asked: Sequence[Asked]) -> Iterator[Soak]:
    """Serve the folder ``model`` in a process of its own."""
    source = str(Path(ortlm.__file__).parents[1])
    around = {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    options = ["--port", "0", "--threads", "1", "--max-body", "1", "--prefix-cache", "64", "--drain", "20"]
    command = [sys.executable, "-m", "ortlm", "serve", f"tiny={model}", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=around)
    assert process.stderr is not None
    try:
        url = next(
            found[1]
            for line in process.stderr
            if (found := re.search(r"at (http://\S+)/v1", line)) is not None
        )
        # Its log would fill the pipe.
        log: list[str] = []

        def read(lines: Any) -> None:
            log.extend(line for line in lines if not line.startswith("{"))

        reader = threading.Thread(target=read, args=(process.stderr,))
        reader.start()
        soak = Soak(process, url, asked)
        yield soak
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        reader.join()
        # Faults, each with a traceback.
        soak.wrong += [line for line in log if "Traceback" in line or "Error" in line]
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def under_load(soak: Soak, seed: int, count: int) -> int:
    """End the server with SIGTERM while clients send ``count`` requests; return its exit status."""
    thread = threading.Thread(target=soak.run, args=(seed, count))
    thread.start()
    time.sleep(0.5)
    soak.draining = True
    soak.process.send_signal(signal.SIGTERM)
    thread.join()
    return soak.process.wait(60)


def main(minutes: float) -> int:
    """Soak a server over the shipped model for so long."""
    tiny = Path(__file__).parents[2] / "models" / "tiny-phi3"
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        ortlm.build(tiny, model, precision="int4", options=BuildOptions(recipe="fast"))
        asked = questions(ortlm.load(model, threads=1), 80, random.Random(1))
        with soaking(model, asked) as soak:
            began, seed = time.perf_counter(), 0
            next_sample = 0.0
            print(f"{'seconds':>8} {'requests':>9} {'RSS MB':>8} {'threads':>8} {'files':>6} {'wrong':>6}")
            while (now := time.perf_counter() - began) < minutes * 60:
                if now >= next_sample:
                    next_sample += 10
                    one = soak.sample(began)
                    print(
                        f"{one.seconds:8.0f} {one.requests:9} {one.rss:8.1f} {one.threads:8} {one.files:6} "
                        f"{len(soak.wrong):6}",
                        flush=True,
                    )
                soak.run(seed, 60)
                seed += 60
                if now > minutes * 30 and model.exists():
                    shutil.rmtree(model)
                    print("the model's folder is deleted", flush=True)
            soak.wait_until_idle()
            last = soak.sample(began)
            print(f"idle: {last}")
            status = under_load(soak, seed, 60)
        warm = [one.rss for one in soak.samples if one.seconds >= 60] or [last.rss]
        print(f"{sum(soak.ended.values())} requests: {dict(soak.ended)}; exit status {status}")
        print(f"RSS after a minute: first {warm[0]:.1f}, last {warm[-1]:.1f}, most {max(warm):.1f} MB")
        print("\n".join(soak.wrong[:20]) or "nothing was wrong")
        return int(bool(soak.wrong))


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))
