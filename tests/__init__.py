"""One thread each, because the tests run side by side, no network, and nothing of the user's."""

import atexit
import os
import shutil
import signal
import tempfile
from pathlib import Path

# What a user has set for other programs must not decide here: tokens, caches, threads, log levels.
for _name in list(os.environ):
    if _name.startswith(
        ("HF_", "HUGGING", "TRANSFORMERS_", "OMP_", "MKL_", "ORT_", "ORTLM_", "XDG_", "PYTORCH_")
    ):
        del os.environ[_name]
_HOME = tempfile.mkdtemp(prefix="ortlm-tests-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
# Also where builds note what they were made from.
os.environ |= {
    "HOME": _HOME,
    "USERPROFILE": _HOME,
    "XDG_CACHE_HOME": str(Path(_HOME, "cache")),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}

# A job in the background of a script ignores these, and so would all that the tests start and interrupt.
for _number, _usual in (
    (signal.SIGINT, signal.default_int_handler),
    (getattr(signal, "SIGQUIT", None), signal.SIG_DFL),
):
    if _number is not None and signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _usual)
