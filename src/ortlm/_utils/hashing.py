"""What a file holds, as a hash."""

from __future__ import annotations

import hashlib
from pathlib import Path

_BLOCK_BYTES = 1 << 22


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of the file ``path`` in hexadecimal; read in pieces, so that its size is no matter."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
