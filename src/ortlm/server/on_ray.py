"""The server on Ray Serve: replicas on the nodes of a cluster, each the whole application with its engines."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ortlm._utils.cpu import physical_cores
from ortlm._version import __version__
from ortlm.artifact import open_artifact
from ortlm.cluster.connection import connected, import_ray
from ortlm.cluster.model_files import Model, fetch, folder_of
from ortlm.cluster.pool import cpus_each
from ortlm.errors import BadOption, Error
from ortlm.server.app import Server
from ortlm.server.metrics import Metrics
from ortlm.server.models import named
from ortlm.server.run import ServeOptions, load_models

APPLICATION = "ortlm"
# So many requests of each place reach a replica, so that it is the engine that refuses, in OpenAI's words.
_SLACK = 4
_SESSION_ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"


@dataclass(frozen=True, slots=True)
class Replicas:
    """How many replicas there are: from ``least`` to ``most``, by how many requests are under way.

    A replica is added when each has more than ``busy`` requests on average, running or waiting. ``sessions``:
    requests with the same header x-session-id go to the same replica, which has their prefixes.
    ``every_node``: not only the head node takes requests but every node with a replica, for a load balancer
    in front of them.
    """

    least: int = 1
    most: int = 1
    busy: float | None = None
    sessions: bool = False
    every_node: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise BadOption(
                f"replicas must be 1 or more, and no more than the most; found {self.least}:{self.most}."
            )


class Replica:
    """The application on one node."""

    def __init__(
        self,
        models: Sequence[tuple[str, Model]],
        options: ServeOptions,
        threads: int | None,
        cpus: int,
        version: str,
    ) -> None:
        if version != __version__:
            raise Error(
                f"a node has ortlm {__version__}, and it was deployed by {version}. Install the same."
            )
        folders = [(name, str(folder_of(model, None, fetch))) for name, model in models]
        metrics = Metrics()
        self._models = load_models(folders, options, metrics, threads=threads or min(cpus, physical_cores()))
        self._server = Server(self._models, options.server, metrics)
        self._drain_seconds = options.drain_seconds

    def __serve_build_asgi_app__(self) -> Any:
        return self._server.app

    def check_health(self) -> None:
        """Raise if no more requests can be answered; another replica takes the place of this one then."""
        failed = self._models.failed_engine()
        if failed is not None:
            raise RuntimeError(f"the engine of {failed[0]} has failed: {failed[1]}")

    async def __del__(self) -> None:
        # Requests have ended, or had their time.
        if hasattr(self, "_models"):
            await asyncio.to_thread(self._models.close)


def deploy(
    address: str,
    words: Sequence[str],
    options: ServeOptions,
    replicas: Replicas,
    *,
    threads: int | None = None,
) -> str:
    """Deploy the models that ``words`` name on the cluster at ``address``, in place of what is deployed there.

    Replicas of an earlier deployment are replaced one after the other, and answer until then. The models must lie
    at the same path on every node. Returns the address of the API once replicas answer; they stay when this
    process ends. Raises BadOption if there is no cluster, Error if no replica starts.
    """
    models = [(name, Model.of(open_artifact(folder).path)) for name, folder in named(words)]
    with connected(address) as ray:
        serve = import_ray("ray.serve")
        cpus = cpus_each(ray, threads)
        batch, queue = options.engine.batch, options.engine.queue
        deployment = serve.deployment(
            serve.ingress()(Replica),
            name=APPLICATION,
            max_ongoing_requests=_SLACK * (batch + queue),
            autoscaling_config={
                "min_replicas": replicas.least,
                "max_replicas": replicas.most,
                "target_ongoing_requests": replicas.busy or float(batch),
            },
            ray_actor_options={"num_cpus": cpus},
            graceful_shutdown_timeout_s=options.drain_seconds,
            **(
                {"request_router_config": {"request_router_class": _SESSION_ROUTER}}
                if replicas.sessions
                else {}
            ),
        )
        serve.start(
            http_options={
                "host": options.host,
                "port": options.port,
                "location": "EveryNode" if replicas.every_node else "HeadOnly",
            }
        )
        try:
            serve.run(
                deployment.bind(models, options, threads, cpus, __version__),
                name=APPLICATION,
                route_prefix="/",
            )
        except (RuntimeError, TimeoutError) as error:
            said = serve.status().applications.get(APPLICATION)
            raise Error(f"no replica has started: {said.message if said else error}") from error
        return f"http://{options.host}:{options.port}"


def undeploy(address: str) -> None:
    """End what ``deploy`` has deployed on the cluster at ``address``; running requests have their time."""
    with connected(address):
        import_ray("ray.serve").shutdown()
