"""``python -m ortlm`` is the same as ``ortlm``."""

import sys

from ortlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
