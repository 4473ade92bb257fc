"""Prompt caches on disk, over a model in numpy."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ortlm.errors import BadArtifact, BadOption
from ortlm.runtime.engine.decode_loop import Loop
from ortlm.runtime.engine.prompt_cache import fingerprint, restore, save
from tests.runtime.fakes import FakeBackend


def loop_of(kind="grow", rows=(), **options):
    backend = FakeBackend(kind, **options)
    loop = Loop(backend, backend.graph, context_tokens=64, switch_tokens=options.get("switch"))
    if rows:
        loop.start(len(rows))
        loop.append(rows)
    return loop


@pytest.mark.parametrize("kind", ["grow", "append"])
@pytest.mark.parametrize("into", ["grow", "append"])
def test_what_was_saved_goes_on_as_before(kind, into, tmp_path):
    loop = loop_of(kind, [[1, 2, 3, 4], [5, 6]])
    save(loop, tmp_path / "cache", model="m")
    again = loop_of(into, [[9, 9, 9]])
    restore(again, tmp_path / "cache", model="m")
    assert again.history == [[1, 2, 3, 4], [5, 6]]
    for tokens in ([7, 8], [9, 10]):
        assert np.array_equal(loop.step(tokens).copy(), again.step(tokens))
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_the_rotation_table_is_taken_up(tmp_path):
    loop = loop_of(rows=[[1, 2, 3, 4, 5, 6]], switch=4)
    save(loop, tmp_path / "cache", model="m")
    again = loop_of(switch=4)
    restore(again, tmp_path / "cache", model="m")
    assert np.array_equal(loop.step([7]).copy(), again.step([7]))
    assert again.recomputed == 0


def test_refusals(tmp_path):
    path = tmp_path / "cache"
    save(loop_of(rows=[[1, 2]]), path, model="m")
    with pytest.raises(BadArtifact, match="written by another model"):
        restore(loop_of(), path, model="n")
    with pytest.raises(BadArtifact, match=r"past.key is float32 .* but the model's is fp32 \[1, 2, 2, 5\]"):
        restore(loop_of(width=5), path, model="m")
    with pytest.raises(BadOption, match="is not there"):
        restore(loop_of(), tmp_path / "nowhere", model="m")
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"not a cache", b""):
        path.write_bytes(content)
        with pytest.raises(BadArtifact, match="cannot be read as a prompt cache"):
            restore(loop_of(), path, model="m")
        with pytest.raises(BadOption, match="is no prompt cache, so it is not overwritten"):
            save(loop_of(rows=[[1]]), path, model="m")
    save_file({"a": np.zeros(1)}, path)
    with pytest.raises(BadArtifact, match="is no prompt cache"):
        restore(loop_of(), path, model="m")


def test_longer_than_the_context(tmp_path):
    save(loop_of(rows=[[1] * 40]), tmp_path / "cache", model="m")
    backend = FakeBackend()
    with pytest.raises(BadArtifact, match="holds 40 tokens, but the context holds 32"):
        restore(Loop(backend, backend.graph, context_tokens=32), tmp_path / "cache", model="m")


def test_fingerprints_tell_files_apart(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(bytes(5 << 20))
    changed = bytearray(5 << 20)
    changed[(5 << 20) // 2] = 1
    found = {fingerprint([one])}
    one.write_bytes(changed)
    found.add(fingerprint([one]))
    other.write_bytes(changed)
    found |= {fingerprint([other]), fingerprint([one, other])}
    assert len(found) == 4


def with_tokens(path, tokens):
    """Save a cache whose tokens are the text ``tokens``."""
    save(loop_of(rows=[[1, 2]]), path, model="m")
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, {**metadata, "tokens": tokens})


@pytest.mark.parametrize(
    "tokens",
    [
        "[[1, 1e400]]",
        f"[[1, {2**70}]]",
        f"[[1, {10**400}]]",
        "[" * 100_000,
        "[[1, [2]]]",
        "[[1, -1]]",
        "[[1, true]]",
        "[[1, NaN]]",
        "[[1, 2.0]]",
        '{"1": 2}',
        '["ab"]',
        "[]",
        "[[]]",
        "",
    ],
)
def test_tokens_that_are_none(tmp_path, tokens):
    with_tokens(tmp_path / "cache", tokens)
    with pytest.raises(BadArtifact, match=r"is damaged: (its tokens cannot be read|it holds no tokens)"):
        restore(loop_of(), tmp_path / "cache", model="m")


def test_other_tokens_have_another_checksum(tmp_path):
    with_tokens(tmp_path / "cache", "[[1, 3]]")
    with pytest.raises(BadArtifact, match="the checksum that it names"):
        restore(loop_of(), tmp_path / "cache", model="m")


def test_every_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "cache"
    save(loop_of(rows=[[1, 2, 3], [4]]), path, model="m")
    whole = path.read_bytes()
    for at in range(len(whole)):
        broken = bytearray(whole)
        broken[at] ^= 1 << at % 8
        path.write_bytes(broken)
        with pytest.raises(BadArtifact, match="cache"):
            restore(loop_of(), path, model="m")


def test_caches_of_an_older_ortlm(tmp_path):
    path = tmp_path / "cache"
    save_file({"a": np.zeros(1)}, path, {"ortlm_prompt_cache": "1", "model": "m", "tokens": "[[1]]"})
    with pytest.raises(BadArtifact, match="has format '1', and this ortlm reads '2'"):
        restore(loop_of(), path, model="m")
