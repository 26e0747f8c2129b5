"""Two ways from a loss to parameter gradients, each refusing to return nothing.

``backward()`` fills ``param.grad`` and works through everything training works through. ``torch.autograd.grad`` is what
some scripts use for Y; under reentrant checkpointing it answers None for every LoRA parameter while ``backward()`` fills
them all, so it is checked here and its failure explained.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from entropy_fast.checks.parameter_registry import ParameterRegistry
from entropy_fast.columns import Side
from entropy_fast.context import ProbeContext
from entropy_fast.errors import GradientCoverageError, GraphDetachedError

__all__ = ["gradients_by_autograd_grad", "gradients_by_backward", "gradients_by_route"]


def gradients_by_route(
    context: ProbeContext, side: Side, loss: Tensor, sequence_logprobs: Tensor, x_touched: Sequence[bool] | None
) -> Sequence[Tensor | None]:
    """By the route that was asked for; arguments and errors as of `gradients_by_autograd_grad`."""
    if side is Side.FUNCTIONAL or context.run.y_pass == "backward":
        return gradients_by_backward(loss, context.registry)
    return gradients_by_autograd_grad(
        loss, sequence_logprobs, context.registry, strict=context.run.strict, x_touched=x_touched
    )


def gradients_by_backward(loss: Tensor, registry: ParameterRegistry) -> list[Tensor | None]:
    """Gradients through ``loss.backward()``; ``param.grad`` is None before and after."""
    registry.module.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    gradients = [p.grad for p in registry.tensors]
    registry.module.zero_grad(set_to_none=True)
    return gradients


def gradients_by_autograd_grad(
    loss: Tensor,
    sequence_logprobs: Tensor,
    registry: ParameterRegistry,
    *,
    strict: bool,
    x_touched: Sequence[bool] | None,
) -> list[Tensor | None]:
    """Gradients through ``torch.autograd.grad``.

    Args:
        loss: the scalar to differentiate.
        sequence_logprobs: [n] S with its graph, for the probing backward of S.sum() when nothing comes back.
        registry: the parameters.
        strict: pass ``allow_unused=False``, so that torch itself names the parameter that is not in the graph.
        x_touched: which parameters the X pass reached, for the message.

    Raises:
        GradientCoverageError: every gradient is None; the message says what ``backward()`` gives on the same graph.
        GraphDetachedError: torch refuses (strict, or a reentrant checkpoint in the way).
    """
    try:
        gradients = torch.autograd.grad(loss, registry.tensors, allow_unused=not strict, retain_graph=True)
    except RuntimeError as error:
        raise GraphDetachedError(
            f"Y pass by torch.autograd.grad: {str(error).splitlines()[0]}",
            fix="use y_pass='backward'; with strict=True every trainable parameter has to be in the graph.",
        ) from error
    if all(g is None for g in gradients):
        n_backward = sum(g is not None for g in gradients_by_backward(sequence_logprobs.sum(), registry))
        n_x = "not run" if x_touched is None else f"{sum(x_touched)} parameters"
        raise GradientCoverageError(
            f"Y pass by torch.autograd.grad: None for all {len(gradients)} trainable parameters (X pass: {n_x}; S is "
            f"{sequence_logprobs.dtype} on {sequence_logprobs.device}; S.sum().backward() fills {n_backward}). "
            + (
                "Gradients exist but autograd.grad cannot see them: reentrant gradient checkpointing does this."
                if n_backward
                else "The graph does not reach the parameters at all."
            ),
            fix='use y_pass="backward", or gradient_checkpointing_kwargs={"use_reentrant": False}.',
        )
    return list(gradients)
