"""``ortlm bench``: the report as JSON and as a table, and usage errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ortlm.cli import main

SMALL = ["--new", "2", "--runs", "2", "--threads", "1", "--buffer-mb", "4"]


def run(capsys, *arguments):
    """Return stdout and stderr of a command that must succeed."""
    code = main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    assert code == 0, err
    return out, err


def test_the_report(phi, capsys):
    out, err = run(capsys, "bench", phi, "--batch", "2,1", "--context", "8", *SMALL, "--json")
    found = json.loads(out)
    assert found["schema"] == 1
    assert found["environment"]["onnxruntime"]
    assert found["artifact"]["products"] == {"MatMulNBits": found["artifact"]["info"]["layers"] * 4 + 1}
    assert [(row["threads"], row["batch"], row["context"]) for row in found["results"]] == [
        (1, 1, 8), (1, 2, 8)
    ]  # fmt: skip
    one, two = found["results"]
    assert len(one["decode_tokens_per_second"]["samples"]) == 2
    assert one["decode_tokens_per_second"]["min"] > 0
    assert one["bytes_per_token"]["weights"] == found["artifact"]["weight_bytes"]
    assert two["bytes_per_token"]["weights"] == round(found["artifact"]["weight_bytes"] / 2)
    assert one["bytes_per_token"]["cache"] == 9 * found["artifact"]["cache_bytes_per_token"]
    bandwidth = found["threads"][0]["bandwidth_bytes_per_second"]["median"]
    rate = one["bytes_per_token"]["total"] * one["decode_tokens_per_second"]["median"]
    assert one["decode_bandwidth_share"] == pytest.approx(rate / bandwidth)
    assert err.splitlines()[-1] == "run 2 of 2, 1 thread: the model, 2 shapes"


def test_the_table_of_a_folder_without_manifest(phi, capsys, tmp_path):
    shutil.copytree(phi, tmp_path / "m")
    Path(tmp_path / "m" / "ortlm.json").unlink()
    out, err = run(capsys, "bench", tmp_path / "m", "--context", "8", *SMALL, "-q")
    assert err == ""
    assert "weights in matmuls" in out
    assert "median (min-max) of 2 runs, 2 new tokens" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "--batch takes numbers from 1 on"),
        (["--batch", "1,"], "--batch takes numbers from 1 on"),
        (["--context", "4,4"], "--context names a number twice"),
        (["--context", "1e2"], "--context takes numbers from 1 on"),
        (["--threads", "two"], "--threads takes numbers from 1 on"),
        (["--new", "0"], "--new must be at least 1"),
        (["--runs", "0"], "--runs must be at least 1"),
        (["--context", "500", "--new", "20"], "need a context of 520, but that of"),
        (
            ["--device", "gpu", *SMALL, "--context", "8"],
            "there is no device 'gpu'. Did you mean: cuda?",
        ),
    ],
)
def test_wrong_use(phi, capsys, arguments, message):
    assert main(["bench", phi, *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""
