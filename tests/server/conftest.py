"""A server over the small trained model, on a free port, and the official clients."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import ortlm
from tests.serving.conftest import lm, trained

__all__ = ["lm", "trained"]


class Running:
    """A server that listens at ``url``."""

    def __init__(self, server: Any, url: str, models: Any) -> None:
        self.server, self.url, self.models = server, url, models

    @property
    def stats(self) -> Any:
        return self.models.all[0].stats()

    def wait_until_idle(self) -> None:
        for _ in range(500):
            stats = self.stats
            if not (stats.running or stats.prefilling or stats.waiting):
                return
            time.sleep(0.01)
        raise AssertionError(f"requests are left: {stats}")


@contextlib.contextmanager
def running(
    served: ortlm.LanguageModel | Callable[[Any], Any], *, engine: Any = None, options: Any = None
) -> Iterator[Running]:
    """Serve ``served`` as "tiny" in a thread, or the Models that it returns for a server's metrics."""
    import uvicorn

    from ortlm.server.app import Server
    from ortlm.server.metrics import Metrics
    from ortlm.server.models import Models
    from ortlm.server.run import _listen
    from ortlm.server.served import ServedModel
    from ortlm.serving.engine import Engine

    metrics = Metrics()
    if isinstance(served, ortlm.LanguageModel):
        one = ServedModel("tiny", served, Engine(served, engine, observer=metrics.observer("tiny")))
        models = Models([one])
    else:
        models = served(metrics)
    server = Server(models, options, metrics)
    web = uvicorn.Server(uvicorn.Config(server.app, log_config=None, access_log=False))
    with _listen("127.0.0.1", 0) as taken:
        thread = threading.Thread(target=web.run, kwargs={"sockets": [taken]})
        thread.start()
        try:
            while not web.started:
                time.sleep(0.005)
            yield Running(server, f"http://127.0.0.1:{taken.getsockname()[1]}", models)
        finally:
            web.should_exit = True
            thread.join()
            models.close()


@pytest.fixture(scope="module")
def serve(lm: ortlm.LanguageModel) -> Callable[..., Any]:
    """Return a context manager that serves the small model."""
    pytest.importorskip("fastapi")
    return lambda **how: running(lm, **how)


@pytest.fixture(scope="module")
def live(serve: Callable[..., Any]) -> Iterator[Running]:
    """Return a server that all tests of a module share."""
    with serve() as found:
        yield found
