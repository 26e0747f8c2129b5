"""Finding Triton and the kernels in :mod:`entropy_fast.kernels`, neither of which has to be there."""

from __future__ import annotations

import contextlib
import functools
import importlib
from types import ModuleType

import torch

__all__ = ["interpreting", "kernels_of", "load", "on_device", "triton_type"]


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """The package of the kernels, or None and the reason why they cannot be used."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return None, f"triton cannot be imported ({error})"
    try:
        for name in ("token_logprobs", "linear_token_logprobs", "precondition_accumulate"):
            importlib.import_module(f"entropy_fast.kernels.{name}")
        return importlib.import_module("entropy_fast.kernels"), ""
    except ImportError as error:
        return None, f"entropy_fast.kernels cannot be imported ({error})"


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    triton = importlib.import_module("triton")
    return bool(triton.knobs.runtime.interpret) if hasattr(triton, "knobs") else False


def kernels_of(op: str) -> ModuleType:
    """The module with the kernels of an op."""
    package, why_not = load()
    if package is None:
        raise ImportError(why_not)
    module: ModuleType = getattr(package, op)
    return module


def triton_type(dtype: torch.dtype) -> object:
    """Triton's name for a dtype of torch."""
    return getattr(importlib.import_module("triton.language"), str(dtype).removeprefix("torch."))


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which kernels are launched on a device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
