"""Telling that memory ran out from everything else that a call may raise."""

from __future__ import annotations

import gc

import torch

__all__ = ["out_of_memory", "release_memory"]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    # On the CPU torch raises a plain RuntimeError, whose words depend on the platform but for the allocator's name.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def release_memory() -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
