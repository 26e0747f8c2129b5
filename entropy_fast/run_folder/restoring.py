"""Putting a loaded model into the state in which a training step was kept: its dtypes, what was trained, the gradient.

torch is imported where it is used: a command's help needs none of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from entropy_fast.errors import BundleError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["floating_dtypes", "put_gradients", "take_dtypes"]

OTHER_MODEL = "pass the base model that was trained, and the adapter as it was saved."


def floating_dtypes(module: nn.Module) -> dict[str, str]:
    """Names of dtypes, as torch has them, by parameter and buffer; what holds whole numbers is left out."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors if tensor.is_floating_point()}


def take_dtypes(module: nn.Module, dtypes: Mapping[str, str]) -> None:
    """Cast parameters and buffers to the dtypes of before; loading knows one for all.

    Args:
        module: the model.
        dtypes: from `floating_dtypes`; names that the model does not have are passed by.
    """
    import torch

    for prefix, part in module.named_modules():
        for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            kept = dtypes.get(f"{prefix}.{name}" if prefix else name)
            dtype = None if kept is None else getattr(torch, kept, None)
            if isinstance(dtype, torch.dtype) and tensor.is_floating_point() and tensor.dtype != dtype:
                tensor.data = tensor.data.to(dtype)


def put_gradients(module: nn.Module, trainable: Iterable[str], path: Path | None) -> None:
    """Let what was trained be trained, and put the gradient into ``.grad``.

    Args:
        module: the model.
        trainable: names of the parameters that were trained; all others are frozen.
        path: safetensors file of the gradient; None for no gradient. A parameter that is not in it gets none.

    Raises:
        BundleError: the model has no such parameter, or one of another shape; or the file cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    named = dict(module.named_parameters())
    wanted = set(trainable)
    if unknown := sorted(wanted - set(named)):
        raise BundleError(
            f"the model has no parameter '{unknown[0]}' ({len(unknown)} of {len(wanted)} trained ones are missing).",
            fix=OTHER_MODEL,
        )
    try:
        gradients = {} if path is None else load_file(str(path))
    except (OSError, ValueError, SafetensorError) as error:
        raise BundleError(f"{path} cannot be read: {error}", fix="take another copy of the folder.") from error
    for name, parameter in named.items():
        if parameter.requires_grad != (name in wanted):
            parameter.requires_grad_(name in wanted)
        gradient = gradients.pop(name, None) if name in wanted else None
        if gradient is not None and gradient.shape != parameter.shape:
            raise BundleError(
                f"the gradient of '{name}' has shape {list(gradient.shape)}, the parameter {list(parameter.shape)}.",
                fix=OTHER_MODEL,
            )
        parameter.grad = None if gradient is None else gradient.to(parameter)
    if gradients:
        raise BundleError(f"{path} has a gradient of '{min(gradients)}', which was not trained.", fix=OTHER_MODEL)
