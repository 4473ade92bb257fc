"""A server that answers with any bytes at any pace."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# What a server sends: bytes at once, or seconds to wait; without an end it resumes with the last piece.
Script = list[bytes | float]


@contextmanager
def hostile_server(answer: Callable[[str], Script]) -> Iterator[str]:
    """Serve the scripts that ``answer`` gives for the path of each request."""
    stop = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.05)
    threads = []

    def serve(connection: socket.socket) -> None:
        with connection:
            try:
                connection.settimeout(5)
                request = connection.recv(1 << 16).decode("latin-1")
                for piece in answer(request.split(" ")[1] if " " in request else "/"):
                    if stop.is_set():
                        return
                    if isinstance(piece, bytes):
                        connection.sendall(piece)
                    else:
                        stop.wait(piece)
            except OSError:
                pass

    def accept() -> None:
        while not stop.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            thread = threading.Thread(target=serve, args=(connection,), daemon=True)
            thread.start()
            threads.append(thread)

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stop.set()
        thread.join()
        listener.close()
        for thread in threads:
            thread.join(2)


def drip(data: bytes, pause: float = 0.1) -> Script:
    """Return a script that sends ``data`` byte by byte."""
    return [piece for byte in data for piece in (bytes([byte]), pause)]
