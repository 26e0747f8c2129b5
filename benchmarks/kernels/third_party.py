"""Rivals from other packages, where they are installed. None of them is a dependency."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

from torch import Tensor

NOT_INSTALLED = "not installed"
NEEDS_CUDA = "needs a CUDA device"


def _module(name: str) -> ModuleType | str:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == name.split(".")[0]
        return NOT_INSTALLED if missing else f"cannot be imported ({error})"


def cut_cross_entropy(device: str) -> Callable[[Tensor, Tensor, Tensor], Tensor] | str:
    """``linear_cross_entropy`` of cut-cross-entropy: its Triton kernel on a GPU, its ``torch_compile`` path elsewhere."""
    module = _module("cut_cross_entropy")
    if isinstance(module, str):
        return module
    implementation = "cce" if device == "cuda" else "torch_compile"

    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -module.linear_cross_entropy(hidden, weight, targets, reduction="none", impl=implementation)

    return run


def liger(device: str) -> Callable[[Tensor, Tensor, Tensor], Tensor] | str:
    """``liger_fused_linear_cross_entropy`` of Liger-Kernel, on GPUs alone."""
    if device != "cuda":
        return NEEDS_CUDA
    module = _module("liger_kernel.transformers.functional")
    if isinstance(module, str):
        return module

    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -module.liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="none")

    return run


def trl_selective_log_softmax(device: str) -> Callable[[Tensor, Tensor], Tensor] | str:
    """``selective_log_softmax`` of TRL, which goes through the rows one by one, on GPUs alone."""
    if device != "cuda":
        return NEEDS_CUDA
    module = _module("trl.trainer.utils")
    return module if isinstance(module, str) else module.selective_log_softmax
