"""Puts a folder in place whole or not at all, and never in the place of anything but an artifact."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import json
import os
import secrets
import shutil
import signal
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from ortlm.artifact import GENAI_FILE, MANIFEST_FILE
from ortlm.errors import BadOption


def check_output(out: Path, *, force: bool, source: str | Path | None = None) -> None:
    """Raise BadOption if ``out`` cannot take an artifact, or would take away anything that is not one.

    ``source`` is the checkpoint: a folder or file, which must not lie inside, or a name on the hub.
    """
    if os.path.lexists(out) and (out.is_symlink() or not out.is_dir()):
        raise BadOption(
            f"{out} is not a folder (but a file, a link or a device); -o takes the folder to create."
        )
    if out.is_dir() and os.path.ismount(out):
        raise BadOption(f"{out} is where a disk is mounted; give a folder inside it.")
    try:
        folder = Path(source).resolve() if source is not None and Path(source).exists() else None
    except (OSError, ValueError):  # a name that is too long for a folder, or holds no text
        folder = None
    if folder is not None and out.resolve() in (folder, *folder.parents):
        raise BadOption(
            f"{out} holds the checkpoint {source}, which a build would replace. Choose a new folder."
        )
    if out.is_dir() and any(out.iterdir()):
        _check_replaceable(out, force=force)
    parent = next(p for p in out.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise BadOption(f"{out} cannot be created: {parent} is not a folder that may be written to.")


def _check_replaceable(out: Path, *, force: bool) -> None:
    # An empty folder is somebody's too; those of an artifact hold files.
    names = {
        p.relative_to(out).as_posix()
        for p in out.rglob("*")
        if p.is_symlink() or not p.is_dir() or not any(p.iterdir())
    }
    if MANIFEST_FILE not in names:
        what = "an artifact that another tool built" if GENAI_FILE in names else "other files"
        raise BadOption(f"{out} is a folder with {what}, which a build would replace. Choose a new folder.")
    try:
        written = set(json.loads((out / MANIFEST_FILE).read_text(encoding="utf-8"))["info"]["files"])
    except (ValueError, KeyError, TypeError, OSError):
        written = set()
    others = sorted(names - written - {MANIFEST_FILE})
    if others:
        raise BadOption(
            f"{out} holds {others[0]!r}{' and more' if others[1:] else ''}, which no build wrote and which "
            "replacing the artifact would delete. Move it away, or choose a new folder."
        )
    if not force:
        raise BadOption(
            f"{out} holds an artifact already. Add --force to replace it, or choose a new folder."
        )


@contextlib.contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """Give a folder next to ``out`` that is gone afterwards unless it was moved; remove dead builds' ones."""
    parent = out.absolute().parent
    made = [p for p in (parent, *parent.parents) if not p.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        recover(out)
        # A name that nobody can guess, so that nothing is there before; if something is, this fails.
        folder = parent / f"{_hidden(out)}partial-{secrets.token_hex(4)}"
        folder.mkdir()
    except OSError as error:
        raise BadOption(f"{out} cannot be created: {error.strerror or error}.") from error
    lock = _lock(folder)
    done = False
    try:
        yield folder
        done = True
    finally:
        with _uninterrupted():
            shutil.rmtree(folder, ignore_errors=True)
            _unlock(lock)
            if not done:
                for empty in made:
                    with contextlib.suppress(OSError):
                        empty.rmdir()


@contextlib.contextmanager
def resumable(out: Path, part: str | None = None) -> Iterator[Path]:
    """Give a hidden folder next to ``out`` that keeps layers from which the next build of ``out`` resumes.

    ``part`` names one of several calibrations of a build. The folder goes as soon as there are none. Raises
    BadOption if another build is using it.
    """
    folder = out.absolute().parent / _calibration(out, part)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise BadOption(f"{folder} cannot be created: {error.strerror or error}.") from error
    # The name can be guessed: in a folder that others write to, one of them may have been first.
    if not _is_ours(folder):
        raise BadOption(
            f"{folder}, in which a calibration is kept, is a link or belongs to another user. Remove it, or "
            "choose another folder with -o."
        )
    lock = _lock(folder)
    if lock is None and sys.platform != "win32":
        raise BadOption(f"{out} is being built by another process. Wait for it, or choose another folder.")
    try:
        yield folder
    finally:
        with _uninterrupted():
            if not _layers_in(folder):
                shutil.rmtree(folder, ignore_errors=True)
            _unlock(lock)


def resumable_layers(out: Path) -> tuple[Path, int] | None:
    """Return where an interrupted build of ``out`` kept layers, and how many; None if it kept none."""
    start = glob.escape(_hidden(out))
    for folder in sorted(out.absolute().parent.glob(f"{start}calibration*")):
        done = _layers_in(folder)
        if done:
            return folder, done
    return None


def _calibration(out: Path, part: str | None) -> str:
    return f"{_hidden(out)}calibration" + (f"-{part}" if part else "")


def _layers_in(folder: Path) -> int:
    """Return how many layers a calibration kept in ``folder``."""
    if not _is_ours(folder):
        return 0
    try:
        return int(json.loads((folder / "state.json").read_text(encoding="utf-8"))["done"])
    except (OSError, ValueError, KeyError):
        return 0


def put_in_place(folder: Path, out: Path, *, force: bool) -> None:
    """Rename ``folder`` to ``out``; an artifact that is there goes only once that is done, if ``force`` allows.

    Where the system can exchange two names (Linux), ``out`` is one or the other at every moment; elsewhere it is
    missing between two renames. ``folder`` may hold the old artifact afterwards.
    """
    check_output(out, force=force)
    try:
        with _uninterrupted():
            if not out.exists():
                folder.rename(out)
            elif not _exchange(folder, out):
                _replace(folder, out)
    except OSError as error:
        raise BadOption(f"{out} cannot be put in place: {error.strerror or error}.") from error


def _replace(folder: Path, out: Path) -> None:
    aside = folder.with_name(folder.name.replace("partial-", "replaced-"))
    lock = _lock(out)
    try:
        out.rename(aside)
        try:
            folder.rename(out)
        except OSError:
            aside.rename(out)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        _unlock(lock)


# Linux's renameat2: paths are relative to the working folder, and the two names change places.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step; False where system, C library or disk cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if (
        rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE))
        == 0
    ):
        return True
    failed = ctypes.get_errno()
    if failed in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(failed, os.strerror(failed), str(other))


