"""Lists the blocks of the pages that the tests do not run: python -m tests.docs."""

from __future__ import annotations

from tests.docs.pages import pages


def main() -> None:
    """Print the blocks and the reasons."""
    found = [block for page in pages() for block in page.blocks if block.reason is not None]
    print(f"{len(found)} blocks are not run here:")
    for block in found:
        print(f"  {block}: {block.reason}")


if __name__ == "__main__":
    main()
