"""Conversations: commands, what stays in the history, and Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys

import pytest

from ortlm.cli import main

unix = pytest.mark.skipif(sys.platform == "win32", reason="signals are sent as on Unix")


@pytest.fixture
def chat(phi, capsys, monkeypatch, tmp_path):
    """Return a function from the lines typed to stdout, stderr and the messages at the end."""

    def run(*lines, flags=("-n", "4", "--ignore-eos")):
        end = tmp_path / "end.json"
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*lines, f"/save {end}", "/bye", "unheard"])))
        assert main(["chat", phi, *flags]) == 0
        out, err = capsys.readouterr()
        return out, err, json.loads(end.read_text(encoding="utf-8"))

    return run


def contents(messages, role="user"):
    return [message["content"] for message in messages if message["role"] == role]


def test_a_conversation_over_a_pipe(chat):
    out, err, messages = chat(
        "hello", '"""the', 'fox"""', "", "/help", flags=("-n", "3", "--system", "dog", "-v")
    )
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert contents(messages) == ["hello", "the\nfox"]
    assert out == "".join(f"{text}\n" for text in contents(messages, "assistant"))
    assert ">>>" not in out
    assert err.count("tokens/s") == 4
    assert "/system" in err


def test_regenerate_and_undo(chat):
    _, err, messages = chat("hello", "/regen", "more", "/undo")
    assert contents(messages) == ["hello"]
    assert len(messages) == 2
    assert "the answer will be the same: decoding is greedy" in err
    _, err, messages = chat("/regen", "/undo")
    assert messages == []
    assert err.count("there is no message yet") == 2


def test_regenerate_samples_again(chat):
    out, err, messages = chat("hello", "/regen", flags=("-n", "12", "--temp", "1.5", "--ignore-eos"))
    first, second = out[: len(out) - len(messages[1]["content"]) - 1], messages[1]["content"]
    assert first.strip() != second.strip()
    assert "same" not in err


def test_clear_and_system(chat):
    _, _, messages = chat("hello", "/system Be brief.", "one", "/clear", "two")
    assert [m["content"] for m in messages][:2] == ["Be brief.", "two"]
    assert len(messages) == 3
    assert contents(chat("/system x", "/system")[2], "system") == []


def test_settings(chat):
    _, err, _ = chat("/set max_new_tokens 2", "hello", "/stats", "/set", "/set top_k none", "/set seed")
    assert "answer: 2 tokens" in err
    assert "context: " in err
    assert "max_new_tokens 2  (changed)" in err
    assert "  top_k none" in err
    assert "  seed none" in err


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("/set temperature 0.5", "temperature 0.5"),
        ("/set ignore_eos False", "ignore_eos False"),
        ("/set early_stopping never", "early_stopping never"),
        ("/set stop 5", 'stop ["5"]'),
        ("/set stop_token_ids 7", "stop_token_ids [7]"),
        ('/set bad_words ["a", "b"]', 'bad_words ["a", "b"]'),
        ("/set draft lookup", "draft lookup"),
        ("/set ignore_eos default", "ignore_eos False"),
    ],
)
def test_a_setting_is_taken(chat, line, shown):
    assert f"  {shown}\n" in chat(line)[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/sav", "Did you mean: /save"),
        ("/set tempreature 1", "Did you mean: temperature"),
        ("/set temperature -1", "temperature must be a number 0 or more"),
        ("/set temperature warm", "found 'warm'"),
        ("/set guidance x", "guidance is given by a flag"),
        ("/set num_return_sequences 2", "given by a flag, if at all"),
        ("/set adapter french", "there is no adapter 'french'"),
        ("/set draft small", "draft must be"),
        ("/stats", "there is no answer yet"),
        ("/save", "/save needs a file name"),
        ("/save /nowhere/x", "/nowhere/x: No such file"),
        (f"/save {__file__}", "holds no conversation"),
        ("/load /nowhere", "/nowhere: No such file"),
        (f"/load {__file__}", "holds no conversation"),
        ("word " * 600, "/undo takes the last exchange back"),
    ],
)
def test_a_mistake_changes_nothing(chat, line, message):
    _, err, messages = chat("hello", line) if line != "/stats" else chat(line, "hello")
    assert f"error: {message}" in err or message in err
    assert contents(messages) == ["hello"]


def test_save_and_load(chat, tmp_path):
    path = tmp_path / "talk.json"
    _, err, messages = chat(
        "/system S", "hello", f"/save {path}", "/system T", f"/load {path}", "more", "/undo"
    )
    assert messages == json.loads(path.read_text(encoding="utf-8"))
    assert "(3 messages)" in err
    # An object is no list of messages.
    path.write_text("{}", encoding="utf-8")
    assert "holds no conversation" in chat(f"/load {path}")[1]


def test_no_template(phi, capsys, tmp_path):
    from pathlib import Path

    for file in Path(phi).iterdir():
        if "template" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    config.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert main(["chat", str(tmp_path)]) == 2
    assert "has no chat template" in capsys.readouterr().err


class _Stopping(io.StringIO):
    """A stdout that a user watches, who presses Ctrl-C at the second text."""

    pressed = False

    def write(self, text: str) -> int:
        if self.getvalue() and not self.pressed:
            self.pressed = True
            os.kill(os.getpid(), signal.SIGINT)
        return super().write(text)


@unix
def test_a_stopped_answer_stays_as_far_as_it_came(chat, monkeypatch):
    stdout = _Stopping()
    monkeypatch.setattr("sys.stdout", stdout)
    _, err, messages = chat("hello", flags=("--ignore-eos",))
    assert err.count("(stopped)") == 1
    assert contents(messages) == ["hello"]
    # At most what the worker could write between the signal and its end.
    assert stdout.getvalue() == contents(messages, "assistant")[0] + "\n"


@unix
def test_a_prompt_that_is_being_read_can_be_stopped(chat, monkeypatch):
    """Nothing was answered then, so the message is taken back, and the next is answered."""
    from ortlm.runtime.generation.generator import Generator

    append, cancel, stops = Generator.append, Generator.cancel, []

    def long_append(self, tokens):
        if not stops:
            os.kill(os.getpid(), signal.SIGINT)
            while not stops:
                pass
        append(self, tokens)

    def noted_cancel(self):
        cancel(self)
        stops.append(self)

    monkeypatch.setattr(Generator, "append", long_append)
    monkeypatch.setattr(Generator, "cancel", noted_cancel)
    out, err, messages = chat("first", "second")
    assert "stopped before the answer began" in err
    assert contents(messages) == ["second"]
    assert out.strip()


@unix
def test_ctrl_c_at_the_prompt_leaves_at_the_second_time(phi, capsys, monkeypatch):
    typed = iter([KeyboardInterrupt, "/undo", KeyboardInterrupt, KeyboardInterrupt])

    def read():
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("ortlm.cli.chat._read", read)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert main(["chat", phi]) == 130
    assert capsys.readouterr().err.count("Ctrl-C once more leaves") == 2
    assert next(typed, None) is None


_SLOW = """
import sys, time
from ortlm.runtime.generation.generator import Generator
step = Generator.step
begun = []
def slow(self):
    if not begun:
        begun.append(print("begun", file=sys.stderr, flush=True))
    time.sleep(0.02)
    return step(self)
