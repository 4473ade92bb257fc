"""``python -m ortlm.models.builder`` takes the flags of ``python -m onnxruntime_genai.models.builder``."""

from __future__ import annotations

import sys

from ortlm.cli import main

if __name__ == "__main__":
    sys.exit(main(["build", *sys.argv[1:]]))
