"""An artifact's manifest, ``genai_config.json`` and graph: damaged ones are refused, or run."""

from __future__ import annotations

import contextlib
import functools
import io
import json
from pathlib import Path

import pytest
from hypothesis import strategies as st

import ortlm
import ortlm.genai
from ortlm.cli import main
from ortlm.cli.inspect import describe
from ortlm.errors import Error
from ortlm.runtime.sampling.settings import Settings
from tests.conftest import ROOT
from tests.fuzz.harness import damaged_bytes, damaged_json, fuzz


@functools.cache
def parts() -> dict[str, bytes]:
    """Return the files of a small artifact, which strategies need before there are fixtures."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tiny"
        ortlm.build(ROOT / "models" / "tiny-phi3", out, precision="int4", target="cpu")
        return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("fuzz") / "model"
    out.mkdir()
    for name, raw in parts().items():
        (out / name).write_bytes(raw)
    return out


def use(folder):
    lm = ortlm.load(folder, threads=1)
    assert lm.vocab_size > 0
    lm.generate([5, 6, 7], settings=Settings(max_new_tokens=3))


def inspect(folder):
    describe(str(folder))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["inspect", str(folder)]) in (0, 1)
    assert "\x1b" not in out.getvalue()


def with_file(folder, name, raw):
    """Write ``raw`` as the file ``name``, with whatever an earlier example changed put back."""
    for other, right in parts().items():
        if len(right) < 1_000_000 or not (folder / other).is_file():
            (folder / other).write_bytes(right)
    (folder / name).write_bytes(raw)


@fuzz(st.deferred(lambda: damaged_json(json.loads(parts()["ortlm.json"]))))
def test_manifest(folder, found):
    with_file(folder, "ortlm.json", json.dumps(found).encode())
    inspect(folder)
    use(folder)


@fuzz(
    st.deferred(lambda: damaged_json(json.loads(parts()["genai_config.json"]))),
    allowed=(Error, RuntimeError),
)
def test_genai_config(folder, found):
    with_file(folder, "genai_config.json", json.dumps(found).encode())
    with contextlib.suppress(Error):
        ortlm.genai.Config(str(folder))
    (folder / "ortlm.json").unlink()
    use(folder)


@fuzz(st.deferred(lambda: damaged_bytes(parts()["model.onnx"])))
def test_graph(folder, raw):
    with_file(folder, "model.onnx", raw)
    use(folder)
