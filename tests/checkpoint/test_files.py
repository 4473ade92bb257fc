"""What of a folder that strangers made is opened, and what is refused."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ortlm
from ortlm.checkpoint import files
from ortlm.errors import BadCheckpoint

KEY = "-----BEGIN OPENSSH PRIVATE KEY-----"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "home" / "id_rsa"
    path.parent.mkdir()
    path.write_text(KEY)
    return path


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "checkpoint"))


NAMES = (
    "LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md", "tokenizer.json", "tokenizer_config.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "generation_config.json", "config.json", "README.md",
    "model.safetensors", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("through", ["absolute", "relative", "folder", "twice"])
def test_no_link_leads_out(folder: Path, secret: Path, tmp_path: Path, name: str, through: str) -> None:
    (folder / name).unlink(missing_ok=True)
    if through == "absolute":
        (folder / name).symlink_to(secret)
    elif through == "relative":
        (folder / name).symlink_to("../home/id_rsa")
    elif through == "folder":
        (folder / "inside").symlink_to(secret.parent)
        (folder / name).symlink_to("inside/id_rsa")
    else:
        (folder / "second").symlink_to(secret)
        (folder / name).symlink_to("second")
    with pytest.raises(BadCheckpoint, match=rf"{name} leads to .*id_rsa, which is no file of this folder"):
        ortlm.build(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc here")
@pytest.mark.parametrize(
    "to", ["/proc/self/environ", "/proc/self/mem", "/dev/zero", "/etc/passwd", "/dev/stdin"]
)
def test_no_link_into_the_system(folder: Path, tmp_path: Path, to: str) -> None:
    (folder / "NOTICE").symlink_to(to)
    with pytest.raises(BadCheckpoint, match="NOTICE"):
        ortlm.build(folder, tmp_path / "out")


def test_links_within_the_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "legal").mkdir()
    (folder / "legal" / "text").write_text("MIT")
    (folder / "LICENSE").symlink_to("legal/text")
    (tmp_path / "link").symlink_to(folder)
    made = ortlm.build(tmp_path / "link", tmp_path / "out")
    assert (made.path / "LICENSE").read_text() == "MIT"
    assert not (made.path / "LICENSE").is_symlink()


def test_what_a_clone_keeps_to_itself(folder: Path) -> None:
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("url = https://user:hf_secret@huggingface.co/acme/tiny")
    (folder / "NOTICE").symlink_to(".git/config")
    with pytest.raises(BadCheckpoint, match="NOTICE leads to"):
        files.read_text(folder, "NOTICE")
    # git-annex keeps weights in there.
    (folder / ".git" / "annex").write_bytes(b"x")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(".git/annex")
    assert files.read_bytes(folder, "model.safetensors") == b"x"


BLOB = "0123456789abcdef0123456789abcdef01234567"


def repository(at: Path, name: str) -> Path:
    """Make the hub's cache of one model; returns the folder of its snapshot."""
    snapshot = at / name / "snapshots" / BLOB
    snapshot.mkdir(parents=True)
    (at / name / "blobs").mkdir()
    (at / name / "blobs" / BLOB).write_text("blob")
    (at / name / "blobs" / "plain").write_text("plain")
    return snapshot


def test_blobs_of_the_same_model_only(tmp_path: Path, secret: Path) -> None:
    one, other = repository(tmp_path, "models--acme--one"), repository(tmp_path, "models--acme--other")
    (one / "good").symlink_to(f"../../blobs/{BLOB}")
    assert files.read_text(one, "good") == "blob"
    (one / "sub").mkdir()
    (one / "sub" / "good").symlink_to(f"../../../blobs/{BLOB}")
    assert files.read_text(one, "sub/good") == "blob"
    assert files.read_text(one / "sub", "good") == "blob"
    (one.parent.parent / "blobs" / ("f" * 40)).symlink_to(secret)
    for name, to in (
        ("other", other.parent.parent / "blobs" / BLOB),
        ("plain", "../../blobs/plain"),
        ("refs", "../../refs"),
        ("blob", f"../../blobs/{'f' * 40}"),
    ):
        (one / name).symlink_to(to)
        with pytest.raises(BadCheckpoint, match=name):
            files.read_text(one, name)


def test_blobs_that_are_a_link(tmp_path: Path, secret: Path) -> None:
    one = repository(tmp_path, "models--acme--one")
    shutil.rmtree(one.parent.parent / "blobs")
    secret.rename(secret.parent / BLOB)
    (one.parent.parent / "blobs").symlink_to(secret.parent)
    (one / "LICENSE").symlink_to(f"../../blobs/{BLOB}")
    with pytest.raises(BadCheckpoint, match="leads to"):
        files.read_text(one, "LICENSE")


