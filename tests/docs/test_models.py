"""docs/models.md says what code and tests do."""

from __future__ import annotations

from tests.docs.models import OUT, page


def test_page() -> None:
    assert OUT.read_text(encoding="utf-8") == page(), "run python -m tests.docs.models"
