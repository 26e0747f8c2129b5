"""A plain GRPO step, so that the optimizer state the probe reads is a real one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from entropy_fast.columns import columns_of
from entropy_fast.columns.column import Side
from entropy_fast.config import EstimateOptions
from entropy_fast.rollouts import Rollouts
from entropy_fast.rollouts.units import iter_microbatches
from entropy_fast.ways.teacher_forcing import align_logprobs, model_logits, pad_rows

__all__ = ["grpo_step"]


def grpo_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    prompts_per_microbatch: int,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> float:
    """One on-policy Dr. GRPO step: descend on -mean_n Σ_i a_i S_i.

    Args:
        model: the policy, in train mode.
        optimizer: steps its trainable parameters.
        rollouts: B prompts sampled from the current policy.
        prompts_per_microbatch: prompts in one forward.
        on_progress: called with a stage, prompts done and prompts in all.

    Returns:
        The gradient's Euclidean norm.
    """
    columns = columns_of(EstimateOptions(weighting="dr_grpo")).of_side(Side.UPDATE)
    device = next(model.parameters()).device
    optimizer.zero_grad(set_to_none=True)
    for rows in iter_microbatches(rollouts, list(range(rollouts.n_prompts)), prompts_per_microbatch):
        batch = pad_rows(rollouts, rows, device)
        forward = align_logprobs(model_logits(model, batch), batch)
        coefficients = columns.weigh(forward.scored_tokens(rollouts, rows))
        torch.autograd.backward(-coefficients.losses(forward, 0).sum() / rollouts.n_prompts)
        if on_progress is not None:
            on_progress("training", int(rollouts.prompt_index[rows].max()) + 1, rollouts.n_prompts)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