def test_blobs_without_a_repository(tmp_path: Path) -> None:
    for name in ("checkpoint", "datasets--acme--one"):
        one = repository(tmp_path, name)
        (one / "LICENSE").symlink_to(f"../../blobs/{BLOB}")
        with pytest.raises(BadCheckpoint, match="leads to"):
            files.read_text(one, "LICENSE")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def socket_(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(before)


@pytest.mark.skipif(os.name == "nt", reason="no pipes in folders there")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [pipe, socket_, Path.mkdir])
def test_only_regular_files(folder: Path, tmp_path: Path, name: str, make: Callable[[Path], Any]) -> None:
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    if make is Path.mkdir and name.startswith(("LICENSE", "NOTICE", "USE_POLICY")):
        ortlm.build(folder, tmp_path / "out")  # some have a folder of licenses, which is left where it is
        return
    with pytest.raises(BadCheckpoint, match="safetensors" if name == "model.safetensors" else name):
        ortlm.build(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "megabytes"),
    [("LICENSE", 1), ("NOTICE.txt", 1), ("USE_POLICY.md", 1), ("config.json", 4), ("generation_config.json", 4),
     ("tokenizer.json", 64), ("vocab.json", 64), ("merges.txt", 64), ("chat_template.jinja", 1),
     ("model.safetensors.index.json", 64), ("tokenizer_config.json", 16)],
)  # fmt: skip
def test_sizes(tmp_path: Path, name: str, megabytes: int) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(megabytes << 20)
    assert files.size_of(tmp_path, name) == megabytes << 20
    for size in ((megabytes << 20) + 1, 8 << 30):  # of which nothing takes place on the disk
        os.truncate(tmp_path / name, size)
        for read in (files.read_bytes, files.size_of):
            with pytest.raises(
                BadCheckpoint, match=rf"{name} has [\d,]+ bytes; a file of this kind has at most"
            ):
                read(tmp_path, name)
        with pytest.raises(BadCheckpoint, match="at most"):
            files.copy_file(tmp_path, name, tmp_path / "copy")


def test_large_files_do_not_stop_a_build_but_where_they_matter(folder: Path, tmp_path: Path) -> None:
    os.truncate(folder / "config.json", 8 << 30)
    with pytest.raises(BadCheckpoint, match=r"config\.json has"):
        ortlm.build(folder, tmp_path / "out")


def test_a_card_is_read_in_part(folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    os.truncate(folder / "README.md", 8 << 30)
    made = ortlm.build(folder, tmp_path / "out")
    assert "license: mit" in (made.path / "README.md").read_text()


def test_errors_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").symlink_to("a\nb\x1b[2J")
    with pytest.raises(BadCheckpoint) as error:
        files.read_text(tmp_path, "LICENSE")
    assert "\n" not in str(error.value)
    assert "\x1b" not in str(error.value)
    for name in ("loop", "x" * 300, "null\0", "not/there"):
        if name == "loop":
            (tmp_path / name).symlink_to("loop")
        with pytest.raises(BadCheckpoint, match="cannot be read"):
            files.read_text(tmp_path, name)


def test_listing(tmp_path: Path) -> None:
    for name in ("LICENSE", "LICENSE.md", "NOTICE", "LICENSE\n"):
        (tmp_path / name).write_text("x")
    (tmp_path / "LICENSES").mkdir()
    (tmp_path / "LICENSES" / "MIT").write_text("x")
    assert files.listed(tmp_path, "LICENSE*") == ["LICENSE", "LICENSE.md"]
    assert files.listed(tmp_path, "LICENSES/*") == ["LICENSES/MIT"]
    assert files.listed(tmp_path, "nothing/*") == []
    with pytest.raises(BadCheckpoint, match="at most 1 are read"):
        files.listed(tmp_path, "LICENSE*", most=1)
    (tmp_path / "out").symlink_to("/etc")
    with pytest.raises(BadCheckpoint, match="leads out of"):
        files.listed(tmp_path, "out/*")


def test_a_stamp_knows_its_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"0123456789")

    def stamped() -> files.Stamp:
        with files.open_file(tmp_path, path.name) as file:
            return files.Stamp.of(file, path)

    stamp = stamped()
    with stamp.open() as file:
        assert file.read() == b"0123456789"
    for change in (
        lambda: os.truncate(path, 5),
        lambda: path.write_bytes(b"0123456789x"),
        lambda: os.utime(path, ns=(1, 1)),
        lambda: (tmp_path / "new").write_bytes(b"0123456789") and (tmp_path / "new").replace(path),
    ):
        stamp = stamped()
        change()
        with pytest.raises(BadCheckpoint, match="has changed since the build began"):
            stamp.open()
    path.unlink()
    with pytest.raises(BadCheckpoint, match="cannot be read any longer"):
        stamp.open()
