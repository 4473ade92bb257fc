"""A whole evaluation, and what it leaves behind."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ortlm
from ortlm.artifact.provenance import Origin, remember
from ortlm.errors import BadOption
from ortlm.evaluation import evaluate as module
from ortlm.evaluation.corpus import TEXTS
from ortlm.evaluation.domains import COLUMNS, domain_table
from ortlm.evaluation.evaluate import evaluate
from ortlm.evaluation.model_card import quality_section
from ortlm.evaluation.quick_check import quick_check
from ortlm.evaluation.report import Report, listed_files
from ortlm.evaluation.sources import ArtifactSource, find_reference

Builds = Callable[[str], Path]


@pytest.fixture(scope="module")
def report(builds: Builds) -> Report:
    return evaluate(builds("int4"), reference=builds("fp32"), layers=True, threads=1)


def without_speed(report: Report) -> dict[str, Any]:
    return {
        key: value for key, value in report.data.items() if key not in ("speed", "created", "environment")
    }


def test_more_bits_are_nearer_and_the_same_is_the_same(builds: Builds, report: Report) -> None:
    int8 = evaluate(builds("int8"), reference=builds("fp32"), tokens=2048, speed=False, threads=1).statistics
    twin = evaluate(
        builds("fp32"), reference=builds("fp32"), tokens=2048, layers=True, speed=False, threads=1
    )
    same = twin.statistics
    assert twin.data["layers"]["snr"] == [None] * 5
    assert "no difference" in twin.to_html()
    assert 10 * int8.kld.value < report.statistics.kld.value
    assert (same.kld.value, same.same_top.value, same.ppl_ratio.value) == (0, 100, 1)


def test_kld_is_that_of_the_logits(builds: Builds) -> None:
    found = evaluate(builds("int4"), reference=builds("fp32"), chunk=256, tokens=256, speed=False, threads=1)
    text = "".join(TEXTS.values())
    quantized, exact = (ortlm.load(builds(name), threads=1) for name in ("int4", "fp32"))
    ids = exact.encode(text)[:256]
    ln_q, ln_p = (
        x - np.log(np.exp(x).sum(1, keepdims=True))
        for x in (lm.logits(ids)[128:255].astype(np.float64) for lm in (quantized, exact))
    )
    kld = (np.exp(ln_p) * (ln_p - ln_q)).sum(1)
    assert found.statistics.scored_tokens == 127
    assert found.statistics.kld.value == pytest.approx(kld.mean(), rel=1e-9)


def test_twice_the_same_figures(builds: Builds, report: Report) -> None:
    again = evaluate(builds("int4"), reference=builds("fp32"), layers=True, speed=False, threads=1)
    assert without_speed(again) == without_speed(report)


def test_report_holds_everything(report: Report) -> None:
    data = json.loads(report.to_json())
    assert data["schema"] == 1
    assert data["text"]["chunk_tokens"] == 512
    assert (
        sum(data["histogram"]["counts"])
        == data["statistics"]["scored_tokens"]
        == data["text"]["scored_tokens"]
    )
    assert sum(row["tokens"] for row in data["kinds"]) == data["statistics"]["scored_tokens"]
    assert len(data["layers"]["snr"]) == 5
    assert all(5 < decibels < 60 for decibels in data["layers"]["snr"])
    assert set(data["artifact"]["files"]) == {"model.onnx", "model.onnx.data", "tokenizer.json"}
    for side in ("artifact", "reference"):
        speed = data["speed"][side]
        assert speed["decode_tokens_per_second"] > 0 < speed["resident_bytes"] <= speed["peak_bytes"]
        assert speed["threads"] == 1
    place = data["worst"][0]
    assert place["kld"] == data["statistics"]["kld_percentiles"]["maximum"]
    assert len(place["top"]) == len(place["base_top"]) == 5


def test_each_domain_is_told_apart(report: Report) -> None:
    rows = domain_table(report.data)
    assert [row[0] for row in rows] == [*TEXTS, "all"]
    assert all(len(row) == len(COLUMNS) for row in rows)
    # The whole is the mean of its domains, weighted by their tokens.
    kinds, figures = report.data["kinds"], report.data["statistics"]
    tokens = figures["scored_tokens"]
    for name, value in (("kld", figures["kld"]["value"]), ("ppl", np.log(figures["ppl"]["value"]))):
        of = [row["tokens"] * row[name]["value"] for row in kinds]
        if name == "ppl":
            of = [row["tokens"] * np.log(row[name]["value"]) for row in kinds]
        assert sum(of) / tokens == pytest.approx(value)
    shares = sum(row["tokens"] * row["same_top"] for row in kinds) / tokens
    assert shares == pytest.approx(figures["same_top"]["value"])
    card, html = quality_section(report.data), report.to_html()
    for row in rows:
        assert f"| {' | '.join(row)} |" in card
        assert row[4] in html
    alone = {**report.data, "kinds": report.data["kinds"][:1]}
    assert domain_table(alone) == []


def test_page_needs_nothing_else(report: Report) -> None:
    html = report.to_html()
    assert not re.search(r"<script|<link|<img|@import|url\(|src=", html)
    assert set(re.findall(r"https?://[^\s\"'<]+", html)) <= {"http://www.w3.org/2000/svg"}
    assert html.count("<svg") == 3
    # Colors come from the page's two sets, for light and for dark.
    assert not re.search(r'(fill|stroke)="#', html)
    assert "prefers-color-scheme: dark" in html
    assert f"{report.statistics.kld.value:.5f}" in html


def test_page_shows_a_frontier_and_escapes_text(report: Report) -> None:
    point = {"name": "int8 <b>", "bytes": 4_000_000, "kld": 0.001}
    here = {"name": "this artifact", "bytes": 2_500_000, "kld": 0.09}
    html = Report(report.artifact, report.statistics, {**report.data, "frontier": [here, point]}).to_html()
    assert html.count("<svg") == 4
    assert "int8 &lt;b&gt;" in html
    assert "int8 <b>" not in html


def test_writing_into_the_artifact(own: Path, builds: Builds, tiny: Path) -> None:
    report = evaluate(own, reference=builds("fp32"), tokens=1024, speed=False, threads=1)
    report.write()
    report.write()
    card = (own / "README.md").read_text(encoding="utf-8")
    assert card.count("## Quality") == 1
    assert card.index("## Use") < card.index("## Quality") < card.index("## Limits")
    info = ortlm.open_artifact(own).manifest.info
    assert info["quality"]["mean_kld"] == report.statistics.kld.value
    assert info["quality"]["chunk_tokens"] == 512
    found = {path.name: path.read_bytes() for path in own.iterdir() if path.name != "ortlm.json"}
    assert {name: entry["sha256"] for name, entry in info["files"].items()} == {
        name: hashlib.sha256(data).hexdigest() for name, data in found.items()
    }
    assert {entry["bytes"] for entry in info["files"].values()} == {len(data) for data in found.values()}
    assert ortlm.load(own, threads=1).generate("def", max_new_tokens=2).token_ids
    # Every file is on the list, so the artifact may be replaced.
    ortlm.build(tiny, own, precision="int4", force=True)
    assert not (own / "report.html").exists()


def test_writing_elsewhere(own: Path, builds: Builds, tmp_path: Path) -> None:
    report = evaluate(own, reference=builds("fp32"), tokens=1024, speed=False, threads=1)
    report.write(tmp_path / "new" / "folder")
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {"report.html", "report.json"}
    info = ortlm.open_artifact(own).manifest.info
    assert "quality" in info
    assert not {"report.html", "report.json"} & set(info["files"])
    assert not (own / "report.html").exists()
    report.write(own / "quality")
    assert "quality/report.html" in ortlm.open_artifact(own).manifest.info["files"]


def test_artifact_of_another_tool_that_gives_the_last_logits_only(own: Path, builds: Builds) -> None:
    """Without ortlm.json nothing says that all logits can be had, so tokens are fed one by one."""
    (own / "ortlm.json").unlink()
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    report = evaluate(own, reference=builds("fp32"), chunk=256, tokens=256, speed=False, threads=1)
    usual = evaluate(builds("int4"), reference=builds("fp32"), chunk=256, tokens=256, speed=False, threads=1)
    assert report.statistics.kld.value == pytest.approx(usual.statistics.kld.value, rel=0.05)
    assert any("token by token" in note for note in report.data["notes"])
    report.write()
    after = {path.name: path.read_bytes() for path in own.iterdir()}
    assert set(after) - set(before) == {"report.html", "report.json"}
    assert all(after[name] == data for name, data in before.items())


def test_a_checkpoint_as_reference(
    own: Path, builds: Builds, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        module, "open_checkpoint", lambda origin, threads: ArtifactSource(builds("fp32"), threads)
    )
    report = evaluate(own, reference=tiny, tokens=1024, speed=False, threads=1, layers=True, drift=False)
    assert report.data["reference"] == {"kind": "checkpoint", "name": "tiny-phi3"}
    assert report.statistics.kld.value > 0


def test_a_checkpoint_equals_its_fp32_build(own: Path, builds: Builds, tiny: Path) -> None:
    streamed = evaluate(own, reference=tiny, tokens=2048, speed=False, layers=True, threads=1)
    loaded = evaluate(own, reference=builds("fp32"), tokens=2048, speed=False, layers=True, threads=1)
    assert streamed.statistics.kld.value == pytest.approx(loaded.statistics.kld.value, rel=1e-4)
    assert streamed.data["layers"]["snr"] == pytest.approx(loaded.data["layers"]["snr"], rel=1e-4)


def test_the_machine_that_built_it_knows_the_checkpoint(own: Path, tiny: Path) -> None:
    assert find_reference(ortlm.open_artifact(own)) == Origin(str(tiny.resolve()))


def test_a_model_of_the_hub_is_called_by_its_name(
    own: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = own / "ortlm.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    record["info"]["source"] = "acme/tiny"
    file.write_text(json.dumps(record), encoding="utf-8")
    snapshot = Path(shutil.copytree(tiny, tmp_path / "snapshots" / ("0123456789" * 4)))
    remember(ortlm.open_artifact(own).manifest, snapshot, ())
    report = evaluate(own, tokens=600, speed=False, threads=1)
    assert report.data["reference"] == {"kind": "checkpoint", "name": "acme/tiny"}


@pytest.mark.parametrize("files", [None, "model.onnx", ["model.onnx"], 3])
def test_list_of_files_that_is_none(own: Path, files: object) -> None:
    record = json.loads((own / "ortlm.json").read_text(encoding="utf-8"))
    record["info"]["files"] = files
    (own / "ortlm.json").write_text(json.dumps(record), encoding="utf-8")
    assert listed_files(ortlm.open_artifact(own)) == {}


def test_reference_that_is_not_named(own: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    with pytest.raises(BadOption, match=r"was built from a local folder, tiny-phi3\. Say with --reference"):
        evaluate(own)
    record = json.loads((own / "ortlm.json").read_text(encoding="utf-8"))
    for info, wanted in (
        ({"source": "microsoft/Phi-3"}, "microsoft/Phi-3"),
        ({"source": "microsoft/Phi-3", "merged_adapter": "french"}, "merged adapter french"),
        ({}, "does not say"),
    ):
        (own / "ortlm.json").write_text(json.dumps({**record, "info": info}), encoding="utf-8")
        artifact = ortlm.open_artifact(own)
        if wanted == info.get("source"):
            assert find_reference(artifact) == Origin(wanted)
        else:
            with pytest.raises(BadOption, match=wanted):
                find_reference(artifact)


def test_other_tokenizers(own: Path, builds: Builds) -> None:
    text = (own / "tokenizer.json").read_text(encoding="utf-8")
    (own / "tokenizer.json").write_text(text.replace("<|system|>", "<|sustem|>"), encoding="utf-8")
    with pytest.raises(BadOption, match="different tokenizers"):
        evaluate(own, reference=builds("fp32"))


def test_quick_check(builds: Builds) -> None:
    found = quick_check(builds("int4"), ArtifactSource(builds("fp32"), 1), threads=1)
    assert found.finite
    assert found.scored_tokens > 100
    assert found.kld is not None
    assert 0.01 < found.kld < 0.3
    assert found.continuation
    alone = quick_check(builds("int4"), threads=1)
    assert (alone.finite, alone.kld, alone.continuation) == (True, None, found.continuation)


def test_quick_check_of_a_broken_model(own: Path, builds: Builds) -> None:
    data = own / "model.onnx.data"
    data.write_bytes(b"\xff" * data.stat().st_size)
    found = quick_check(own, ArtifactSource(builds("fp32"), 1), threads=1)
    assert (found.finite, found.kld, found.continuation) == (False, None, "")
