"""Loading models and serving them until a signal comes."""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import uvicorn

from ortlm.errors import BadOption
from ortlm.runtime.language_model import load
from ortlm.runtime.multimodal.addresses import Allow, no_address, public_address
from ortlm.server.app import Server, ServerOptions
from ortlm.server.metrics import Metrics
from ortlm.server.middleware import log as request_log
from ortlm.server.served import Models, ServedModel, named
from ortlm.serving.engine import Engine, EngineOptions


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What ``ortlm serve`` was asked for.

    ``drain_seconds``: how long running requests may go on after a signal. ``remote_images``: URLs of images are
    opened, those of public addresses.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    drain_seconds: float = 30.0
    remote_images: bool = False
    engine: EngineOptions = field(default_factory=EngineOptions)
    server: ServerOptions = field(default_factory=ServerOptions)


def load_models(
    folders: Sequence[tuple[str, str]], options: ServeOptions, metrics: Metrics, **machine: Any
) -> Models:
    """Load the model in each of ``folders`` and begin an engine for it."""
    allow: Allow = public_address if options.remote_images else no_address
    models = []
    try:
        for name, folder in folders:
            lm = load(folder, prefix_caches=0, allow_address=allow, **machine)
            engine = Engine(lm, options.engine, observer=metrics.observer(name))
            models.append(ServedModel(name, lm, engine))
        return Models(models)
    except BaseException:
        for model in models:
            model.engine.close()
        raise


def serve(
    words: Sequence[str],
    options: ServeOptions,
    *,
    ready: Callable[[str, Sequence[str]], None] | None = None,
    **machine: Any,
) -> None:
    """Serve the models that ``words`` name until SIGINT or SIGTERM; ``machine`` says where they run.

    ``ready`` is called with the address and the names of the models once requests are answered. Raises BadOption
    if the address cannot be used.
    """
    taken = _listen(options.host, options.port)
    with taken:
        metrics = Metrics()
        models = load_models(named(words), options, metrics, **machine)
        server = Server(models, options.server, metrics)
        config = uvicorn.Config(
            server.app,
            log_config=None,
            access_log=False,
            server_header=False,
            # After the engines have ended whatever was still running, so that streams end with an error event.
            timeout_graceful_shutdown=int(options.drain_seconds) + 10,
        )
        web = uvicorn.Server(config)
        usual = web.handle_exit

        def end(number: int, frame: FrameType | None) -> None:
            if not server.draining:
                server.draining = True
                threading.Thread(
                    target=models.close, args=(options.drain_seconds,), name="ortlm-drain"
                ).start()
            usual(number, frame)

        web.handle_exit = end
        if ready is not None:
            host, port = taken.getsockname()[:2]
            ready(f"http://{f'[{host}]' if ':' in host else host}:{port}", models.names)
        try:
            with contextlib.suppress(KeyboardInterrupt), _log_to_stderr():
                web.run(sockets=[taken])
        finally:
            models.close()


def _listen(host: str, port: int) -> socket.socket:
    """Take the address before a model is loaded, which may take a while."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family, kind, protocol)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
        # So that whoever is told the address may connect at once.
        taken.listen(2048)
    except (OSError, OverflowError) as error:
        raise BadOption(
            f"--host {host} --port {port} cannot be used: {error}. Choose another port."
        ) from error
    return taken


@contextlib.contextmanager
def _log_to_stderr() -> Iterator[None]:
    """Write a line of JSON for each request, as long as the server runs."""
    usual = request_log.handlers[:], request_log.level, request_log.propagate
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    request_log.handlers[:] = [handler]
    request_log.setLevel(logging.INFO)
    request_log.propagate = False
    try:
        yield
    finally:
        request_log.handlers[:], level, request_log.propagate = usual
        request_log.setLevel(level)
