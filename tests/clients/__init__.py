"""Clients and frameworks in environments of their own, at the server.

make test-clients                   all of them
make test-clients CLIENTS=node      OpenAI's client for JavaScript; langchain, llamaindex, schemathesis
"""

from __future__ import annotations

import os

import pytest


def wanted(name: str) -> pytest.MarkDecorator:
    """Return the mark of tests with the client ``name``, which are skipped unless they are asked for."""
    asked = os.environ.get("CLIENTS", "")
    return pytest.mark.skipif(
        asked not in ("all", name), reason="these clients have tests of their own: make test-clients"
    )
