"""What ``ortlm serve`` refuses before it loads anything."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest

from ortlm.cli import main


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 can be reached by others, and there is no key"),
        (["--port", "70000"], "--port must be from 0 to 65535, found 70000"),
        (["--api-key", ""], "--api-key must not be empty"),
        (["--api-key", "x", "--no-api-key"], "--no-api-key does not go with keys"),
        (["--api-key-file", "nowhere"], "--api-key-file nowhere cannot be read"),
        (["--drain", "-1"], "--drain must be 0 or more seconds, found -1"),
        (["--drain", "nan"], "--drain must be 0 or more seconds, found nan"),
        (["--max-body", "0"], "--max-body must be"),
        (["--replicas", "2"], "--replicas is for clusters only; add --ray ADDRESS"),
        (["--sessions"], "--sessions is for clusters only"),
        (["--stop"], "--stop is for clusters only"),
    ],
)
def test_what_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "nothing", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "ortlm" and name.endswith("server.app"):
            raise ModuleNotFoundError("No module named 'fastapi'", name="fastapi")
        return usual(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert main(["serve", "nothing"]) == 2
    assert "needs fastapi, which is not installed: pip install 'ortlm[serve]'" in capsys.readouterr().err


def test_a_folder_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fastapi")
    assert main(["serve", str(tmp_path), "--port", "0"]) == 1
    assert "genai_config.json" in capsys.readouterr().err
    assert main(["serve", f"a={tmp_path}", "--port", "0", "--batch-size", "0"]) == 2
    assert "batch must be a whole number, 1 or more" in capsys.readouterr().err