def identity(out: Path) -> tuple[int, int] | None:
    """Return what tells the folder ``out`` from one that takes its place later, None if there is none."""
    try:
        status = out.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let signals wait for the end of the block, as far as handlers of this process in Python would obey them."""
    waiting: list[int] = []

    def wait(number: int, frame: FrameType | None) -> None:
        waiting.append(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"):
            number = getattr(signal, name, None)
            if number is not None and callable(signal.getsignal(number)):
                before[number] = signal.signal(number, wait)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in waiting[:1]:
            signal.raise_signal(number)


def _hidden(out: Path) -> str:
    """Begin the names of folders next to ``out``; cut, because names may not grow without end."""
    return f".{out.name[:60]}."


def recover(out: Path) -> None:
    """Remove what killed builds of ``out`` left, and bring back an artifact that one had just moved aside."""
    parent, start = out.absolute().parent, glob.escape(_hidden(out))
    for aside in parent.glob(f"{start}replaced-*"):
        if _is_ours(aside) and _dead(aside):
            if os.path.lexists(out):
                shutil.rmtree(aside, ignore_errors=True)
            else:
                aside.rename(out)
    for partial in parent.glob(f"{start}partial-*"):
        if _is_ours(partial) and _dead(partial):
            shutil.rmtree(partial, ignore_errors=True)


def _is_ours(folder: Path) -> bool:
    """Whether ``folder`` is a folder, no link, and of the user who runs this."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and (sys.platform == "win32" or status.st_uid == os.geteuid())


if sys.platform == "win32":

    def _lock(folder: Path) -> int | None:
        return None  # folders cannot be locked there; what a killed build left behind stays

else:
    import fcntl

    def _lock(folder: Path) -> int | None:
        """Lock ``folder`` while this process lives; None if another holds the lock or the disk has none."""
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            return None
        return handle


def _unlock(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


def _dead(folder: Path) -> bool:
    """Whether no living process holds the lock of ``folder``."""
    lock = _lock(folder)
    _unlock(lock)
    return lock is not None
