"""The command line: what goes to stdout, what to stderr, and the exit codes."""

import io
import json
import os
import subprocess
import sys

import pytest

from ortlm.cli import main
from tests.runtime.conftest import build_official


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(build_official(tmp_path_factory.getbasetemp())[0])


def test_text_goes_to_stdout_and_speed_to_stderr(model, capsys):
    assert main(["generate", model, "hello world", "-n", "6", "-v", "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert "answer:" in err
    assert "tokens/s" not in out


def test_json(model, capsys):
    assert main(["generate", model, "--json", "--chat", "hello", "-n", "4", "--ignore-eos"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"text", "tokens", "finish_reason", "usage", "timings"}
    assert len(found["tokens"]) == 4
    assert found["finish_reason"] == "length"
    assert found["timings"]["prompt_tokens"] == 4
    assert found["usage"] == {"prompt_tokens": 4, "completion_tokens": 4, "cached_tokens": 0}


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_prompt_from_stdin(model, capsys, monkeypatch, arguments):
    main(["generate", model, "hello", "--json", "-n", "4"])
    expected = json.loads(capsys.readouterr().out)["tokens"]
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert main(["generate", model, *arguments, "--json", "-n", "4"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == expected


def test_options_reach_the_model(model, capsys):
    options = [
        "--temp",
        "0.9",
        "--top-k",
        "5",
        "--top-p",
        "0.9",
        "--repetition-penalty",
        "1.1",
        "--seed",
        "3",
    ]
    texts = []
    for _ in range(2):
        assert main(["generate", model, "the fox", "-n", "8", *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["generate", "MODEL", "x", "-n", "-1"], 2, "--max-tokens must be"),
        (["generate", "MODEL", "x", "--temp", "-1"], 2, "--temp must be"),
        (["generate", "MODEL", ""], 2, "the prompt is empty"),
        (["generate", "MODEL"], 2, "the prompt is empty"),
        (["generate", "/nowhere", "x"], 1, "error: /nowhere is not a folder"),
        (["generate", "MODEL", "the fox " * 200], 1, "context holds 128"),
        (["generte", "x"], 2, "Did you mean: generate?"),
        (["generate"], 2, "required: MODEL"),
        (["generate", "MODEL", "x", "--wrong"], 2, "does not know '--wrong'"),
        (["generate", "MODEL", "x", "--maxtokens", "5"], 2, "Did you mean: --max-tokens"),
        (["generate", "MODEL", "two", "words"], 2, "Put quotes around"),
        (["generate", "MODEL", "x", "-f", "y"], 2, "PROMPT does not go with --file"),
        (["generate", "MODEL", "-f", "/nowhere"], 2, "--file /nowhere cannot be read: No such file"),
        (["generate", "MODEL", "x", "--no-chat", "--system", "y"], 2, "--no-chat does not go with --system"),
        (["generate", "MODEL", "--logprobs", "x"], 2, "put it in front of this flag"),
        (["generate", "MODEL", "x", "--regex", "a", "--json-object"], 2, "not allowed with"),
        (["generate", "MODEL", "x", "--adapter", "french"], 2, "there is no adapter 'french'"),
        (["generate", "MODEL", "x", "--draft", "/nowhere"], 1, "/nowhere is not a folder"),
        ([], 2, "usage: ortlm"),
    ],
)
def test_errors(model, capsys, monkeypatch, arguments, code, message):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main([model if word == "MODEL" else word for word in arguments]) == code
    out, err = capsys.readouterr()
    assert message in err
    assert "Traceback" not in err
    assert out == ""


def test_interruption(model, monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("ortlm.cli.generate.run", interrupt)
    assert main(["generate", model, "x"]) == 130


def test_help_and_version_are_quick(capsys):
    for arguments in (
        ["--help"],
        ["--version"],
        ["generate", "--help"],
        ["chat", "--help"],
        ["embed", "--help"],
        ["inspect", "--help"],
    ):
        assert main(arguments) == 0
        assert "ortlm" in capsys.readouterr().out
    code = "import sys; from ortlm.cli import main; main(['generate', '--help']); "
    code += "assert not {'numpy', 'onnxruntime', 'onnx_ir', 'tokenizers', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_reader_that_leaves_is_no_error(model):
    command = f"{sys.executable} -m ortlm generate {model} hello --ignore-eos --temp 1 | head -c 1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, check=True, env=os.environ)
    assert done.stderr == b""


def test_inspect(model, capsys):
    assert main(["inspect", model, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["context_tokens"] == 128
    assert found["cache_bytes_per_token"] == 3 * 2 * 2 * 16 * 4
    assert found["total_bytes"] == sum(found["file_bytes"].values())
    assert main(["inspect", model]) == 0
    assert "KV cache: 768 B per token" in capsys.readouterr().out
    assert main(["inspect", "/nowhere"]) == 1
