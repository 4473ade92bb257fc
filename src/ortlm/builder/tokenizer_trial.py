"""Tries a checkpoint's tokenizer before anything is built with it, in a process with little memory and time.

A tokenizer is a program that comes with a file. One that fails, panics, never ends or takes all memory must be
found before hours of calibration, and must not take the build with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ortlm.builder.tokenizer_files import TokenizerFiles, check_there, read_tokenizer
from ortlm.checkpoint import files
from ortlm.errors import BadCheckpoint, Error
from ortlm.tokenization.growth import MOST_TOKEN_CHARACTERS
from ortlm.tokenization.guard import guarded
from ortlm.tokenization.reader import SETTINGS_FILES, TOKENIZER_FILE

SECONDS = 60.0
# Python, the libraries and a parsed tokenizer.json of usual size; a file of any size takes a multiple of it more.
_MEMORY_BYTES, _MEMORY_PER_BYTE = 3 << 30, 24
_SENTENCE = "The quick brown fox jumps over the lazy dog, and 12345 others don't."
# Texts on which expressions that backtrack and normalizers that multiply show themselves.
_TEXTS = (
    _SENTENCE,
    *(character * 2_000 for character in ("a", "A", " ", "\n", "1", "!", "\u4e2d", "\u0e01")),
    *(pair * 1_000 for pair in ("ab", "a ", " \n", "1a", "aA", "a'", "\r\n", "a!", "x<", ".\t")),
    "caf\u00e9 cafe\u0301 \ufdfa \u1e9b\u0323 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u0000\u0007\u202e "
    * 50,
)
_CODE = "from ortlm.builder.tokenizer_trial import main; main()"
_PASSED: set[str] = set()


def tried_tokenizer(folder: Path, config: Mapping[str, Any], vocab: int) -> TokenizerFiles:
    """Return the tokenizer of the checkpoint in ``folder`` for a model of ``vocab`` tokens, which works.

    Raises BadCheckpoint if it does not, or takes too much memory or time.
    """
    check_there(folder)
    facts = {key: config.get(key) for key in ("model_type", "tokenizer_class")}
    request = json.dumps({"folder": str(folder.absolute()), "config": facts, "vocab": vocab})
    fingerprint = _fingerprint(folder, request)
    if fingerprint not in _PASSED:
        _try(files.shown(folder / TOKENIZER_FILE), files.size_of(folder, TOKENIZER_FILE), request)
        _PASSED.add(fingerprint)
    return read_tokenizer(folder, config)


def _fingerprint(folder: Path, request: str) -> str:
    digest = hashlib.sha256(request.encode())
    for name in (TOKENIZER_FILE, *SETTINGS_FILES):
        digest.update(files.read_bytes(folder, name) if files.present(folder, name) else b"")
        digest.update(name.encode())
    return digest.hexdigest()


def _try(path: str, size: int, request: str) -> None:
    environment = {
        **os.environ,
        "TOKENIZERS_PARALLELISM": "false",
        **dict.fromkeys(("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
        "PYTHONIOENCODING": "utf-8",
    }
    if not sys.executable:  # Python within another program
        with guarded(f"{path} cannot be used", BadCheckpoint):
            _use(json.loads(request))
        return
    try:
        done = subprocess.run(
            # The first place that Python looks for modules is the working folder: never a stranger's.
            [sys.executable, "-c", _CODE],
            input=json.dumps([request, size]),
            cwd=Path(__file__).parents[2],
            env=environment,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BadCheckpoint(
            f"{path} took longer than {SECONDS:.0f} seconds for texts of a few thousand characters. It is "
            "damaged, or was made to do harm; use the publisher's."
        ) from error
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be tried, since no process can be started: {error}") from error
    answer = done.stdout.strip().splitlines()
    if done.returncode == 0 and answer and answer[-1] == "ok":
        return
    if answer and answer[-1].startswith("error: "):
        raise BadCheckpoint(str(json.loads(answer[-1].removeprefix("error: "))))
    said = (done.stderr.strip().splitlines() or ["nothing"])[-1][:300]
    ended = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
    raise BadCheckpoint(
        f"{path} cannot be used: the process that tried it ended with {ended}, usually since its memory was not "
        f"enough. It said: {said}"
    )


def main() -> None:
    """Try the tokenizer that standard input names; the last line of the output is ``ok`` or the error."""
    request, size = json.loads(sys.stdin.read())
    _limit(size)
    try:
        with guarded("the tokenizer cannot be used", BadCheckpoint):
            _use(json.loads(request))
    except Error as error:
        print(f"\nerror: {json.dumps(str(error))}")
    else:
        print("\nok")


def _use(request: Mapping[str, Any]) -> None:
    folder, vocab = Path(request["folder"]), int(request["vocab"])
    path = files.shown(folder / TOKENIZER_FILE)
    inner = read_tokenizer(folder, request["config"]).opened.inner
    longest = max(map(len, inner.get_vocab(with_added_tokens=True)), default=0)
    if longest > MOST_TOKEN_CHARACTERS:
        raise BadCheckpoint(
            f"{path}: a token has {longest} characters, at most {MOST_TOKEN_CHARACTERS} are allowed."
        )
    with guarded(f"{path} cannot read or write a text", BadCheckpoint):
        for text in _TEXTS:
            ids = inner.encode(text).ids
            inner.decode(ids, skip_special_tokens=False)
        inner.decode(list(range(min(vocab, inner.get_vocab_size(with_added_tokens=True)))))
    plain, whole = (inner.encode(_SENTENCE, add_special_tokens=special).ids for special in (False, True))
    if not plain or min(plain) >= vocab:
        raise BadCheckpoint(
            f"{path} makes {'no tokens' if not plain else f'no token below {vocab}'} of a text, so it does not "
            "belong to this model. Copy the file of the base model into the folder."
        )
    beyond = next((at for at in whole if at >= vocab and at not in plain), None)
    if beyond is not None:
        raise BadCheckpoint(
            f"{path} puts the token {beyond} around every text, but config.json has a vocab_size of {vocab}. It "
            "belongs to another model, or its post_processor is damaged."
        )


def _limit(size: int) -> None:
    """Limit this process, where the system can."""
    try:
        import resource
    except ImportError:  # Windows: time is limited from outside
        return
    memory = _MEMORY_BYTES + _MEMORY_PER_BYTE * size
    for name, value in (("RLIMIT_AS", memory), ("RLIMIT_CPU", int(SECONDS)), ("RLIMIT_CORE", 0)):
        kind = getattr(resource, name, None)
        if kind is None:
            continue
        try:
            _, hard = resource.getrlimit(kind)
            most = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (most, hard))
        except (ValueError, OSError):
            continue  # macOS refuses limits of memory
