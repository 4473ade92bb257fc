"""Downloading, against a small server on this machine that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from ortlm.checkpoint.hub import find_checkpoint
from ortlm.errors import BadCheckpoint, BadOption

QUICK = ("--recipe", "fast", "--no-check")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves the files of ``folder`` as the model acme/tiny; ``served`` lists the files that were asked for."""

    def __init__(self, folder: Path) -> None:
        self.files = {f.name: f.read_bytes() for f in folder.iterdir()}
        self.files["pytorch_model.bin"] = b"x" * 1000
        self.files["onnx/model.onnx"] = b"x" * 1000
        self.served: list[str] = []
        self.revisions: set[str] = set()
        self.token: str | None = None
        self.refusal: int | None = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def _answer(self, *, body: bool) -> None:
                path = unquote(self.path.partition("?")[0])
                if hub.refusal:
                    self._send(hub.refusal, b'{"error": "no"}', {"X-Error-Message": "no"}, body=body)
                elif hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                    self._send(
                        401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"}, body=body
                    )
                elif path.startswith("/api/models/acme/tiny/tree/"):
                    entries = [
                        {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                        for n, d in hub.files.items()
                    ]
                    self._send(
                        200, json.dumps(entries).encode(), {"Content-Type": "application/json"}, body=body
                    )
                elif path.endswith("/revision/none"):
                    self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body=body)
                elif path.startswith("/api/models/acme/tiny"):
                    hub.revisions |= {path.rpartition("/revision/")[2]} if "/revision/" in path else set()
                    found = {
                        "id": "acme/tiny",
                        "modelId": "acme/tiny",
                        "sha": COMMIT,
                        "siblings": [{"rfilename": n} for n in hub.files],
                    }
                    self._send(
                        200, json.dumps(found).encode(), {"Content-Type": "application/json"}, body=body
                    )
                elif path.startswith("/acme/tiny/resolve/"):
                    name = path.split("/", 5)[5]
                    if name not in hub.files:
                        self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body=body)
                        return
                    if body:
                        hub.served.append(name)
                    data = hub.files[name]
                    headers = {
                        "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                        "X-Repo-Commit": COMMIT,
                        "Accept-Ranges": "bytes",
                    }
                    self._send(200, data, headers, body=body)
                else:
                    self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body=body)

            def _send(self, code: int, data: bytes, headers: dict[str, str], *, body: bool) -> None:
                self.send_response(code)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if body:
                    self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def build(
        self, out: Path, cache: Path, *args: str, name: str = "acme/tiny"
    ) -> subprocess.CompletedProcess[str]:
        """Run the command as a user does, in a process whose hub is this one."""
        return subprocess.run(
            [
                sys.executable,
                "-m",
                "ortlm",
                "build",
                "-m",
                name,
                "-o",
                str(out),
                "-c",
                str(cache),
                *QUICK,
                *args,
            ],
            capture_output=True,
            text=True,
            env={
                "PATH": "/usr/bin:/bin",
                "PYTHONPATH": ":".join(sys.path),
                "HF_ENDPOINT": self.address,
                # Ten by default, which a hub that never answers takes several times.
                "HF_HUB_ETAG_TIMEOUT": "5",
                "HF_HOME": str(cache / "home"),
                "XDG_CACHE_HOME": str(cache / "notes"),
                "HF_HUB_DISABLE_XET": "1",
            },
        )


@pytest.fixture
def hub(tiny: Path) -> Iterator[Hub]:
    made = Hub(tiny)
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_download_once_and_only_what_is_needed(hub: Hub, tmp_path: Path) -> None:
    done = hub.build(tmp_path / "out", tmp_path / "cache", "-p", "int4", "-e", "cpu")
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in hub.served
    assert not {"pytorch_model.bin", "onnx/model.onnx"} & set(hub.served)
    info = json.loads((tmp_path / "out" / "ortlm.json").read_text())["info"]
    assert (info["source"], info["revision"]) == ("acme/tiny", COMMIT)
    assert "base_model: acme/tiny" in (tmp_path / "out" / "README.md").read_text()
    before = len(hub.served)
    assert hub.build(tmp_path / "two", tmp_path / "cache").returncode == 0
    assert len(hub.served) == before


