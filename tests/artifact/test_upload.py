"""Upload to a hub and running from there, against a small server on this machine."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import ortlm
from ortlm.artifact.download import is_name, listed_files, verify
from ortlm.artifact.upload import prepare_upload
from ortlm.errors import BadArtifact, BadOption
from tests.artifact.hub_server import TOKEN, HubServer

NAME = "user/tiny-int4"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    made = HubServer()
    yield made
    made.close()


@pytest.fixture(scope="module")
def built(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build with its check, as the command makes it."""
    out = tmp_path_factory.mktemp("built") / "tiny"
    command = [sys.executable, "-m", "ortlm", "build", "-i", str(tiny), "-o", str(out), "--recipe", "fast"]
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return out


def run(hub: HubServer, cache: Path, *args: str, token: str | None = TOKEN, **more: str) -> Any:
    """Run a command in a process whose hub is this one."""
    return subprocess.run(
        [sys.executable, "-m", "ortlm", *args],
        capture_output=True,
        text=True,
        cwd=cache,
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": ":".join(sys.path),
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(cache / "home"),
            "XDG_CACHE_HOME": str(cache / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **({"HF_TOKEN": token} if token else {}),
            **more,
        },
    )


def test_up_and_down_again(hub: HubServer, built: Path, tmp_path: Path) -> None:
    """What was uploaded runs by its name, the same as from its folder, and is downloaded once."""
    done = run(hub, tmp_path, "upload", str(built), NAME, "--base-model", "acme/tiny", "--message", "First")
    assert done.returncode == 0, done.stderr
    assert f"to {NAME} (private)" in done.stdout
    assert hub.private[NAME]
    assert hub.messages == ["First"]
    files = hub.files[NAME]
    listed = json.loads(files["ortlm.json"])["info"]["files"]
    assert files.keys() == {*listed, "ortlm.json"}
    assert files["model.onnx.data"] == (built / "model.onnx.data").read_bytes()
    told = ("generate", NAME, "Once upon", "-n", "8", "--temp", "0")
    first = run(hub, tmp_path, *told)
    assert first.returncode == 0, first.stderr
    here = run(hub, tmp_path, "generate", str(built), *told[2:])
    assert first.stdout == here.stdout
    before = len(hub.served)
    assert before >= len(listed)
    again = run(hub, tmp_path, *told)
    offline = run(hub, tmp_path, *told, HF_HUB_OFFLINE="1")
    assert (again.stdout, offline.stdout) == (first.stdout, first.stdout)
    assert len(hub.served) == before
    shown = run(hub, tmp_path, "inspect", f"{NAME}@{hub.commits[NAME]}", "--json")
    assert json.loads(shown.stdout)["context_tokens"] == ortlm.open_artifact(built).manifest.context_tokens


def test_the_card(hub: HubServer, built: Path, tmp_path: Path) -> None:
    """Base model, license, tags, quality and commands; nothing of the machine in any text."""
    done = run(hub, tmp_path, "upload", str(built), NAME, "--base-model", "acme/tiny", "--public", "--json")
    facts = json.loads(done.stdout)
    assert (facts["private"], facts["base_model"]) == (False, "acme/tiny")
    card = hub.files[NAME]["README.md"].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["base_model"], front["base_model_relation"]) == ("acme/tiny", "quantized")
    assert {"onnx", "onnxruntime", "int4"} <= set(front["tags"])
    assert front.get("license") == facts["license"]
    check = json.loads((built / "ortlm.json").read_text())["info"]["check"]
    assert f"| Mean KL divergence | {check['kld']:.5f} nats |" in card
    assert f"ortlm generate {NAME}" in card
    assert "FOLDER" not in card
    host = socket.gethostname()
    for name, data in hub.files[NAME].items():
        if name.endswith((".json", ".md")):
            text = data.decode()
            assert str(built.parent) not in text
            assert str(tmp_path) not in text
            assert host == "localhost" or host not in text


def test_a_text_that_names_the_machine_is_refused(built: Path, tmp_path: Path, monkeypatch: Any) -> None:
    copy = Path(shutil.copytree(built, tmp_path / "copy"))
    card = (copy / "README.md").read_text()
    for word in (str(tmp_path), "build-host-7"):
        monkeypatch.setattr(socket, "gethostname", lambda: "build-host-7")
        (copy / "README.md").write_text(card + f"\nMade in {word}.\n")
        with pytest.raises(BadOption, match=f"README.md names {word}, which is of this machine"):
            prepare_upload(copy, NAME)


