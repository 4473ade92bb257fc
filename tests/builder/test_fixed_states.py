"""What layers with states of one size cannot be built for is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ortlm
from ortlm.builder.options import BuildOptions
from ortlm.errors import BadOption, Error, UnsupportedModel


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"target": "cuda"}, BadOption, "states of one size .conv., which have not been checked on cuda"),
        ({"target": "webgpu"}, BadOption, "Build it with -e cpu or mobile"),
        ({"options": BuildOptions(kv_cache="int8")}, BadOption, "kv_cache does not apply"),
        ({"options": BuildOptions(window_cache=True)}, BadOption, "windowed_kv_cache does not apply"),
        ({"options": BuildOptions(layers=1)}, BadOption, "num_hidden_layers must be 2 to 4"),
        ({"layout": "transformers.js", "precision": "q4"}, UnsupportedModel, "transformers.js"),
    ],
)
def test_refused(given: dict[str, Any], error: type[Error], message: str, saved: Any, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        ortlm.build(saved("lfm2").folder, tmp_path / "out", **{"precision": "int4", **given})
    assert not (tmp_path / "out").exists()
