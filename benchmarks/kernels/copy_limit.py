"""The bandwidth that copying a large array reaches, read and write counted."""

from __future__ import annotations

import torch

from benchmarks.kernels.problem import Contender, Results

COPY = "copy"
BYTES = 2**28  # of each of the two arrays: far beyond the second-level caches
QUICK_BYTES = 2**20


class Copy:
    """``y.copy_(x)`` between two arrays that stay."""

    def __init__(self, device: str, array_bytes: int = BYTES) -> None:
        self.source = torch.ones(array_bytes // 4, device=device)
        self.destination = torch.zeros_like(self.source)
        self.moved_bytes = 2 * array_bytes

    def run(self) -> Results:
        """One copy. Nothing of what was in the caches before is left after it."""
        self.destination.copy_(self.source)
        return {}

    def contender(self) -> Contender:
        """For a round with the contenders of a problem."""
        return Contender(COPY, "limit", self.run, f"y.copy_(x) with {self.moved_bytes // 2**21} MiB each")
