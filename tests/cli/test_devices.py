"""``ortlm devices``, and --device with its options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import ortlm
from ortlm.cli import main


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that was built for a device that no test machine has."""
    out = tmp_path_factory.mktemp("devices") / "out"
    tiny = Path(__file__).parents[2] / "models" / "tiny-phi3"
    ortlm.build(tiny, out, precision="fp16", target="cuda")
    return out


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["devices"]
    assert found[0]["name"] == "cpu"
    assert found[0]["ready"]
    assert main(["devices"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == [device["name"] for device in found]
    for device, line in zip(found, lines, strict=True):
        if device["install"]:
            assert line.endswith(f"not installed: pip install '{device['install']}'")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 1, "was built for cuda, and this machine cannot run that: "),
        (["--device", "cuda"], 1, "error: onnxruntime "),
        (["--device", "coda"], 2, "there is no device 'coda'"),
        (["--device", "cuda:x"], 2, "after the colon stands a number from 0 on, as cuda:0, found 'x'"),
        (["--device", "cpu", "--device-option", "a=1"], 2, "the CPU has no options, found 'a'"),
        (["--device-option", "use_tf23=1"], 2, "device cuda has no option 'use_tf23'"),
        (["--device-option", "use_tf32=2"], 2, "use_tf32 of device cuda takes 0 or 1, found '2'"),
        (["--device-option", "use_tf32"], 2, "--device-option takes KEY=VALUE, found 'use_tf32'"),
        (
            ["--device-option", "use_tf32=1", "--device-option", "use_tf32=0"],
            2,
            "--device-option use_tf32 is both 1 and 0",
        ),
    ],
)
def test_what_cannot_be(cuda: Path, arguments: list[str], code: int, message: str, capsys: Any) -> None:
    if ortlm_has_cuda():
        pytest.skip("this machine has CUDA")
    assert main(["generate", str(cuda), "fox", *arguments]) == code
    out, err = capsys.readouterr()
    assert message in err
    assert "\n" not in err.strip()
    assert not out


def test_the_cpu_where_it_is_asked_for(cuda: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(cuda), "fox", "-n", "2", "--device", "cpu"]) == 0
    assert capsys.readouterr().out


def ortlm_has_cuda() -> bool:
    from ortlm.runtime.engine.devices import has_device

    return has_device("cuda")
