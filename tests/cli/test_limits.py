"""Numbers and files of the caller that no machine could serve: one line and exit code 2, at once."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from ortlm._utils import limits, whole_files
from ortlm._utils.whole_files import write_whole
from ortlm.cli import main
from ortlm.errors import BadOption
from ortlm.runtime.sampling.settings import Settings

GENERATE = ["generate", "MODEL", "x"]


@pytest.mark.parametrize(
    "arguments",
    [
        [*GENERATE, "--beams", "1000000"],
        [*GENERATE, "--n", "1000000000", "--temp", "1"],
        [*GENERATE, "--threads", "1000000000"],
        [*GENERATE, "--threads", "100000"],
        [*GENERATE, "--threads", "0"],
        [*GENERATE, "--lookup", "--draft-tokens", "1000000000"],
        [*GENERATE, "--threads", "9" * 5_000],
        [*GENERATE, "-n", "9" * 5_000],
        ["generate", "MODEL", "-f", "/dev/zero"],
        ["generate", "MODEL", "-f", "a\0b"],
        ["generate", "MODEL", "--batch", "/dev/zero"],
        ["generate", "MODEL", "--batch", __file__, "--batch-size", "100000000"],
        ["generate", "MODEL", "x", "--grammar", "/dev/zero"],
        ["embed", "MODEL", "x", "--batch-size", "1000000000"],
        ["embed", "MODEL", "-f", "/dev/zero"],
        ["bench", "MODEL", "--batch", "1000000"],
        ["bench", "MODEL", "--batch", "9" * 5_000],
        ["bench", "MODEL", "--threads", "1000000"],
        ["bench", "MODEL", "--runs", "1000000000"],
        ["bench", "MODEL", "--new", "1000000000"],
        ["bench", "MODEL", "--buffer-mb", "1000000000"],
        ["evaluate", "MODEL", "--threads", "1000000000"],
        ["evaluate", "MODEL", "--text", "/dev/zero", "--reference", "MODEL"],
        ["build", "-i", "models/tiny-phi3", "-o", "never", "--threads", "1000000000"],
    ],
)
def test_refused(monkeypatch, capsys, phi, tmp_path, arguments):
    monkeypatch.setattr(limits, "MOST_TEXT_BYTES", 1 << 20)
    for module in ("ortlm.cli.settings.MOST_TEXT_BYTES", "ortlm.evaluation.chunks._MOST_CHARACTERS"):
        monkeypatch.setattr(module, 1 << 20)
    if "/dev/zero" in arguments and not Path("/dev/zero").exists():
        pytest.skip("there is no /dev/zero here")
    assert main([phi if word == "MODEL" else word for word in arguments]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert len(found.err.splitlines()[-1]) < 6_000
    assert "Traceback" not in found.err


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_beams": 10**6},
        {"num_return_sequences": 10**9, "do_sample": True},
        {"draft_tokens": 10**9},
        {"temperature": 10**400},
        {"length_penalty": 10**400},
        {"logit_bias": {1: 10**400}},
        {"max_new_tokens": -(10**5_000)},
    ],
)
def test_settings(wrong):
    with pytest.raises(BadOption):
        Settings(**wrong)


def test_pipes_are_files_too(phi, tmp_path, capsys):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes with names here")
    import threading

    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=lambda: (tmp_path / "pipe").write_text("def f(")).start()
    assert main(["generate", phi, "-f", str(tmp_path / "pipe"), "-n", "2"]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "nested deeper than 100"),
        ('"\\ud800"', "line 1 of --batch"),
        ('{"prompt": 1e400}', "no finite number"),
        ('{"prompt": [1' + "0" * 5_000 + "]}", "line 1 of --batch"),
        ('{"prompt": {"a": 1}}', "must be a text or an object with prompt"),
    ],
)
def test_lines_of_a_batch(phi, tmp_path, capsys, line, message):
    (tmp_path / "b.jsonl").write_text(line + "\n")
    assert main(["generate", phi, "--batch", str(tmp_path / "b.jsonl"), "-n", "2"]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_a_full_disk_is_told_with_the_file(monkeypatch, tmp_path):
    (tmp_path / "b").write_bytes(b"old")
    real = os.fsync
    calls = []

    def full(handle):
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(whole_files.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*b'") as caught:
        write_whole({tmp_path / "a": b"1", tmp_path / "b": b"2"})
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert (tmp_path / "b").read_bytes() == b"old"
    monkeypatch.undo()
    write_whole({tmp_path / "a": b"1", tmp_path / "b": b"2"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_conversations_and_full_disks(phi, tmp_path, capsys, monkeypatch):
    import io

    monkeypatch.setattr(
        "sys.stdin", io.StringIO(f"/save {tmp_path}/nowhere/talk.json\n/load /dev/zero\n/bye\n")
    )
    monkeypatch.setattr("ortlm.cli.settings.MOST_TEXT_BYTES", 1 << 20)
    assert main(["chat", phi]) == 0
    told = capsys.readouterr().err
    assert "nowhere/talk.json: No such file or directory" in told
    assert "/dev/zero" in told
    assert json.dumps("Traceback") not in told
