"""Autograd has to be on, and graphs have to be there: checks with the place and the remedy in the message."""

from __future__ import annotations

import torch
from torch import Tensor

from entropy_fast.errors import GradContextError, GraphDetachedError

__all__ = ["DETACHED_FIX", "assert_attached", "assert_grad_context"]

DETACHED_FIX = (
    "remove no_grad/inference_mode inside the model's forward, detach() and .data on hidden states, and "
    "disable_adapter() around the probe, and unmerge a merged adapter; for gradient checkpointing over frozen embeddings call "
    "model.enable_input_require_grads(); unfreeze the parameters that are trained."
)


def assert_grad_context(where: str) -> None:
    """Raise unless autograd records here.

    Args:
        where: the function that is about to run a forward or a backward, for the message.

    Raises:
        GradContextError: inference mode is on, or gradients are disabled.
    """
    if torch.is_inference_mode_enabled():
        raise GradContextError(
            f"{where}: called under torch.inference_mode(), which disables autograd globally: no gradient can be taken, "
            "whatever requires_grad says.",
            fix="rerun the probe outside inference mode: leave the `with torch.inference_mode()` block, or remove the "
            "@torch.inference_mode() decorator, before calling it (torch.enable_grad() does not undo inference mode).",
        )
    if not torch.is_grad_enabled():
        raise GradContextError(
            f"{where}: called while gradients are disabled (torch.no_grad() or torch.set_grad_enabled(False)).",
            fix="remove no_grad around the probe: the `with torch.no_grad()` block, the @torch.no_grad() decorator, or a "
            "set_grad_enabled(False) that was never undone.",
        )


def assert_attached(name: str, tensor: Tensor, where: str, fix: str = DETACHED_FIX) -> None:
    """Raise unless ``tensor`` requires grad and carries a ``grad_fn``.

    Args:
        name: what the tensor is called in the message.
        tensor: the tensor to look at.
        where: the function that produced it.
        fix: what to remove, and where.

    Raises:
        GraphDetachedError: the tensor is cut off from the parameters.
    """
    if tensor.requires_grad and tensor.grad_fn is not None:
        return
    raise GraphDetachedError(
        f"{where}: {name} {list(tensor.shape)} {tensor.dtype} on {tensor.device} has requires_grad="
        f"{tensor.requires_grad} and grad_fn={tensor.grad_fn}; it must carry the graph of the trainable parameters.",
        fix=fix,
    )
