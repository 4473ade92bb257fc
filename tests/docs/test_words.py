"""Pages, help and messages use the field's terms, in American English.

What is on the left is not written; the right says what is.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import ortlm
from ortlm.cli import COMMANDS, main
from tests.docs.pages import Page, pages

WORDS = {
    r"pictures?": "image",
    r"what sees (images|pictures)|models? that sees? (images|pictures)": "vision encoder, multimodal model",
    r"towers?": "vision encoder",
    r"joins? of a new kind|a join": "projector",
    r"products? of integers": "integer matmul (int8 GEMM)",
    r"reads? (a |the )?prompts?|reading (a |the )?prompts?|fast reading": "prefill",
    r"answers are made": "decode",
    r"only rounds|by rounding": "round-to-nearest (RTN)",
    r"makes? good|made good|making good": "compensates for",
    r"turns the residual|turned weights": "rotates",
    r"how far channels reach": "absmax",
    r"(a )?quarter of the memory": "4x smaller",
    r"go(es)? on from|go(es)? on at": "resumes from",
    r"go(es|ing)? back": "rewinds",
    r"kept caches?": "prefix cache",
    r"saved prompts?": "prompt cache",
    r"required forms?|what an answer must look like": "structured output (constrained decoding)",
    r"drafts by lookup|how many were right": "prompt-lookup decoding, acceptance rate",
    r"(same )?likeliest": "most likely (top-1), top-1 agreement",
    r"words_only": "text_tokens_only",
    r"switch of rotation tables": "longrope short/long switch",
    r"texts? (in)?to vectors?|turn texts": "embed texts",
    r"verbs?": "command",
    r"wrong use": "usage error",
    r"quality gates?|a gate": "quality threshold",
    r"is it still good|it says \|": "Evaluate, sample output",
    r"size (before|after)": "checkpoint size, model size",
    r"so many at once|at most so many": "batch size, at most N",
    r"anew": "again, from scratch",
    r"beside": "next to, in addition to",
    r"somebody asked|nobody asks": "cancelled, no longer needed",
    r"publisher's values": "defaults of generation_config.json",
    r"lets? it write|way through": "generates text, end-to-end example",
    r"colours?|behaviours?|favours?|neighbours?|licences?|honours?": "American spelling",
    r"(initial|normal|quant|serial|optim|recogn|minim|maxim)is(e|ed|es|ing|ation)": "American spelling",
}
PAGES = pages("CONTRIBUTING.md", "SECURITY.md", "AGENTS.md", "benchmarks/README.md", "examples/README.md")


# Names that artifacts and checkpoints have.
KEYS = re.compile(r"picture_(numbers|rows|columns)|(vision|audio)_tower|read_prompt")
# Texts that models read, and the script that wrote the card of the model that ships.
TEXTS = {"evaluation/corpus.py", "evaluation/prompts.py", "calibration/texts.py", "scripts/train_tiny.py"}


def check(name: str, text: str) -> None:
    for pattern, instead in WORDS.items():
        found = re.search(rf"\b(?:{pattern})\b", text, re.IGNORECASE)
        assert found is None, f"{name} has {found[0]!r}; write {instead}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages(page: Page) -> None:
    check(page.name, page.text)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    check(f"ortlm {command} --help", re.sub(r"\s+", " ", capsys.readouterr().out))


def messages(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the texts in a module that are no docstrings, with their lines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in statements)
    for node in texts:
        # Not names of files and keys, which have no spaces.
        if isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value


def test_sources() -> None:
    """Comments, docstrings and names too, of the package and of what is around it; "_" stands between words."""
    root, source = Path(__file__).parents[2], Path(ortlm.__file__).parent
    others = (root / "benchmarks", root / "examples", root / "scripts")
    for path in (p for folder in (source, *others) for p in sorted(folder.rglob("*.py"))):
        name = path.relative_to(source if source in path.parents else root).as_posix()
        if name not in TEXTS:
            text = KEYS.sub("", path.read_text(encoding="utf-8")).replace("_", " ")
            check(name, text)


def test_messages() -> None:
    source = Path(ortlm.__file__).parent
    for path in sorted(source.rglob("*.py")):
        name = path.relative_to(source).as_posix()
        if name not in TEXTS:
            for line, text in messages(path):
                check(f"{name}:{line}", text)
