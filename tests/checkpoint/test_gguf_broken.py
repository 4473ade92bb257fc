"""GGUF files that are damaged, incomplete, hostile or not known: an error in one line that says what to do."""

from __future__ import annotations

import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ortlm.checkpoint.gguf import open_gguf
from ortlm.checkpoint.hub import find_checkpoint
from ortlm.errors import BadCheckpoint, Error, UnsupportedModel
from ortlm.weights.reader import Weights
from ortlm.weights.resolution import stored_architecture
from tests.checkpoint.gguf_bytes import ARRAY, STRING, U32, Typed, file_of, header_of, smallest, value_of

Values = dict[str, Any]


def opened(path: Path) -> Any:
    checkpoint = find_checkpoint(path)
    return stored_architecture(checkpoint), checkpoint


def said(path: Path, kind: type[Error]) -> str:
    with pytest.raises(kind) as caught:
        opened(path)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


def test_the_smallest_file_is_a_model(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(file_of(*smallest()))
    architecture, _ = opened(path)
    assert architecture.decoder.vocab == 260


WHOLE = file_of(*smallest())


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "ends inside its magic number"),
        (b"GG", "ends inside its magic number"),
        (b"<html><body>not found</body></html>", "is no GGUF file: it begins with"),
        (b"PK\x03\x04" + bytes(100), "is no GGUF file"),
        (WHOLE[:4] + b"\x01\0\0\0" + WHOLE[8:], "has version 1 of GGUF"),
        (WHOLE[:4] + b"\x09\0\0\0" + WHOLE[8:], "has version 9 of GGUF"),
        (WHOLE[:4] + b"\0\0\0\x03" + WHOLE[8:], "big-endian"),
        (WHOLE[:20], "truncated"),
        (WHOLE[:300], "truncated"),
        (WHOLE[:-40_000], "it is truncated"),
        (header_of({}, [], count=2**60), "says 1,152,921,504,606,846,976 for the number of tensors"),
        (header_of({}, [], keys=2**63), "for the number of metadata keys"),
        (header_of({}, [], count=2**63 - 1, keys=2**64 - 1), "for the number of tensors"),
        (header_of({}, []) + b"x", '"general.architecture" is null'),
    ],
)
def test_damaged_bytes(raw: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    assert message in said(path, BadCheckpoint)


def hostile(kind: int, of: int | None, count: int) -> bytes:
    """Return a file whose only value of metadata claims to have so many elements."""
    start = header_of({}, [], keys=1) + struct.pack("<Q", 1) + b"k" + struct.pack("<I", kind)
    if of is not None:
        start += struct.pack("<I", of)
    return start + struct.pack("<Q", count) + bytes(64)


@pytest.mark.parametrize("count", [2**60, 2**64 - 1, 2**40])
@pytest.mark.parametrize(("kind", "of"), [(STRING, None), (ARRAY, STRING), (ARRAY, U32), (ARRAY, 10)])
def test_claimed_sizes_are_not_allocated(kind: int, of: int | None, count: int, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(hostile(kind, of, count))
    assert f"{count:,}" in said(path, BadCheckpoint)


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory")
def test_memory_of_a_hostile_file(tmp_path: Path) -> None:
    """A sparse file of a terabyte that claims as much is refused with little memory."""
    path = tmp_path / "model.gguf"
    path.write_bytes(hostile(ARRAY, U32, 2**36))
    with path.open("r+b") as file:
        file.truncate(2**40)
    code = (
        "import sys; from pathlib import Path; from ortlm.checkpoint.hub import find_checkpoint\n"
        "from ortlm.errors import BadCheckpoint\n"
        "try: find_checkpoint(Path(sys.argv[1]))\nexcept BadCheckpoint as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)),
    )
    assert "68,719,476,736 for the number of values" in done.stdout, done


def without(*keys: str) -> Callable[[Values, Values], None]:
    def change(metadata: Values, tensors: Values) -> None:
        for key in keys:
            (metadata if key in metadata else tensors).pop(key)

    return change


def setting(key: str, value: Any) -> Callable[[Values, Values], None]:
    def change(metadata: Values, tensors: Values) -> None:
        metadata[key] = value

    return change


def tensor(name: str, value: Any) -> Callable[[Values, Values], None]:
    def change(metadata: Values, tensors: Values) -> None:
        tensors[name] = value

    return change


def experts(used: int) -> Callable[[Values, Values], None]:
    def change(metadata: Values, tensors: Values) -> None:
        metadata |= {"llama.expert_count": 4, "llama.expert_used_count": used}

    return change


TOKENS = smallest()[0]["tokenizer.ggml.tokens"]


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (without("general.architecture"), BadCheckpoint, '"general.architecture" is null'),
        (setting("general.architecture", "mamba"), UnsupportedModel, '"general.architecture" is "mamba"'),
        (setting("general.architecture", "lama"), UnsupportedModel, "Did you mean: llama"),
        (setting("general.type", "adapter"), UnsupportedModel, "only models can be built"),
        (setting("general.alignment", 3), BadCheckpoint, "expected a power of two"),
        (setting("general.quantization_version", 1), UnsupportedModel, "quantization_version"),
        (without("llama.block_count"), BadCheckpoint, '"llama.block_count" is missing'),
        (setting("llama.block_count", 2**31), BadCheckpoint, "at most 10,000"),
        (setting("llama.block_count", 3), BadCheckpoint, "is missing"),
        (setting("llama.block_count", "many"), BadCheckpoint, "expected a whole number above zero"),
        (setting("llama.embedding_length", 64), UnsupportedModel, '"partial_rotary_factor" is 0.5'),
        (setting("llama.attention.head_count", 0), BadCheckpoint, "expected a whole number above zero"),
        (setting("llama.attention.head_count", [2, 1]), UnsupportedModel, "differs from layer to layer"),
        (setting("llama.attention.head_count", 7), BadCheckpoint, "heads cannot share evenly"),
        (setting("llama.vocab_size", 7), BadCheckpoint, '"llama.vocab_size" is 7'),
        (setting("llama.expert_count", 8), BadCheckpoint, '"llama.expert_used_count" is missing'),
        (experts(9), BadCheckpoint, '"num_experts_per_tok" is 9, expected at most the number of experts (4)'),
        (experts(2), BadCheckpoint, "weight 'model.layers.0.block_sparse_moe.gate.weight' is missing"),
        (tensor("blk.0.ffn_gate.3.weight", np.ones((4, 4), np.float32)), UnsupportedModel, "until April 2024"),
        (setting("general.architecture", "phimoe"), UnsupportedModel, "short_mscale, long_mscale"),
        (setting("general.architecture", "qwen3moe"), BadCheckpoint, '"qwen3moe.expert_count" is missing'),
        (setting("llama.attention.scale", 0.1), UnsupportedModel, '"llama.attention.scale"'),
        (setting("llama.attention.sliding_window", 64), UnsupportedModel, "sliding_window"),
        (setting("llama.attention.causal", False), UnsupportedModel, "attention.causal"),
        (setting("llama.attention.value_length", 8), UnsupportedModel, "differs from the 16 channels"),
        (setting("llama.what_nobody_knows", 1), UnsupportedModel, '"llama.what_nobody_knows" is 1'),
        (setting("llama.rope.scaling.type", "dynamic"), UnsupportedModel, "is not known (none, linear, yarn"),
        (setting("llama.rope.scaling.type", "longrope"), BadCheckpoint, "has no rope_factors_long.weight"),
        (setting("llama.rope.scaling.factor", -1.0), BadCheckpoint, "expected a number above zero"),
        (setting("llama.rope.scaling.yarn_ext_factor", 0.5), UnsupportedModel, "yarn_ext_factor"),
        (tensor("rope_freqs.weight", np.zeros(8, np.float32)), BadCheckpoint, "no number above zero"),
        (tensor("rope_freqs.weight", np.ones(9, np.float32)), BadCheckpoint, "expected [8]"),
        (tensor("rope_factors_long.weight", np.ones(8, np.float32)), BadCheckpoint, "or both others"),
        (tensor("blk.0.attn_sinks.weight", np.ones(2, np.float32)), BadCheckpoint, "is not part of the model"),
        (tensor("blk.0.attn_q.bias", np.ones(32, np.float32)), BadCheckpoint, "is missing"),
        (tensor("blk.1.attn_q.weight", np.ones((32, 32), np.float32)), BadCheckpoint, "is not part of"),
        (tensor("blk.0.attn_q.weight", np.ones((32, 16), np.float32)), BadCheckpoint, "has shape [32, 16]"),
        (without("token_embd.weight"), BadCheckpoint, "has no tensor token_embd.weight"),
        (without("blk.0.attn_q.weight"), BadCheckpoint, "is missing"),
        (without("tokenizer.ggml.model"), BadCheckpoint, "so no tokenizer"),
        (without("tokenizer.ggml.tokens"), BadCheckpoint, 'has no "tokenizer.ggml.tokens"'),
        (without("tokenizer.ggml.merges"), BadCheckpoint, 'has no "tokenizer.ggml.merges"'),
        (without("tokenizer.ggml.pre"), UnsupportedModel, '"tokenizer.ggml.pre" is missing'),
        (without("tokenizer.ggml.bos_token_id"), BadCheckpoint, "asks for a token at the beginning"),
        (setting("tokenizer.ggml.pre", "smolm"), UnsupportedModel, "Did you mean: smollm"),
        (setting("tokenizer.ggml.pre", "default"), UnsupportedModel, "can only be guessed"),
        (setting("tokenizer.ggml.model", "rwkv"), UnsupportedModel, "Known: gpt2, llama"),
        (setting("tokenizer.ggml.model", "llama"), BadCheckpoint, 'has no "tokenizer.ggml.scores"'),
        (setting("tokenizer.ggml.something_new", 1), UnsupportedModel, "something_new"),
        (setting("tokenizer.ggml.tokens", TOKENS[:-1]), BadCheckpoint, "has 259 tokens"),
        (setting("tokenizer.ggml.tokens", [*TOKENS[:-1], "th"]), BadCheckpoint, "twice"),
        (setting("tokenizer.ggml.token_type", [1, 2]), BadCheckpoint, "a list of 260 numbers"),
        (setting("tokenizer.ggml.token_type", [9] * 260), BadCheckpoint, "numbers from 1 to 6"),
        (setting("tokenizer.ggml.merges", ["t h", "th x"]), BadCheckpoint, 'entry 1 of "tokenizer.ggml.merges"'),
        (setting("tokenizer.ggml.merges", ["th"]), BadCheckpoint, "expected two tokens that make a third"),
        (setting("tokenizer.ggml.eos_token_id", 260), BadCheckpoint, "a number from 0 to 259"),
        (setting("tokenizer.ggml.add_bos_token", "yes"), BadCheckpoint, "expected true or false"),
        (setting("tokenizer.ggml.add_space_prefix", True), UnsupportedModel, "add_space_prefix"),
        (setting("tokenizer.chat_template", 5), BadCheckpoint, "expected a text"),
        (setting("split.count", 4), BadCheckpoint, "its name does not say which"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_or_is_not_known(
    change: Callable[[Values, Values], None], kind: type[Error], message: str, tmp_path: Path
) -> None:
    metadata, tensors = smallest()
    change(metadata, tensors)
    path = tmp_path / "model.gguf"
    path.write_bytes(file_of(metadata, tensors))
    assert message in said(path, kind)


@pytest.mark.parametrize(
    ("entry", "kind", "message"),
    [
        (("token_embd.weight", (32, 260), 16, 0), UnsupportedModel, "is of the type IQ2_XXS (16)"),
        (("token_embd.weight", (32, 260), 26, 0), UnsupportedModel, "is of the type I32 (26)"),
        (
            ("token_embd.weight", (32, 260), 999, 0),
            UnsupportedModel,
            "with the number 999, which is not known",
        ),
        (("token_embd.weight", (33, 260), 2, 0), BadCheckpoint, "no whole blocks of 32"),
        (("token_embd.weight", (2**40, 260), 0, 0), BadCheckpoint, "which cannot be"),
        (("token_embd.weight", (0, 260), 0, 0), BadCheckpoint, "which cannot be"),
        (("token_embd.weight", (32, 260), 0, 2**50), BadCheckpoint, "it is truncated"),
        (("token_embd.weight", (32, 260), 0, 2**63), BadCheckpoint, "it is truncated"),
        (("token_embd.weight", (32, 260), 0, 5), BadCheckpoint, "expected a multiple of 32"),
        (("token_embd.weight", (1, 1, 1, 1, 1), 0, 0), BadCheckpoint, "has 5 dimensions"),
        (("token_embd.weight", (), 0, 0), BadCheckpoint, "has 0 dimensions"),
        (("x" * 70_000, (1,), 0, 0), BadCheckpoint, "for the bytes of the name of tensor 0"),
    ],
)
def test_tensors_that_cannot_be(entry: Any, kind: type[Error], message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(header_of(smallest()[0], [entry]) + bytes(100_000))
    assert message in said(path, kind)


def test_keys_and_tensors_that_are_there_twice(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    once = header_of({"a": 1}, [])
    path.write_bytes(header_of({}, [], keys=2) + 2 * once[24:])
    assert "has the metadata key 'a' twice" in said(path, BadCheckpoint)
    path.write_bytes(header_of({}, [("a", (1,), 0, 0), ("a", (1,), 0, 0)]) + bytes(64))
    assert "has the tensor 'a' twice" in said(path, BadCheckpoint)


def test_names_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(header_of({}, [], keys=1) + b"\x02\0\0\0\0\0\0\0\xff\xfe" + value_of(1) + bytes(16))
    assert "is not text in UTF-8" in said(path, BadCheckpoint)
    path.write_bytes(_of_kind(77))
    assert "of the unknown type 77" in said(path, BadCheckpoint)
    path.write_bytes(_of_kind(ARRAY, ARRAY))
    assert "an array of arrays" in said(path, BadCheckpoint)


def _of_kind(kind: int, of: int | None = None) -> bytes:
    inner = struct.pack("<IQ", of, 1) if of is not None else b""
    return header_of({}, [], keys=1) + b"\x01\0\0\0\0\0\0\0k" + struct.pack("<I", kind) + inner + bytes(64)


def test_parts_that_are_missing_or_of_another_model(tmp_path: Path) -> None:
    metadata, tensors = smallest()
    names = list(tensors)
    shares = [names[:4], names[4:8], names[8:]]
    paths = [tmp_path / f"model-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    split = {"split.count": 3, "split.tensors.count": Typed(5, len(names))}
    for at, (path, share) in enumerate(zip(paths, shares, strict=True)):
        facts = {**(metadata if at == 0 else {}), "split.no": at, **split}
        path.write_bytes(file_of(facts, {name: tensors[name] for name in share}))
    opened(paths[1])
    third = paths[2].read_bytes()
    paths[2].unlink()
    assert "is missing, one of 3 parts" in said_of(paths[0], paths[2].name)
    paths[2].write_bytes(paths[1].read_bytes())
    assert '"split.no" is 1' in said_of(paths[0], paths[2].name)
    facts = {"split.no": 2, **split}
    paths[2].write_bytes(file_of(facts, {name: tensors[name] for name in names[6:]}))
    assert "is in both" in said_of(paths[0], paths[2].name)
    paths[2].write_bytes(file_of(facts, {}))
    assert "hold 8 tensors, and its header says 11" in said_of(paths[0], paths[0].name)
    paths[2].write_bytes(third)
    opened(paths[0])


def said_of(path: Path, name: str) -> str:
    with pytest.raises(BadCheckpoint) as caught:
        opened(path)
    assert name in str(caught.value)
    return str(caught.value)


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    with pytest.raises(BadCheckpoint, match="is a file, but not in GGUF"):
        find_checkpoint(path)
    folder = tmp_path / "model.gguf"
    folder.mkdir()
    with pytest.raises(BadCheckpoint, match=r"is a folder, not a regular file|has no config.json"):
        find_checkpoint(folder)
    link = tmp_path / "link.gguf"
    link.symlink_to("/etc/passwd")
    with pytest.raises(BadCheckpoint, match="leads to"):
        find_checkpoint(link)


def test_a_folder_with_gguf_files_says_how_to_give_one(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(WHOLE)
    with pytest.raises(BadCheckpoint, match=r"Of its GGUF files give one: -i .*/model\.gguf"):
        find_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadCheckpoint, match=r"1 in GGUF. Download one.* -i model\.gguf"):
        find_checkpoint(tmp_path)


def test_a_file_that_is_called_otherwise(tmp_path: Path) -> None:
    """As other programs keep files, by their hashes."""
    path = tmp_path / "sha256-0123"
    path.write_bytes(WHOLE)
    opened(path)


def test_a_file_that_changes_or_shrinks(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(WHOLE)
    weight = open_gguf(path).weights["model.layers.0.mlp.down_proj.weight"]
    with path.open("r+b") as file:
        file.truncate(len(WHOLE) // 2)
    with pytest.raises(BadCheckpoint, match="has changed since the build began"):
        weight.rows(0, 1)


def test_values_that_are_no_numbers(tmp_path: Path) -> None:
    metadata, tensors = smallest()
    tensors["blk.0.attn_v.weight"][3, 5] = np.nan
    path = tmp_path / "model.gguf"
    path.write_bytes(file_of(metadata, tensors))
    architecture, checkpoint = opened(path)
    with pytest.raises(BadCheckpoint, match="holds nan"):
        Weights(checkpoint, architecture).read(["layers.0.v.weight"])
