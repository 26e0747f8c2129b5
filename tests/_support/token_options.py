"""Options under which coefficients differ from token to token, and what they are tried on."""

from __future__ import annotations

from typing import Any

import torch
from exactness import model_of, widened
from probe_models.batches import Sample, pack
from probe_models.token_kernel import TokenKernel, draw_old_logprobs, token_kernel_by_definition
from torch import nn

from entropy_fast import Rollouts

CLIP = (0.2, 0.3)
OPTIONS: dict[str, dict[str, Any]] = {
    "token entropies": {"entropy_estimator": "rao_blackwell"},
    "ratios": {"importance_ratio": "token"},
    "clipped ratios": {"importance_ratio": "token", "clip_range": CLIP},
    "both": {"entropy_estimator": "rao_blackwell", "importance_ratio": "token", "clip_range": CLIP},
}


def rollouts_of(samples: list[Sample], **fields: Any) -> Rollouts:
    """With log-probs of an old policy; NaN where nothing is scored, which nobody may read."""
    plain = pack(samples, **fields)
    table = torch.full(plain.loss_mask.shape, torch.nan, dtype=torch.float64)
    old = draw_old_logprobs(samples)
    table[plain.loss_mask == 1] = torch.tensor([v for s in samples for v in old[s]], dtype=torch.float64)
    return pack(samples, **{**fields, "old_logprobs": table})


def wide_model(family: str, adapter: bool) -> nn.Module:
    return widened(model_of(family, "lora" if adapter else "full, tied"))


def definition_of(
    options: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    samples: list[Sample],
    *,
    weighting: str = "dr_grpo",
) -> TokenKernel:
    """The kernel by definition under one of `OPTIONS`."""
    return token_kernel_by_definition(
        model,
        optimizer,
        samples,
        rao_blackwell="entropy_estimator" in OPTIONS[options],
        old=draw_old_logprobs(samples) if "importance_ratio" in OPTIONS[options] else None,
        clip=OPTIONS[options].get("clip_range"),
        weighting=weighting,
    )
