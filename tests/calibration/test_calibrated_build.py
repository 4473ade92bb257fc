"""Calibrated builds: better than rounding, the same after an interruption, and what they refuse."""

from __future__ import annotations

import json
import mailbox
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ortlm
from ortlm._utils.cpu import integers_overflow
from ortlm.builder.options import BuildOptions
from ortlm.builder.planning import prepare
from ortlm.builder.request import BuildRequest
from ortlm.calibration import run as calibration
from ortlm.calibration.dataset import Reader, _draw, read_rows, write_rows
from ortlm.calibration.openings import OPENINGS
from ortlm.errors import BadOption
from ortlm.layerwise.reference import open_reference
from ortlm.quant.recipe import Rule
from tests.architectures import families, oracle

TOKENS = 2048


def calibrated(**changes: Any) -> BuildOptions:
    return BuildOptions(**{"recipe": "balanced", "calibration_tokens": TOKENS, **changes})


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of text like that which the shipped model was trained on."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        "\n".join(Path(m.__file__ or "").read_text(encoding="utf-8") for m in (json.decoder, json.encoder))
    )
    return path


@pytest.fixture(scope="module")
def divergence(tiny: Path) -> Callable[[Path], float]:
    """Return a function that measures the mean KL divergence of a folder from the checkpoint, on unseen text."""
    ids = Reader.open(tiny, 2048).tokenizer.encode(Path(mailbox.__file__).read_text(encoding="utf-8"))
    chunks = [np.array(ids[a : a + 200]) for a in range(3000, 6000, 500)]
    reference = open_reference(tiny, threads=1)
    reference.open(chunks)
    want = [oracle_logs(reference.logits(i)) for i in range(len(chunks))]
    reference.close()

    def measure(folder: Path) -> float:
        lm = ortlm.load(folder, threads=1)
        found = [oracle_logs(lm.logits(chunk.tolist())) for chunk in chunks]
        return float(
            np.mean([(np.exp(p) * (p - q)).sum(-1).mean() for p, q in zip(want, found, strict=True)])
        )

    return measure


