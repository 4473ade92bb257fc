"""What answers look like on stdout: texts, JSON, several at once, batches, vectors."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest

import ortlm
from ortlm.cli import main

PROMPT = "def read("


def run(capsys, *arguments):
    """Return stdout and stderr of a command that must succeed."""
    code = main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    assert code == 0, err
    return out, err


def test_several_answers_have_headings(phi, capsys):
    out, err = run(capsys, "generate", phi, PROMPT, "-n", 6, "--n", 2, "--temp", 1, "--seed", 1)
    assert err == ""
    assert out.startswith("--- 1 ---\n")
    assert out.count("\n--- 2 ---\n") == 1


def test_beams_as_json(phi, capsys):
    out, _ = run(capsys, "generate", phi, PROMPT, "-n", 6, "--beams", 3, "--n", 3, "--json")
    found = json.loads(out)
    scores = [answer["score"] for answer in (found, *found["alternatives"])]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)


def test_log_probabilities_as_json(phi, capsys):
    out, _ = run(capsys, "generate", phi, PROMPT, "-n", 2, "--logprobs", 2, "--prompt-logprobs", "--json")
    found = json.loads(out)
    assert set(found) == {
        "text", "tokens", "finish_reason", "logprobs", "prompt_logprobs", "usage", "timings"
    }  # fmt: skip
    assert found["prompt_logprobs"][0] is None
    assert found["prompt_logprobs"][1]["top"] == []
    for token, entry in zip(found["tokens"], found["logprobs"], strict=True):
        assert set(entry) == {"token", "id", "logprob", "top"}
        assert entry["id"] == token == entry["top"][0]["id"]
        assert entry["logprob"] == pytest.approx(entry["top"][0]["logprob"])
        assert math.exp(entry["logprob"]) <= 1
    assert "".join(entry["token"] for entry in found["logprobs"]) == found["text"]


def test_log_probabilities_as_a_table(phi, capsys):
    out, err = run(capsys, "generate", phi, PROMPT, "-n", 2, "--logprobs", 1, "--prompt-logprobs")
    assert [line.split()[0] for line in err.splitlines()] == ["prompt", "prompt", "answer", "answer"]
    assert "answer" not in out


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["--choice", "yes", "--choice", "no"], ("yes", "no")),
        (["--regex", "(abc|xyz)"], ("abc", "xyz")),
        (["--json-schema", '{"const": 42}'], ("42",)),
    ],
)
def test_the_form_is_kept_to(phi, capsys, arguments, texts):
    assert run(capsys, "generate", phi, "say", *arguments)[0].strip() in texts


@pytest.mark.parametrize("how", ["--lookup", "--draft"])
def test_drafts_change_nothing_but_the_report(phi, capsys, how):
    plain, _ = run(capsys, "generate", phi, PROMPT, "-n", 24)
    more = [how] if how == "--lookup" else [how, phi]
    out, err = run(capsys, "generate", phi, PROMPT, "-n", 24, "-v", *more)
    assert out == plain
    assert how == "--lookup" or "accepted" in err


def test_a_prompt_file_and_a_saved_cache(phi, capsys, tmp_path):
    prompt, cache = tmp_path / "p.txt", tmp_path / "p.cache"
    prompt.write_text("the file is closed\n")
    arguments = ["generate", phi, "-f", prompt, "-n", 3, "--json", "--cache", cache]
    first = json.loads(run(capsys, *arguments)[0])
    written = cache.read_bytes()
    second = json.loads(run(capsys, *arguments)[0])
    assert second["tokens"] == first["tokens"]
    assert first["usage"]["cached_tokens"] == 0
    assert second["usage"]["cached_tokens"] == first["usage"]["prompt_tokens"] - 1
    assert "begins otherwise" in run(capsys, "generate", phi, "Zebra", "-n", 1, "--cache", cache)[1]
    assert cache.read_bytes() == written


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--cache", "/nowhere/x"], 2, "there is no folder /nowhere"),
        (["--cache", "x", "--beams", "2"], 2, "--cache does not go with several answers or beams"),
        (["--cache", "x", "--prompt-logprobs"], 2, "--cache does not go with --prompt-logprobs"),
        (["--cache", __file__], 1, "prompt cache"),
        (["--batch", "x"], 2, "--batch does not go with PROMPT"),
        (["--batch-size", "2"], 2, "--batch-size is for --batch only"),
    ],
)
def test_wrong_use(phi, capsys, arguments, code, message):
    assert main(["generate", phi, "x", "-n", "1", *arguments]) == code
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""


def test_a_batch_answers_as_single_prompts(phi, capsys, tmp_path):
    path = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "read"}]
    path.write_text(f'"{PROMPT}"\n\n{{"prompt": "class A"}}\n{json.dumps({"prompt": messages})}\n')
    out, err = run(capsys, "generate", phi, "--batch", path, "-n", 4, "--batch-size", 2, "-v")
    found = [json.loads(line) for line in out.splitlines()]
    lm = ortlm.load(phi, threads=1)
    for prompt, answer in zip((PROMPT, "class A", messages), found, strict=True):
        assert answer["text"] == lm.generate(prompt, max_new_tokens=4).text
        assert answer["usage"] == {"prompt_tokens": len(lm.encode(prompt)), "completion_tokens": 4}
    assert "3 of 3 prompts answered" in err


def test_prompts_of_a_batch_take_turns(phi, capsys, tmp_path, monkeypatch):
    """More than run at once or wait; each is drawn with a seed of its own, whatever runs next to it."""
    monkeypatch.setattr("ortlm.cli.generate_batch._AHEAD", 2)
    path = tmp_path / "prompts.jsonl"
    prompts = [f"{PROMPT} {number}" for number in range(9)]
    path.write_text("".join(f"{json.dumps(prompt)}\n" for prompt in prompts))
    drawn = {"max_new_tokens": 6, "temperature": 1.0, "stop": ["e"]}
    lm = ortlm.load(phi, threads=1)
    wanted = [
        lm.generate(prompt, seed=5 + at, reuse_cache=False, **drawn).text for at, prompt in enumerate(prompts)
    ]
    for size in (2, 8):
        arguments = ("--batch-size", size, "-n", 6, "--temp", 1.0, "--seed", 5, "--stop", "e", "-v")
        out, err = run(capsys, "generate", phi, "--batch", path, *arguments)
        assert [json.loads(line)["text"] for line in out.splitlines()] == wanted
        assert "9 of 9 prompts answered" in err


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("", 2, "holds no prompt"),
        ('"a"\nb\n', 2, "line 2 of --batch - is no JSON"),
        ('{"text": "a"}', 2, "line 1 of --batch - must be a text or an object with prompt"),
        ('"a"\n""', 2, "line 2 of --batch -: the prompt is empty"),
        (json.dumps("word " * 600), 1, "model's context holds 512"),
    ],
)
def test_a_batch_that_cannot_be_answered(phi, capsys, monkeypatch, text, code, message):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert main(["generate", phi, "--batch", "-"]) == code
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""


def test_vectors(phi, capsys, monkeypatch):
    texts = ["a cat", "def read(self):", "class"]
    expected = ortlm.load(phi, threads=1).embed(texts)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(texts) + "\n"))
    out, _ = run(capsys, "embed", phi, "--batch-size", 2)
    found = np.array([json.loads(line) for line in out.splitlines()])
    np.testing.assert_allclose(found, expected, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no text"),
        (["a", ""], "text 2 is empty"),
        (["a", "-f", "b"], "TEXT does not go with --file"),
        (["a", "--batch-size", "0"], "at least 1"),
        (["a", "--pooling", "max"], "invalid choice"),
    ],
)
def test_texts_without_vectors(phi, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["embed", phi, *arguments]) == 2
    assert message in capsys.readouterr().err
