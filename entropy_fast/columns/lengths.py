"""How long responses are, as weights; and how many there are to a prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from entropy_fast.config import Weighting
from entropy_fast.errors import RolloutsError
from entropy_fast.rollouts import Rollouts

__all__ = ["check_group_sizes", "length_weights"]


def check_group_sizes(rollouts: Rollouts, *, instead: str = "use entropy_estimator='rao_blackwell'") -> None:
    """Raise unless every prompt has the two responses the leave-one-out baseline needs.

    Args:
        rollouts: the batch.
        instead: what does without it, for the message.

    Raises:
        RolloutsError: groups have a single sequence; the message names them.
    """
    sizes = torch.bincount(rollouts.prompt_index, minlength=rollouts.n_prompts)
    alone = (sizes < 2).nonzero()
    if alone.numel():
        groups = [rollouts.group_order[number] for number in alone.flatten().tolist()]
        raise RolloutsError(
            f"Rollouts: groups {groups} have 1 response with tokens; the leave-one-out baseline needs at least 2 responses per "
            "prompt.",
            fix=f"{instead}, or leave them out: rollouts.without_groups({groups}).",
        )


def length_weights(rollouts: Rollouts, weighting: Weighting, lengths: Tensor | None = None) -> Tensor:
    """w_i of every sequence, [N] fp64.

    1/L_max (``dr_grpo``), 1/L_i (``per_token``), 1 (``sequence``), or G_n B / Σ_j L_j (``pooled``), with which a mean over
    prompts of means over their G_n responses is a mean over all tokens of the batch.

    Args:
        rollouts: the whole batch.
        weighting: which.
        lengths: [N] L_i, where they are not those of the responses. Of one that is 0 nothing is weighed.
    """
    L = (rollouts.response_lengths if lengths is None else lengths).to(torch.float64)
    if weighting == "dr_grpo":
        return 1.0 / rollouts.length_budgets.to(torch.float64)[rollouts.prompt_index]
    if weighting == "per_token":
        return torch.where(L > 0, 1.0 / L.clamp_min(1.0), 0.0)
    if weighting == "pooled":
        sizes = torch.bincount(rollouts.prompt_index).to(torch.float64)[rollouts.prompt_index]
        return sizes * rollouts.n_prompts / L.sum().clamp_min(1.0)
    return torch.ones_like(L)
