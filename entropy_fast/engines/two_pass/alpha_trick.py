"""All per-prompt projections s_n = X_n · Ȳ of a group of prompts from one double backward.

With L(α) = Σ_n α_n L_n, L_n = Σ_{i in n} c_i S_i (`entropy_fast.columns`), and g = ∇_θ L at α = 1 taken with ``create_graph``,
the scalar h = g · Ȳ is linear in α and s_n = ∂h/∂α_n. No backward per prompt is needed, but second derivatives are: the
attention must be differentiable twice (torch's math kernel is) and checkpointing must not be reentrant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from entropy_fast.checks.model_state import reentrant_checkpointing
from entropy_fast.columns import Coefficients, Columns
from entropy_fast.columns.coefficients import power_of_two_scale
from entropy_fast.context import ProbeContext
from entropy_fast.errors import CheckpointingError, GradientCoverageError, GraphDetachedError
from entropy_fast.rollouts import Rollouts
from entropy_fast.ways.teacher_forcing import ForwardResult

__all__ = [
    "AlphaProjections",
    "alpha_projections",
    "put_projections",
    "refuse_reentrant_checkpointing",
    "twice_differentiable_attention",
]


@dataclasses.dataclass(frozen=True)
class AlphaProjections:
    """s_n of k prompts.

    Attributes:
        projections: [k] s_n, fp64 on the CPU.
        n_with_gradient: parameters L reached.
    """

    projections: Tensor
    n_with_gradient: int


def refuse_reentrant_checkpointing(model: nn.Module) -> None:
    """Raise when the model checkpoints in reentrant mode.

    Raises:
        CheckpointingError: it does; the message names the module.
    """
    name = reentrant_checkpointing(model)
    if name is not None:
        raise CheckpointingError(
            f"the alpha trick differentiates twice, and '{name}' uses reentrant gradient checkpointing (the default of "
            "peft.prepare_model_for_kbit_training), through which torch.autograd.grad cannot go even once.",
            fix='model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}), or '
            "gradient_checkpointing_disable(), or conditional_variance='per_prompt'.",
        )


def twice_differentiable_attention() -> AbstractContextManager[None]:
    """Context for forward *and* backward of the alpha trick: fused attention kernels have no second derivative."""
    context: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return context


def put_projections(
    into: Tensor,
    context: ProbeContext,
    forward: ForwardResult,
    columns: Columns,
    entropy: Rollouts,
    rows: Tensor,
    y_mean: Sequence[Tensor],
) -> Tensor:
    """Write s_n of the prompts of one forward.

    Args:
        into: [B] where to.
        context: of the probe.
        forward: of ``rows``, with their graph.
        columns: the one functional.
        entropy: the batch.
        rows: [n] whole prompts, one after the other.
        y_mean: Ȳ, one tensor per parameter.

    Returns:
        The prompts' indices, ascending.

    Raises:
        GradientCoverageError, GraphDetachedError: see `alpha_projections`.
    """
    prompts: Tensor
    prompts, local = torch.unique(entropy.prompt_index[rows], return_inverse=True)
    coefficients = columns.weigh(forward.scored_tokens(entropy, rows))
    parameters, strict = context.registry.tensors, context.run.strict
    found = alpha_projections(forward, coefficients, local.to(context.device), parameters, y_mean, strict=strict)
    into[prompts] = found.projections
    return prompts


def alpha_projections(
    forward: ForwardResult,
    coefficients: Coefficients,
    local_prompt: Tensor,
    parameters: Sequence[Tensor],
    y_mean: Sequence[Tensor],
    *,
    strict: bool,
) -> AlphaProjections:
    """s_n of the prompts of one forward.

    Args:
        forward: n sequences with their graph.
        coefficients: of those n sequences, detached.
        local_prompt: [n] prompt index 0..k-1 of each sequence.
        parameters: trainable parameters.
        y_mean: Ȳ, one tensor per parameter.
        strict: every parameter must be in the graph.

    Raises:
        GradientCoverageError: no parameter receives a gradient from L; the message says whether the logits do.
        GraphDetachedError: an operation in the model has no second derivative.
    """
    losses = coefficients.losses(forward, 0)
    k = int(local_prompt.max()) + 1
    alpha = torch.ones(k, dtype=losses.dtype, device=losses.device, requires_grad=True)
    scale = power_of_two_scale(coefficients.largest(0))
    loss = scale * (alpha[local_prompt] * losses).sum()
    try:
        gradients = torch.autograd.grad(loss, list(parameters), create_graph=True, allow_unused=not strict)
    except RuntimeError as error:
        raise GraphDetachedError(
            f"alpha trick: {str(error).splitlines()[0]}",
            fix="with strict=True every trainable parameter has to be in the graph; freeze what is not in the forward.",
        ) from error
    reached = [(g, y) for g, y in zip(gradients, y_mean, strict=True) if g is not None]
    if not reached:
        at_logits = torch.autograd.grad(loss, forward.logits, allow_unused=True, retain_graph=True)[0]
        below = at_logits is not None and bool((at_logits != 0).any())
        found = (
            "there, so the graph is cut inside the model"
            if below
            else "missing or zero, so the graph is cut between logits and log-probs"
        )
        raise GradientCoverageError(
            f"alpha trick: none of the {len(parameters)} trainable parameters receives a gradient from L. The gradient with "
            f"respect to the logits is {found}.",
            fix="look for detach(), no_grad or reentrant checkpointing in the model's forward; check that the adapter that "
            "is trained is the active one.",
        )
    # g is linear in α, so every part of it has a graph; a part without one would be missing from s_n without a word.
    if not all(g.requires_grad for g, _ in reached):
        raise GraphDetachedError(
            f"alpha trick: the gradient of L carries no graph for {sum(not g.requires_grad for g, _ in reached)} of "
            f"{len(reached)} parameters, so an operation in the model has no second derivative.",
            fix="use attn_implementation='sdpa' or 'eager', or conditional_variance='per_prompt'.",
        )
    products = [
        (g.to(torch.promote_types(g.dtype, torch.float32)) * y.to(g.device)).sum().to(alpha.device) for g, y in reached
    ]
    h = torch.stack(products).sum()
    try:
        (projections,) = torch.autograd.grad(h, alpha)
    except RuntimeError as error:
        raise GraphDetachedError(
            f"alpha trick: the model cannot be differentiated twice: {str(error).splitlines()[0]}",
            fix="use attn_implementation='sdpa' or 'eager' and torch's own operations, or "
            "conditional_variance='per_prompt', which needs first derivatives only.",
        ) from error
    _check_linearity(float(h.detach()), float(projections.sum()), reached, forward.logits.dtype)
    return AlphaProjections(projections.detach().to(device="cpu", dtype=torch.float64) / scale, len(reached))


def _check_linearity(h: float, total: float, reached: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
    """Raise unless Σ_n ∂h/∂α_n = h at α = 1, as it must since h is linear in α.

    A path without second derivative beside others that have one (a residual branch) shows nowhere else. The allowance is
    for rounding, relative to Σ_p ‖g_p‖ ‖Ȳ_p‖.
    """
    size = sum(float(g.detach().float().norm()) * float(y.float().norm()) for g, y in reached)
    rounding = 1e-3 if dtype in (torch.float32, torch.float64) else 1e-2
    if abs(total - h) > 0.05 * max(abs(h), abs(total)) + rounding * size:
        raise GraphDetachedError(
            f"alpha trick: the projections sum to {total:.6g} and g·Ȳ is {h:.6g}; they must agree, so an operation in "
            "the model has no second derivative.",
            fix="use attn_implementation='sdpa' or 'eager' and torch's own operations, or "
            "conditional_variance='per_prompt', which needs first derivatives only.",
        )