def test_what_is_not_uploaded(built: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built, tmp_path / "copy"))
    (copy / "notes.txt").write_text("mine")
    found = prepare_upload(copy, NAME)
    assert found.left == ("notes.txt",)
    assert "notes.txt" not in found.files
    data = copy / "model.onnx.data"
    raw = bytearray(data.read_bytes())
    raw[10] ^= 1
    data.write_bytes(bytes(raw))
    with pytest.raises(BadArtifact, match=r"model.onnx.data is not the file that ortlm.json lists"):
        prepare_upload(copy, NAME)
    data.unlink()
    with pytest.raises(BadArtifact, match=r"is missing"):
        prepare_upload(copy, NAME)
    for name in ("tiny", "a/b/c", "a b/c", "", "user/..", "/user/x"):
        with pytest.raises(BadOption, match="cannot be a model's name on the hub"):
            prepare_upload(built, name)


def test_a_dry_run_asks_nobody(hub: HubServer, built: Path, tmp_path: Path) -> None:
    hub.refusal = 500
    done = run(hub, tmp_path, "upload", str(built), NAME, "--dry-run", token=None)
    assert done.returncode == 0, done.stderr
    assert "would upload" in done.stdout
    assert "model.onnx.data" in done.stdout


def test_refusals_say_what_to_do(hub: HubServer, built: Path, tmp_path: Path) -> None:
    for token, refusal, said in (
        (None, None, "needs a token with write access"),
        ("hf_wrong", None, "needs a token with write access"),
        (TOKEN, 403, "this token may not. Give one with write access to user"),
        (TOKEN, 500, "could not be uploaded"),
    ):
        hub.refusal = refusal
        done = run(hub, tmp_path, "upload", str(built), NAME, token=token)
        assert done.returncode == 1, done.stderr
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    hub.refusal = None
    assert run(hub, tmp_path, "upload", str(built), NAME, "--public").returncode == 0
    done = run(hub, tmp_path, "upload", str(built), NAME)
    assert done.returncode == 2
    assert "everybody can read it. Say --public" in done.stderr


def test_what_was_changed_on_the_hub_does_not_run(hub: HubServer, built: Path, tmp_path: Path) -> None:
    assert run(hub, tmp_path, "upload", str(built), NAME).returncode == 0
    good = dict(hub.files[NAME])
    told = ("generate", NAME, "Once", "-n", "2")
    for change, said in (
        (
            {"model.onnx.data": good["model.onnx.data"][:-1] + b"\x01"},
            "is not the file that ortlm.json lists",
        ),
        ({"tokenizer.json": good["tokenizer.json"] + b" "}, "is not the file that ortlm.json lists"),
        ({"tokenizer.json": None}, "is missing"),
        ({"ortlm.json": None}, "has no ortlm.json, so that ortlm did not build it"),
        ({"ortlm.json": b'{"info": {"files": {"../x": {}}}}'}, "lies outside the artifact's folder"),
        ({"ortlm.json": b'{"info": {"files": {"x": {"bytes": 3}}}}'}, "has no size and hash for 'x'"),
        ({"ortlm.json": b"{}"}, "lists no files with their hashes"),
    ):
        hub.files[NAME] = {n: d for n, d in {**good, **change}.items() if d is not None}
        hub.changed(NAME)
        done = run(hub, tmp_path, *told)
        assert done.returncode == 1, done.stdout
        assert said in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    # The card computes nothing, and people edit it.
    hub.files[NAME] = good | {"README.md": b"---\n---\nedited"}
    hub.changed(NAME)
    assert run(hub, tmp_path, *told).returncode == 0
    done = run(hub, tmp_path, "generate", NAME, "Once", token=None, XDG_CACHE_HOME=str(tmp_path / "empty"))
    assert done.returncode == 1
    assert "is neither a folder here nor a model on the hub that may be read" in done.stderr
    done = run(hub, tmp_path, "generate", f"{NAME}2", "Once", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set, and it was not downloaded before" in done.stderr
    done = run(hub, tmp_path, "evaluate", NAME)
    assert done.returncode == 2
    assert "give a folder for the reports with -o" in done.stderr


def test_what_is_a_name(tmp_path: Path, monkeypatch: Any) -> None:
    """A path is never taken for a name where something of the path is there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert is_name("user/phi-int4")
    assert is_name("user/phi.int4@v1.0")
    for path in (
        "models/phi",
        "phi",
        "./user/phi",
        "/user/phi",
        "a/b/c",
        "user/",
        "~/phi",
        "user/phi@",
        "..//x",
    ):
        assert not is_name(path)
    with pytest.raises(BadArtifact, match="is not a folder"):
        ortlm.open_artifact("models/phi")


def test_hashes_of_a_build(built: Path) -> None:
    manifest = json.loads((built / "ortlm.json").read_text())
    verify(built, listed_files(manifest, built / "ortlm.json"))
