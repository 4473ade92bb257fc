"""docs/checkpoints.md says what the code does."""

from __future__ import annotations

from tests.docs.checkpoints import OUT, page


def test_the_page_is_up_to_date() -> None:
    assert OUT.read_text(encoding="utf-8") == page(), "run python -m tests.docs.checkpoints"
