"""Each program of examples/ does what its first lines say."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

import ortlm
from tests.examples.conftest import ROOT, User

PROGRAMS = {
    "batch.py", "chat.py", "generate.cpp", "logits_processor.py", "lora_switching.py", "streaming.py",
    "structured_output.py", "vision.py",
}  # fmt: skip
PROMPT = "def read_lines(path):"
LONG, SHORT = "Write a function that adds two numbers.", "How do I read a file line by line?"


@pytest.fixture(scope="module")
def lm(phi: Path) -> ortlm.LanguageModel:
    return ortlm.load(phi, threads=1)


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_every_program_is_tested_and_in_the_table() -> None:
    there = {path.name for path in (ROOT / "examples").iterdir() if path.suffix in {".py", ".cpp"}}
    assert there == PROGRAMS
    table = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| \[[\w.]+\]\(([\w.]+)\)", table, re.MULTILINE)) == PROGRAMS


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_the_first_lines_say_what_is_needed(name: str) -> None:
    head = (ROOT / "examples" / name).read_text(encoding="utf-8")[:800]
    assert "Needs" in head
    assert "pip install" in head
    run = f"python {name} phi" if name.endswith(".py") else "./generate phi"
    assert run in head


def test_the_environment_holds_what_users_install(user: User) -> None:
    if not user.isolated:
        pytest.skip("needs --python")
    code = (
        "import importlib.util as util, ortlm\n"
        "assert not [name for name in ('torch', 'transformers', 'pytest') if util.find_spec(name)]\n"
        "print(ortlm.__version__, ortlm.__file__)"
    )
    version, path = user.run(user.python, "-I", "-c", code).stdout.split()
    assert version == ortlm.__version__
    assert Path(path).is_relative_to(Path(user.python).parents[1])


def test_demo(user: User, phi: Path, lm: ortlm.LanguageModel) -> None:
    done = user.run(Path(user.python).with_name("ortlm"), "generate", phi, PROMPT, "-n", "60")
    assert done.stdout.rstrip("\n") == lm.generate(PROMPT, max_new_tokens=60, reuse_cache=False).text.rstrip(
        "\n"
    )


def test_chat(user: User, phi: Path) -> None:
    printed = user.example("chat.py", phi, "--system", "Be brief.", stdin=f"{SHORT}\nAnd a binary file?\n")
    turns = re.findall(r"\[(\d+) prompt tokens, (\d+) of them cached; (\d+) new at \d+ tokens/s\]", printed)
    (first, none, _), (second, cached, _) = (map(int, turn) for turn in turns)
    # The second prompt begins with the first one and its answer, which are not computed again.
    assert none == 0
    assert first <= cached < second
    assert printed.endswith("> \n")


def test_chat_starts_over_when_the_context_is_full(user: User, phi: Path) -> None:
    printed = user.example("chat.py", phi, stdin=f"{'word ' * 600}\n{SHORT}\n")
    assert "Starting over." in printed
    assert re.search(r"\[\d+ prompt tokens, 0 of them cached; ", printed)


def test_streaming(user: User, phi: Path, lm: ortlm.LanguageModel) -> None:
    printed = user.example("streaming.py", phi, LONG, SHORT)
    lines = printed.splitlines()
    for number, question in enumerate((LONG, SHORT), 1):
        mine = [line.removeprefix(f"[{number}] ") for line in lines if line.startswith(f"[{number}] ")]
        assert "\n".join(mine) == lm.generate(asked(question), max_new_tokens=128, reuse_cache=False).text
    assert lines[-1] == "finished: length, stop"
    # At once: the second, shorter answer is done before the first.
    assert lines[-2].startswith("[1]")


def test_streaming_ends_in_time(user: User, phi: Path) -> None:
    assert user.example("streaming.py", phi, LONG, "--seconds", "0.01").endswith("finished: timeout\n")


def test_structured_output(user: User, phi: Path) -> None:
    text = "The library opens at nine and lends books for four weeks."
    printed = user.example("structured_output.py", phi, text)
    found = re.fullmatch(
        r"title       (.{0,60})\n"
        r"category    (?:news|instructions|story|other)\n"
        r"keywords    \[(.*)\]\n"
        r"confidence  (\d+)\n",
        printed,
    )
    assert found
    assert 0 <= int(found[3]) <= 100


def test_lora_switching(user: User, phi_with_adapters: Path) -> None:
    printed = user.example("lora_switching.py", phi_with_adapters, PROMPT)
    parts = re.split(r"^--- (.+) \((\d+) prompt tokens cached\)\n", printed, flags=re.MULTILINE)[1:]
    names, cached, texts = parts[::3], [int(count) for count in parts[1::3]], parts[2::3]
    assert names == ["no adapter", "a", "b", "no adapter"]
    assert texts[3] == texts[0]
    assert len(set(texts)) == 3
    # Of a prompt that is cached, the last token is computed again for its logits.
    assert cached == [0, 0, 0, len(ortlm.load(phi_with_adapters).encode(PROMPT)) - 1]


def test_lora_switching_needs_adapters(user: User, phi: Path) -> None:
    program = ROOT / "examples" / "lora_switching.py"
    done = user.run(user.python, program, phi, PROMPT, code=1)
    assert done.stderr == f"{phi} has no adapters. Build it with --adapter NAME=PATH.\n"


def test_vision(user: User, phi_vision: Path) -> None:
    image = user.folder / "image.png"
    one = user.example("vision.py", phi_vision, "What is shown?", image, "--num-crops", "1")
    both = user.example("vision.py", phi_vision, "What is shown?", image, image, "--num-crops", "1")
    report = r"\[(\d+) prompt tokens: images \d+\.\d\d s, prefill \d+\.\d\d s\]\n$"
    counts = [int(re.search(report, printed)[1]) for printed in (one, both)]  # type: ignore[index]
    assert counts[0] > 144
    assert counts[1] > counts[0] + 144
    assert one.partition("\n[")[0] != both.partition("\n[")[0]


def test_vision_without_an_image(user: User, phi_vision: Path) -> None:
    program = ROOT / "examples" / "vision.py"
    done = user.run(user.python, program, phi_vision, "What is shown?", "missing.png", code=1)
    assert "missing.png" in done.stderr
    assert done.stderr.count("\n") == 1


def test_batch(user: User, phi: Path, lm: ortlm.LanguageModel) -> None:
    prompts = ["class Stack:", "import", PROMPT]
    (user.folder / "prompts.txt").write_text("\n\n".join(prompts), encoding="utf-8")
    printed = user.example("batch.py", phi, "prompts.txt", "--batch-size", "2")
    *parts, total = re.split(r"^--- ", printed, flags=re.MULTILINE)[1:]
    assert len(parts) == len(prompts)
    for number, (part, prompt) in enumerate(zip(parts, prompts, strict=True), 1):
        # A batch rounds differently, so the end may differ where two tokens are equally likely.
        text = lm.generate(prompt, max_new_tokens=4, reuse_cache=False).text
        assert part.startswith(f"{number} (length)\n{prompt}{text}")
    assert re.fullmatch(r"3 answers, 96 tokens in \d+\.\d\d s\n", total)


def test_logits_processor(user: User, phi: Path) -> None:
    printed = user.example("logits_processor.py", phi, "The answer", "--without", "eS")
    found = re.fullmatch(
        r"freely: (.+)\nwithout eS:(.+)\n(\d+) tokens banned, another one chosen (\d+) times\n",
        printed,
        re.DOTALL,
    )
    assert found
    free, without, banned, changed = found.groups()
    assert {"e", "s"} <= set(free.lower())
    assert not {"e", "s"} & set(without.lower())
    assert without.strip()
    assert int(banned) > 100
    assert int(changed) > 0


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return generate.cpp, compiled against the libraries of the wheels."""
    genai = pytest.importorskip("onnxruntime_genai")
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C++ compiler")
    import subprocess

    out, folder = tmp_path_factory.mktemp("cpp") / "generate", genai.__path__[0]
    link = [f"-L{folder}", "-lonnxruntime-genai", f"-Wl,-rpath,{folder}"]
    options = ["-std=c++17", "-Wall", "-Wextra", "-Werror"]
    source = ROOT / "examples" / "generate.cpp"
    subprocess.run([compiler, *options, source, "-o", out, *link], check=True)
    return out


def test_cpp(user: User, phi: Path, lm: ortlm.LanguageModel, program: Path) -> None:
    for prompt in (PROMPT, "class Stack:"):
        printed = user.run(program, phi, prompt, "24").stdout
        text, _, ids = printed.rpartition("\ntoken ids:")
        made = lm.generate(prompt, max_new_tokens=24, reuse_cache=False)
        assert tuple(map(int, ids.split())) == made.token_ids
        assert text == made.text


def test_cpp_errors(user: User, program: Path) -> None:
    assert "usage:" in user.run(program, code=2).stderr
    assert "genai_config.json" in user.run(program, user.folder / "nowhere", PROMPT, "1", code=1).stderr