Generator.step = slow
from ortlm.cli import main
sys.exit(main(sys.argv[1:]))
"""


def _started(*arguments, **streams):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", _SLOW, *arguments]
    # Without buffers, in which the beginning would stay when ``communicate`` reads the rest.
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.Popen(command, env=environment, bufsize=0, **pipes)


@unix
def test_ctrl_c_in_a_process_of_its_own(phi, tmp_path):
    """The answer would take ten seconds; the program then reads the next line."""
    with _started("chat", phi, "--ignore-eos", stdin=subprocess.PIPE) as talk:
        talk.stdin.write(b"hello\n")
        talk.stdin.flush()
        first = talk.stdout.read(1)
        talk.send_signal(signal.SIGINT)
        path = tmp_path / "talk.json"
        out, err = talk.communicate(f"/save {path}\n/bye\n".encode(), timeout=60)
        assert talk.returncode == 0, err
    assert b"(stopped)" in err
    answer = json.loads(path.read_text(encoding="utf-8"))[1]["content"]
    assert answer.encode() + b"\n" == first + out
    assert len(answer) < 500


@unix
@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_ctrl_c_ends_generate(phi, flags):
    with _started("generate", phi, "def read(", "--ignore-eos", "--logprobs", *flags) as made:
        assert made.stderr.readline() == b"begun\n"
        made.send_signal(signal.SIGINT)
        out, err = made.communicate(timeout=60)
        assert made.returncode == 130, err
    assert (out, err) == (b"", b"")
