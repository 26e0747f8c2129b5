"""What rollouts hold, by name, to compare two of them."""

from __future__ import annotations

import torch

from entropy_fast import Rollouts


def tensors(rollouts: Rollouts) -> dict[str, torch.Tensor]:
    """Every tensor that was given, and those that follow from them."""
    found = {name: value for name, value in vars(rollouts).items() if isinstance(value, torch.Tensor)}
    return found | {name: getattr(rollouts, name) for name in ("prompt_index", "response_lengths", "length_budgets")}
