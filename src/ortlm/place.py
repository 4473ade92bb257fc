"""Puts a folder in place whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from ortlm.artifact import GENAI_FILE, MANIFEST_FILE
from ortlm.errors import BadOption


def check_output(out: Path, *, force: bool) -> None:
    """Raise BadOption if ``out`` cannot take an artifact."""
    if out.is_file():
        raise BadOption(f"{out} is a file; -o takes the folder to create.")
    if out.is_dir() and any(out.iterdir()):
        if not any((out / name).is_file() for name in (MANIFEST_FILE, GENAI_FILE)):
            raise BadOption(
                f"{out} is a folder with other files in it, which a build would replace. Choose a new folder."
            )
        if not force:
            raise BadOption(
                f"{out} holds an artifact already. Add --force to replace it, or choose a new folder."
            )
    parent = next(p for p in out.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise BadOption(f"{out} cannot be created: {parent} is not a folder that may be written to.")


@contextlib.contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """Give a folder beside ``out`` that is gone afterwards unless it was moved; remove dead builds' ones."""
    made = [p for p in (out.absolute(), *out.absolute().parents) if not p.exists()][1:]
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        for old in out.absolute().parent.glob(f".{out.name}.partial-*"):
            pid = old.name.rsplit("-", 1)[-1]
            if pid.isdigit() and not _alive(int(pid)):
                shutil.rmtree(old, ignore_errors=True)
        folder = out.absolute().parent / f".{out.name}.partial-{os.getpid()}"
        folder.mkdir()
    except OSError as error:
        raise BadOption(f"{out} cannot be created: {error.strerror or error}.") from error
    done = False
    try:
        yield folder
        done = True
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not done:
            for parent in made:
                with contextlib.suppress(OSError):
                    parent.rmdir()


def _alive(pid: int) -> bool:
    if sys.platform == "win32":
        return True  # signal 0 would end the process there
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def put_in_place(folder: Path, out: Path, *, force: bool) -> None:
    """Rename ``folder`` to ``out``; an artifact that is there goes only once that is done, if ``force`` allows."""
    check_output(out, force=force)
    if not out.exists():
        folder.rename(out)
        return
    aside = folder.with_name(folder.name.replace(".partial-", ".replaced-"))
    out.rename(aside)
    try:
        folder.rename(out)
    except OSError:
        aside.rename(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)
