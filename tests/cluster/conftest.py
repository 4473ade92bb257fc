"""A cluster of three nodes on this machine, with a processor each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.batch.conftest import options
from tests.serving.conftest import lm, trained

__all__ = ["lm", "options", "trained"]

NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Return a cluster; its nodes have a home of their own, where models are copied to."""
    pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Else workers wait for everything else that runs here.
        patched.setenv("RAY_worker_niceness", "0")
        patched.setenv("RAY_raylet_start_wait_time_s", "180")
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("nodes")))
        root = str(Path(__file__).parents[2])
        patched.setenv(
            "PYTHONPATH", os.pathsep.join(filter(None, [f"{root}/src", root, os.environ.get("PYTHONPATH")]))
        )
        from ray.cluster_utils import Cluster

        made = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        try:
            for _ in range(2):
                made.add_node(**NODE)
            yield made
        finally:
            made.shutdown()
