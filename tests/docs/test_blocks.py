"""Every block of the pages runs, in the order of the page, except those that say why not."""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

import ortlm
from ortlm.errors import BadArtifact
from tests.docs.pages import ROOT, Block, Page, pages
from tests.docs.sandbox import Sandbox, localized

# JavaScript needs npm: tests/browser runs such a page.
LANGUAGES = {"sh", "console", "python", "yaml", "json", "text", "js"}
RUN = {"sh", "console", "python"}
SECONDS = 400  # for a block, on a machine that does much else


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    return Sandbox(tmp_path_factory.mktemp("docs"))


@pytest.mark.parametrize("page", [page for page in pages() if page.blocks], ids=lambda page: page.name)
def test_page(page: Page, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [block for block in page.blocks if block.reason is None]
    folder = sandbox.folder_for(page.name, localized("".join(block.code for block in blocks)))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_DATASETS_CACHE", sandbox.environment["HF_DATASETS_CACHE"])
    # A page may build the same folder twice.
    monkeypatch.setattr(ortlm, "build", functools.partial(ortlm.build, force=True))
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        if block.file is not None:
            (folder / block.file).write_text(block.code, encoding="utf-8")
        if block.language == "sh":
            run_shell(block, shell_of(block), sandbox, folder)
        elif block.language == "console":
            run_transcript(block, sandbox, folder)
        elif block.language == "python" and block.file is None:
            # With the lines of the page in tracebacks.
            code = compile("\n" * block.line + localized(block.code), str(ROOT / page.name), "exec")
            exec(code, names)


def shell_of(block: Block) -> str:
    """Return what a shell runs of a block: all but the project's own make targets, which CI runs as its steps."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    kept = []
    for line in localized(block.code).splitlines(keepends=True):
        words = line.split()
        if words[:1] == ["make"]:
            assert words[1] in targets, f"{block}: the Makefile has no {words[1]}"
        else:
            kept.append(line)
    return "".join(kept)


def run_shell(block: Block, script: str, sandbox: Sandbox, folder: Path) -> str:
    """Run ``script`` and return what it wrote to both streams."""
    if not script.strip():
        return ""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=sandbox.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=SECONDS,
        check=False,
    )
    output = done.stdout.decode(errors="replace")
    lacking = re.search(r"^.* needs ONNX Runtime \S+ or later, found .*$", output, re.MULTILINE)
    if done.returncode and lacking:
        # As within a process, so that it is skipped where only older ones are to be tested.
        raise BadArtifact(lacking[0])
    assert done.returncode == 0, f"{block} ended with {done.returncode}:\n{script}\n{output[-3000:]}"
    return output


def run_transcript(block: Block, sandbox: Sandbox, folder: Path) -> None:
    """Run the commands of a transcript, and compare what it shows of their output.

    Of a row its name counts; a model's text and numbers may differ.
    """
    for part in re.split(r"^\$ ", localized(block.code), flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        output = run_shell(block, command, sandbox, folder)
        if " generate " in command or " chat " in command:
            continue
        there = {label(line) for line in output.splitlines()}
        for line in filter(str.strip, shown.splitlines()):
            assert label(line) in {"", *there}, f"{block}: `{command}` does not show {line!r} but\n{output}"


def label(line: str) -> str:
    """Return the name of a table's row, or the line, without frames and with a mark for numbers."""
    cells = line.split("│")
    name = cells[1] if len(cells) > 2 else line.strip(" ─━┌┬┐├┼┤└┴┘")
    return re.sub(r"\d[\d.,]*", "#", name.strip())


@pytest.mark.parametrize("page", pages("CONTRIBUTING.md"), ids=lambda page: page.name)
def test_blocks_have_a_language(page: Page) -> None:
    """So that none is left out by mistake."""
    for block in page.blocks:
        assert block.language in LANGUAGES, f"{block}: {block.language!r} is none of {sorted(LANGUAGES)}"
        assert block.reason is None or block.language in RUN, f"{block} is never run; it needs no reason"


def test_every_fence_is_a_block() -> None:
    for page in pages():
        assert "```" not in page.prose, (
            f"{page.name} has a fence that is not closed, or not on a line of its own"
        )