def test_gated_and_unknown(hub: Hub, tmp_path: Path) -> None:
    done = hub.build(tmp_path / "out", tmp_path / "cache", name="acme/other")
    assert done.returncode == 1
    assert "no model 'acme/other'" in done.stderr
    hub.token = "secret"
    done = hub.build(tmp_path / "out", tmp_path / "cache")
    assert done.returncode == 1
    assert "acme/tiny is gated" in done.stderr
    done = hub.build(tmp_path / "out", tmp_path / "cache", "--extra_options", "hf_token=secret")
    assert done.returncode == 0, done.stderr
    assert "secret" not in (tmp_path / "out" / "ortlm.json").read_text()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a/b c", "cannot be a model's name"),
        ("user/repo@", "has no revision after '@'"),
        ("a/b#x", "cannot be a model's name"),
        ("a/b:latest", "cannot be a model's name"),
        ("a/b.git", "-m a/b."),
        ("a/..", "cannot be a model's name"),
        ("a/b--c", "cannot be a model's name"),
        ("a/" + "b" * 300, "at most 96 letters"),
        ("x" * 5_000 + "/" + "y" * 5_000, "at most 96 letters"),
        ("ä/b?", "cannot be a model's name"),
        ("a/b\n", "has blanks around it"),
        (" a/b", "has blanks around it"),
        ("", "is empty"),
        ("a/b\x00c", "cannot be a model's name"),
        ("https://huggingface.co/acme/tiny", "-m acme/tiny."),
        ("https://huggingface.co/acme/tiny/tree/main", "-m acme/tiny."),
        ("http://hf.co/acme/tiny.git", "-m acme/tiny."),
        ("huggingface.co/acme/tiny?x=1", "-m acme/tiny."),
        ("https://huggingface.co/", "-m ORGANIZATION/NAME"),
        ("git@hf.co:acme/tiny", "-m ORGANIZATION/NAME"),
        ("https://example.com/a/b", "is an address"),
        ("a/model.Q4_K_M.gguf", "is not there. Give the path of a GGUF file"),
    ],
)
def test_names_that_users_type(name: str, said: str) -> None:
    with pytest.raises(BadOption, match=re.escape(said)) as error:
        find_checkpoint(name)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "name", ["/nowhere/at/all", "./nothing", "~/models/x", "gpt2", "a/b/c", "models\\phi"]
)
def test_folders_that_are_not_there(name: str) -> None:
    with pytest.raises(BadCheckpoint, match="is neither a folder here nor a model's name"):
        find_checkpoint(name)


