"""Loading models and serving them until a signal comes."""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import uvicorn

from ortlm.artifact import open_artifact
from ortlm.errors import BadOption
from ortlm.runtime.language_model import load
from ortlm.runtime.multimodal.addresses import Allow, no_address, public_address
from ortlm.server.app import Server, ServerOptions
from ortlm.server.errors import ApiError
from ortlm.server.metrics import Metrics
from ortlm.server.middleware import log as request_log
from ortlm.server.models import Models, Source, named
from ortlm.server.served import ServedModel
from ortlm.serving.engine import Engine, EngineOptions


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What ``ortlm serve`` was asked for.

    ``drain_seconds``: how long running requests may go on after a signal. ``remote_images``: URLs of images are
    opened, those of public addresses. ``idle_seconds``: a model is unloaded after so long without a request, None
    for never; ``most_loaded``: the most that are loaded at once, None for all.
    Raises BadOption for values out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    drain_seconds: float = 30.0
    remote_images: bool = False
    engine: EngineOptions = field(default_factory=EngineOptions)
    server: ServerOptions = field(default_factory=ServerOptions)
    idle_seconds: float | None = None
    most_loaded: int | None = None

    def __post_init__(self) -> None:
        if self.idle_seconds is not None and not 0 < self.idle_seconds < float("inf"):
            raise BadOption(f"--idle must be a number of seconds above 0, found {self.idle_seconds}.")
        if self.most_loaded is not None and self.most_loaded < 1:
            raise BadOption(f"--max-loaded must be 1 or more, found {self.most_loaded}.")


def load_models(
    folders: Sequence[tuple[str, str]], options: ServeOptions, metrics: Metrics, **machine: Any
) -> Models:
    """Load as many of the models in ``folders`` as may be loaded at once, and begin an engine for each.

    All folders are looked at, so that one that is no artifact is told now.
    """
    sources = [_source(name, folder, options, metrics, machine) for name, folder in folders]
    models = Models(sources, idle_seconds=options.idle_seconds, most_loaded=options.most_loaded)
    try:
        models.begin()
    except BaseException:
        models.close()
        raise
    return models


def _source(
    name: str, folder: str, options: ServeOptions, metrics: Metrics, machine: Mapping[str, Any]
) -> Source:
    allow: Allow = public_address if options.remote_images else no_address
    artifact = open_artifact(folder)

    def load_it() -> ServedModel:
        if not artifact.path.is_dir():
            raise ApiError(
                503,
                f"the folder of the model {name} is gone. Put it back, or restart the server without it.",
                "unavailable_error",
                code="model_load_failed",
            )
        lm = load(artifact.path, prefix_caches=0, allow_address=allow, **machine)
        if lm.rules.fingerprint is not None:
            # Of the files, which may be deleted while it is served.
            lm.rules.fingerprint(None)
        return ServedModel(name, lm, Engine(lm, options.engine, observer=metrics.observer(name)))

    asked, context = options.engine.cache_tokens, artifact.manifest.context_tokens
    context = context if asked is None else min(context, asked)
    return Source(name, load_it, artifact, context)


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
