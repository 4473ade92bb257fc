"""How much of something anybody may mean to ask for; more is a mistake, and would take all memory of a machine."""

from __future__ import annotations

MOST_THREADS = 1_024
# Prompts, answers, beams and drafts that are computed together.
MOST_ROWS = 4_096
# Bytes of a prompt, a grammar or a file of prompts: far more than any context holds.
MOST_TEXT_BYTES = 256 << 20