def test_weights_are_picked_as_from_a_folder(hub: Hub, tmp_path: Path) -> None:
    """A stale index next to the whole file counts for nothing, and nothing else is downloaded."""
    index = {"weight_map": {"w": "model-00001-of-00001.safetensors"}}
    hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
    others = ("model-00001-of-00001.safetensors", "consolidated.safetensors", "model.fp16.safetensors")
    unwanted = (*others, "onnx/config.json", "images/notes.txt", "tf_model.h5")
    hub.files |= dict.fromkeys(unwanted, b"x")
    hub.files["additional_chat_templates/tool_use.jinja"] = b"{{ messages }}"
    done = hub.build(tmp_path / "out", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in hub.served
    assert "additional_chat_templates/tool_use.jinja" in hub.served
    assert not set(unwanted) & set(hub.served)


def test_a_variant_alone(hub: Hub, tmp_path: Path) -> None:
    hub.files["model.fp16.safetensors"] = hub.files.pop("model.safetensors")
    done = hub.build(tmp_path / "out", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert "model.fp16.safetensors" in hub.served
    del hub.files["model.fp16.safetensors"]
    done = hub.build(tmp_path / "two", tmp_path / "other")
    assert done.returncode == 1
    # Of PyTorch's files the same is asked for only then.
    assert "pytorch_model.bin cannot be read as tensors" in done.stderr
    assert "pytorch_model.bin" in hub.served


def test_a_revision_and_a_folder(hub: Hub, tmp_path: Path) -> None:
    inside = {f"models/int4 v2/{name}": data for name, data in hub.files.items() if "/" not in name}
    hub.files = {**inside, "README.md": b"", "models/other/config.json": b"{}"}
    done = hub.build(
        tmp_path / "out", tmp_path / "cache", "--subfolder", "models/int4 v2/", name="acme/tiny@v1.0"
    )
    assert done.returncode == 0, done.stderr
    assert hub.revisions == {"v1.0"} or "v1.0" in hub.revisions
    assert all(name.startswith("models/int4 v2/") for name in hub.served)
    info = json.loads((tmp_path / "out" / "ortlm.json").read_text())["info"]
    assert (info["source"], info["revision"]) == ("acme/tiny", COMMIT)
    for args, said in (
        (
            ("--subfolder", "nowhere"),
            "acme/tiny has no folder 'nowhere' on the hub; it has models/int4 v2, models/",
        ),
        (("--subfolder", "../x"), "is no folder of a repository"),
        (("--revision", "none"), "has no revision 'none' on the hub. Give a branch"),
    ):
        done = hub.build(tmp_path / "wrong", tmp_path / "cache", *args)
        assert done.returncode in (1, 2)
        assert said in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("status", "said"), [(401, "token that was sent is not valid"), (403, "may not read it")]
)
def test_a_hub_that_refuses_a_token(status: int, said: str, hub: Hub, tmp_path: Path) -> None:
    hub.refusal = status
    done = hub.build(tmp_path / "out", tmp_path / "cache", "--extra_options", "hf_token=hf_wrong")
    assert done.returncode == 1
    assert f"the hub refuses acme/tiny ({status}): " in done.stderr
    assert said in done.stderr
    assert "hf_wrong" not in done.stderr


def test_local_trees_of_hubs(tiny: Path, tmp_path: Path) -> None:
    """The hub library's cache stands for the revision in it; ModelScope's folders are plain ones."""
    cache = tmp_path / "models--acme--tiny"
    snapshot = cache / "snapshots" / COMMIT
    shutil.copytree(tiny, snapshot)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    found = find_checkpoint(cache)
    assert (found.folder, found.source, found.revision) == (snapshot, "acme/tiny", COMMIT)
    shutil.copytree(tiny, cache / "snapshots" / ("f" * 40))
    (cache / "refs" / "main").unlink()
    with pytest.raises(BadCheckpoint, match=r"with 2 revisions, and says of none .* Give one: -i"):
        find_checkpoint(cache)
    scope = tmp_path / "modelscope" / "hub" / "acme" / "tiny___1.5"
    shutil.copytree(tiny, scope)
    (scope / "configuration.json").write_text('{"framework": "pytorch", "task": "text-generation"}')
    for name in (".mdl", ".msc", ".mv"):
        (scope / name).write_bytes(b"\x80\x04")
    assert find_checkpoint(scope).weights
    for option in ("revision", "subfolder"):
        with pytest.raises(BadOption, match=f"--{option} x is for models on the hub"):
            find_checkpoint(scope, **{option: "x"})
    with pytest.raises(BadOption, match="name two revisions"):
        find_checkpoint("acme/tiny@a", revision="b")


def test_a_hub_that_never_answers(hub: Hub, tmp_path: Path) -> None:
    answering = hub.address
    assert hub.build(tmp_path / "out", tmp_path / "cache").returncode == 0
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        hub.address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        done = hub.build(tmp_path / "new", tmp_path / "empty")
        assert time.monotonic() - began < 60
        assert done.returncode == 1
        assert f"waiting for {hub.address} to answer" in done.stderr
        assert "acme/tiny is not a folder here, and it could not be downloaded" in done.stderr
        # What is here already is built.
        done = hub.build(tmp_path / "old", tmp_path / "cache")
        assert done.returncode == 0, done.stderr
    hub.address = answering
