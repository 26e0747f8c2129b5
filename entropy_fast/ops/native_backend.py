"""Calls into the compiled library, ``entropy_fast._native``: the backends ``native`` (CPU) and ``cuda``."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entropy_fast._version import __version__
from entropy_fast.errors import NativeLibraryError

if TYPE_CHECKING:
    from entropy_fast import _native

__all__ = ["backward", "cpu_detail", "cpu_reason", "cuda_detail", "cuda_reason", "forward"]


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The library, or None and the reason why it cannot be used."""
    try:
        library = importlib.import_module("entropy_fast._native")
    except ImportError as error:
        return None, f"the compiled library entropy_fast._native cannot be imported ({error})"
    built_for = library.build_info()["version"]
    if built_for != __version__:
        return None, f"the compiled library belongs to entropy_fast {built_for}, this is {__version__}"
    return library, ""


def _library() -> ModuleType:
    library, why_not = _load()
    if library is None:
        raise NativeLibraryError(f"{why_not}.", fix="install entropy-fast again: pip install --force-reinstall .")
    return library


def cpu_reason(device_type: str) -> str:
    """Why the CPU kernels cannot run on a device type; empty where they can."""
    if device_type != "cpu":
        return f"it runs on CPU tensors, not on {device_type}"
    library, why_not = _load()
    if library is None:
        return why_not
    try:
        library.selected_variant()
    except RuntimeError as error:
        return str(error)
    return ""


def cuda_reason(device_type: str) -> str:
    """Why the CUDA kernels cannot run on a device type; empty where they can."""
    if device_type != "cuda":
        return f"it runs on CUDA tensors, not on {device_type}"
    library, why_not = _load()
    if library is None:
        return why_not
    info = library.build_info()
    if not info["cuda"]:
        return f"the library has no CUDA kernels: {info['cuda_reason']}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    count, why_not = library.cuda_device_count()
    if count < 1:
        return f"no CUDA device can be used ({why_not or 'none was found'})"
    return ""


def cpu_detail() -> str:
    """The instruction set that runs here, and the compiler."""
    info = _library().build_info()
    return f"{_library().selected_variant()} on {info['architecture']}, {info['cxx_compiler']}"


def cuda_detail() -> str:
    """The architectures in the library, and the compiler."""
    info = _library().build_info()
    return f"{info['cuda_architectures']}, {info['cuda_compiler']}"


def _element_type(dtype: torch.dtype) -> _native.ElementType:
    element_type: _native.ElementType = getattr(_library().ElementType, str(dtype).removeprefix("torch."))
    return element_type


def forward(logits: Tensor, targets: Tensor, logprob: Tensor, lse: Tensor, ignore_index: int) -> None:
    """Fill ``logprob`` and ``lse``. Shapes and dtypes are the caller's business; the last dimension is contiguous."""
    arguments = {
        "logits": logits.data_ptr(),
        "targets": targets.data_ptr(),
        "logprob": logprob.data_ptr(),
        "lse": lse.data_ptr(),
        "rows": logits.shape[0],
        "vocabulary": logits.shape[1],
        "row_stride": logits.stride(0),
        "ignore_index": ignore_index,
        "element_type": _element_type(logits.dtype),
    }
    _call("token_logprobs_forward", logits.device, arguments)


def backward(
    grad_logprob: Tensor,
    grad_lse: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    grad_logits: Tensor,
    ignore_index: int,
) -> None:
    """Fill ``grad_logits``, which is contiguous, like every one-dimensional argument."""
    arguments = {
        "logits": logits.data_ptr(),
        "targets": targets.data_ptr(),
        "lse": lse.data_ptr(),
        "grad_logprob": grad_logprob.data_ptr(),
        "grad_lse": grad_lse.data_ptr(),
        "grad_logits": grad_logits.data_ptr(),
        "rows": logits.shape[0],
        "vocabulary": logits.shape[1],
        "row_stride": logits.stride(0),
        "ignore_index": ignore_index,
        "element_type": _element_type(logits.dtype),
    }
    _call("token_logprobs_backward", logits.device, arguments)


def _call(function: str, device: torch.device, arguments: dict[str, object]) -> None:
    library = _library()
    try:
        if device.type == "cuda":
            with torch.cuda.device(device):
                stream = torch.cuda.current_stream(device).cuda_stream
                getattr(library, f"{function}_cuda")(**arguments, stream=stream)
        else:
            getattr(library, f"{function}_cpu")(**arguments, threads=torch.get_num_threads())
    except (RuntimeError, ValueError) as error:
        raise NativeLibraryError(
            f"{function} was refused by the compiled library: {error}.",
            fix="check the arguments; if they are right, report this with the output of `entropy-fast doctor`.",
        ) from error
