"""Hashes of files, read piece by piece: weights are larger than what should be held twice."""

from __future__ import annotations

import hashlib
from pathlib import Path

__all__ = ["sha256_of"]

PIECE = 1 << 20  # bytes read at a time


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            found.update(piece)
    return found.hexdigest()
