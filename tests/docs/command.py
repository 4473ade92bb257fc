"""Stands in for `ortlm` and `lm_eval` in the shell blocks of the pages: the same commands on less work.

Options of argparse count when they come last, so what bounds the work is added at the end.
"""

from __future__ import annotations

import sys

# What a reader does once, on a large model, is done here on a tiny one, in seconds.
BOUNDS = {
    "build": ["--force"],  # a page may build the same folder twice
    "generate": ["-n", "12"],
    "chat": ["-n", "12"],
    "bench": ["--context", "16,32", "--new", "4", "--runs", "1", "--buffer-mb", "32"],
    "evaluate": ["--tokens", "1024", "--chunk", "256"],
    "upload": ["--dry-run"],
}
# Any of these says how codes are found; without them int4 is calibrated, which takes most of a minute.
QUANTIZERS = ("--recipe", "algo_config", "--calibration")
# What a page has uploaded before lies in this folder.
UPLOADED = {"user/phi-int4": "phi"}
MISSED = 3  # the quality of a tiny model misses a threshold that a real one reaches


def bounded(arguments: list[str]) -> list[str]:
    """Return a command line of ortlm that does the same on less work."""
    command = next((word for word in arguments if not word.startswith("-")), "")
    more = list(BOUNDS.get(command, [])) if not {"--help", "-h", "--version"} & set(arguments) else []
    if command == "build" and not any(flag in word for word in arguments for flag in QUANTIZERS):
        more += ["--recipe", "fast"]
    if command != "upload":
        arguments = [UPLOADED.get(word, word) for word in arguments]
    return [*arguments, *more]


def main() -> int:
    """Run the command that is named first."""
    name, *arguments = sys.argv[1:]
    if name == "lm_eval":
        from ortlm.lm_eval import main as evaluate

        sys.argv = [name, *arguments, "--include_path", "tasks"]
        return evaluate()
    from ortlm.cli import main as run

    code = run(bounded(arguments))
    return 0 if code == MISSED else code


if __name__ == "__main__":
    sys.exit(main())