def oracle_logs(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def data(folder: Path) -> bytes:
    return (folder / "model.onnx.data").read_bytes()


@pytest.mark.parametrize("algorithm", ["importance", "awq", "gptq", "awq_gptq"])
def test_better_than_rounding(
    algorithm: str, tiny: Path, tmp_path: Path, text: Path, divergence: Callable[[Path], float]
) -> None:
    options = {"bits": 4, "block_size": 128, "calibration": str(text), "algorithm": algorithm}
    ortlm.build(tiny, tmp_path / "out", options=calibrated(**options))
    ortlm.build(tiny, tmp_path / "rtn", options=BuildOptions(recipe="fast", block_size=128))
    assert divergence(tmp_path / "out") < 0.9 * divergence(tmp_path / "rtn")


@pytest.mark.parametrize("integer", [False, True])
def test_with_and_without_integer_matmul(
    integer: bool,
    tiny: Path,
    tmp_path: Path,
    text: Path,
    divergence: Callable[[Path], float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Processors without fast integer matmul compute in fp32; the models are as good."""
    if integer and integers_overflow():
        pytest.skip("sums of second moments overflow here, and are never computed by integers")
    monkeypatch.setattr(calibration, "fast_integer_matmul", lambda: integer)
    ortlm.build(tiny, tmp_path / "out", options=calibrated(calibration=str(text), calibration_tokens=8192))
    assert divergence(tmp_path / "out") < 0.0035


@pytest.mark.parametrize("target", ["cuda", "dml", "webgpu", "mobile"])
def test_every_target(target: str, tiny: Path, tmp_path: Path, text: Path) -> None:
    options = calibrated(calibration=str(text))
    built = ortlm.build(tiny, tmp_path / "out", target=target, options=options)
    logits = ortlm.load(built.path, threads=1, device="cpu").logits([1, 2, 3, 4])
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("name", sorted(families.FAMILIES))
def test_every_family(name: str, saved: Any, tmp_path: Path) -> None:
    """Random models of every structure: nothing fails, and the result is near the float model."""
    row = saved(name)
    ids = np.random.default_rng(0).integers(5, 280, 1024)
    np.save(tmp_path / "ids.npy", ids)
    options = calibrated(calibration=str(tmp_path / "ids.npy"), calibration_tokens=1024, block_size=16)
    built = ortlm.build(row.folder, tmp_path / "out", options=options, threads=1)
    prompt = ids[:24].tolist()
    got, want = ortlm.load(built.path, threads=1).logits(prompt), oracle.prompt_logits(row.model, prompt)
    assert oracle.relative_error(got, want) < 0.5
    assert built.manifest.info["calibration"]["source"] == "the file ids.npy"


def test_experts_that_few_tokens_chose_are_rounded(saved: Any, tmp_path: Path) -> None:
    """Calibration helps, and the manifest says which experts it left alone."""
    row = saved("qwen3-moe")
    ids = np.random.default_rng(0).integers(5, 280, 8192)
    np.save(tmp_path / "ids.npy", ids)
    tokens = np.random.default_rng(1).integers(5, 280, 300).tolist()
    want = oracle.prompt_logits(row.model, tokens)

    def build(name: str, count: int, **changes: Any) -> tuple[dict[str, Any], float]:
        options = calibrated(
            calibration=str(tmp_path / "ids.npy"), calibration_tokens=count, bits=4, block_size=32, **changes
        )
        built = ortlm.build(row.folder, tmp_path / name, options=options, threads=1)
        got = ortlm.load(built.path, threads=1).logits(tokens)
        found: dict[str, Any] = dict(built.manifest.info.get("experts", {}))
        return found, oracle.relative_error(got, want)

    experts, error = build("many", 8192)
    # 8 experts of two layers have three matrices each.
    assert experts == {"calibrated": 48, "rounded": {}}
    few, _ = build("few", 24)
    rounded = {part: set(numbers) for part, numbers in few["rounded"].items()}
    assert 0 < few["calibrated"] < 48
    assert few["calibrated"] + sum(map(len, rounded.values())) == 48
    # Gate and up are multiplied by the same tokens; down has half as many inputs, and needs half as many.
    for layer in range(2):
        gate, up, down = (rounded.get(f"layers.{layer}.expert_{p}", set()) for p in ("gate", "up", "down"))
        assert gate == up >= down
    _, plain = build("rtn", 24, algorithm="rtn")
    assert error < 0.9 * plain


def test_tokens_are_drawn_by_their_probabilities() -> None:
    random = np.random.default_rng(0)
    logits = (2 * random.standard_normal(1000)).astype(np.float32)
    logits[300:700] = -np.inf
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    counts = np.zeros(1000)
    for _ in range(50):
        np.add.at(counts, _draw(np.tile(logits, (1000, 1)), random), 1)
    possible = probabilities > 0
    assert not counts[~possible].any()
    expected = 50_000 * probabilities[possible]
    chi_square = ((counts[possible] - expected) ** 2 / expected).sum()
    # 599 degrees of freedom, whose standard deviation is 35.
    assert chi_square < 599 + 4 * 35


def test_text_of_its_own(tiny: Path, tmp_path: Path, divergence: Callable[[Path], float]) -> None:
    """Without a file, the model writes the text; twice the same."""
    one = ortlm.build(tiny, tmp_path / "one", options=calibrated())
    ortlm.build(tiny, tmp_path / "two", options=calibrated())
    ortlm.build(tiny, tmp_path / "rtn", options=BuildOptions(recipe="fast"))
    assert data(tmp_path / "one") == data(tmp_path / "two")
    assert divergence(one.path) < 0.9 * divergence(tmp_path / "rtn")
    assert one.manifest.info["calibration"]["source"] == "text that the model writes itself"
    assert "that the model writes itself" in (one.path / "README.md").read_text(encoding="utf-8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "rtn", "two"]


def test_its_text_continues_openings(tiny: Path, tmp_path: Path) -> None:
    """Every other row holds two, one after the other, and those of a seed are the same each time."""
    artifact = ortlm.build(tiny, tmp_path / "fast", options=BuildOptions(recipe="fast"))
    told: list[int] = []
    how: Any = {"count": 4, "length": 256, "seed": 3, "threads": 1, "advance": told.append}
    rows = write_rows(artifact, **how)
    assert [len(row) for row in rows] == [256] * 4
    assert sum(told) == 4 * 256
    tokenizer = ortlm.load(tmp_path / "fast").tokenizer
    encoded = [tokenizer.encode(opening, add_special_tokens=False)[:64] for opening in OPENINGS]

    def begins(part: np.ndarray) -> list[int]:
        """Return which openings ``part`` begins with, after a token that begins a text."""
        ids = part.tolist()
        return [i for i, o in enumerate(encoded) if o in (ids[: len(o)], ids[1 : 1 + len(o)])]

    assert [begins(row[:128]) for row in rows] == [[3], [], [4], []]
    assert [len(begins(row[128:])) for row in rows] == [1, 0, 1, 0]
    assert all(np.array_equal(a, b) for a, b in zip(rows, write_rows(artifact, **how), strict=True))


def test_resumed_gives_the_same_bytes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Path
) -> None:
    options, out = calibrated(calibration=str(text)), tmp_path / "out"
    ortlm.build(tiny, tmp_path / "whole", options=options, threads=1)
    layers = []

    class Watched(calibration.LayerQuantizer):
        def __init__(self, *args: Any, **keywords: Any) -> None:
            layers.append(len(layers))
            if len(layers) == 3:
                raise KeyboardInterrupt
            super().__init__(*args, **keywords)

    monkeypatch.setattr(calibration, "LayerQuantizer", Watched)
    with pytest.raises(KeyboardInterrupt):
        ortlm.build(tiny, out, options=options, threads=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.calibration", "whole"]
    ortlm.build(tiny, out, options=options, threads=1)
    # Two layers were done: two more, and the head, follow.
    assert len(layers) == 3 + 3
    assert data(out) == data(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_what_was_interrupted_is_not_taken_for_another(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Path
) -> None:
    out = tmp_path / "out"
    finish = calibration.CalibrationProgress.finish

    def interrupted(self: Any, done: int, streams: Sequence[Any]) -> None:
        finish(self, done, streams)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(calibration.CalibrationProgress, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ortlm.build(tiny, out, options=calibrated(calibration=str(text)))
    changed = calibrated(calibration=str(text), block_size=64)
    ortlm.build(tiny, out, options=changed)
    ortlm.build(tiny, tmp_path / "clean", options=changed)
    assert data(out) == data(tmp_path / "clean")


def test_rules_and_kept_floats(tiny: Path, tmp_path: Path, text: Path) -> None:
    options = calibrated(
        calibration=str(text),
        rules=(Rule(roles=("qkv",), layers=(-1,), bits=8), Rule(nodes=("*/layers.1/mlp/*",), bits=0)),
    )
    prepared = prepare(BuildRequest(tiny, options=options))
    schemes = {i.parameters[0]: i.scheme.bits for i in prepared.emitted.builder.plan.calibrated}
    assert schemes["layers.3.q.weight"] == 8
    assert schemes["layers.2.q.weight"] == 6
    assert not {"layers.1.gate.weight", "layers.1.down.weight"} & set(schemes)
    built = ortlm.build(tiny, tmp_path / "out", options=options)
    assert np.isfinite(ortlm.load(built.path, threads=1).logits([1, 2, 3])).all()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", b"too short", r"has \d+ tokens, and calibration reads rows of 128"),
        ("t.txt", b"\xff\xfe" * 3000, "is not text in UTF-8"),
        ("t.jsonl", b"{broken", "line 1 cannot be read as JSON"),
        ("t.jsonl", b'{"other": 1}', "has none of messages, text, input_ids and tokens, but other"),
        ("t.jsonl", b"[1, 2, 99999]", "99999, which is no token id: those are 0 to 2047"),
        ("t.npy", b"nothing", "is not an array that numpy saved"),
    ],
)
def test_files_that_cannot_be_read(
    name: str, content: bytes, message: str, tiny: Path, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadOption, match=message):
        ortlm.build(tiny, tmp_path / "out", options=calibrated(calibration=str(path)))
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_documents_of_all_kinds(tiny: Path, tmp_path: Path) -> None:
    reader = Reader.open(tiny, 2048)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    lines = ["a text", [5, 6, 7], {"text": "more"}, {"messages": chat}, {"input_ids": [8, 9]}, chat]
    path = tmp_path / "all.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines * 20) + "\n", encoding="utf-8")
    rows = read_rows(path, reader, count=4, length=32)
    assert [len(row) for row in rows] == [32] * 4
    text = tmp_path / "large.txt"
    text.write_text("one two three. " * 5000, encoding="utf-8")
    assert len(read_rows(text, reader, count=8, length=64)) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotate": True, "hidden_states": True}, "changes what hidden states mean"),
        ({"calibration": "/nowhere.txt"}, "is not a file"),
        ({"calibration_tokens": 3}, "at least 16 tokens"),
        ({"recipe": "balancd"}, "Did you mean: balanced"),
        ({"algorithm": "gtpq"}, "Did you mean: gptq"),
    ],
)
def test_options_that_cannot_be(changes: dict[str, Any], message: str, tiny: Path) -> None:
    with pytest.raises(BadOption, match=message):
        prepare(BuildRequest(tiny, options=calibrated(**changes)))
