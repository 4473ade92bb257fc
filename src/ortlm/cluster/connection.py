"""A connection to a cluster of Ray."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import socket
from collections.abc import Iterator
from typing import Any

from ortlm.errors import BadOption, Error

_CONNECT_SECONDS = 10.0


def import_ray(name: str = "ray", *, extra: str = "ray") -> Any:
    """Return the module ``name`` of Ray. Raises BadOption that says how to install it."""
    # Nothing of what is computed here is anybody's business.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise BadOption(
            f"--ray needs {error.name}, which is not installed: pip install 'ortlm[{extra}]', here and on "
            f"every node."
        ) from error


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """Yield the module ``ray``, connected to the cluster at ``address``; what runs there for us then ends with it.

    "local" starts one on this machine, "auto" takes the one that this machine is part of; else it is HOST:PORT, or
    ray://HOST:PORT for Ray's client. Raises BadOption if there is none.
    """
    ray = import_ray()
    _check_reachable(address)
    how: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **how)
    except (ConnectionError, TimeoutError, ValueError, AssertionError, RuntimeError) as error:
        why = (str(error).splitlines() or [repr(error)])[0]
        raise BadOption(
            f"--ray {address}: there is no cluster of Ray: {why} Start one with ray start --head, or use "
            "--ray local."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise BadOption if nobody listens at HOST:PORT, which Ray would try for many minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        if address not in ("auto", "local") and not address.startswith("ray://"):
            raise BadOption(
                f"--ray takes auto, local, HOST:PORT or ray://HOST:PORT; found {address!r}. The port of a cluster "
                "is 6379 unless ray start --port says another."
            )
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise BadOption(
            f"--ray {address}: there is no cluster of Ray: {error}. Start one with ray start --head, or use "
            "--ray local."
        ) from error


def processors(ray: Any) -> list[int]:
    """Return how many processors each living node offers, of those that offer any. Raises Error if none does."""
    found = [
        int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node.get("Alive", node.get("alive"))
    ]
    found = [count for count in found if count]
    if not found:
        raise Error("no node of the cluster offers a CPU. Start nodes with ray start --num-cpus N.")
    return found
