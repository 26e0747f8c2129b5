"""The entropy of a policy that has moved, from responses of the policy before: self-normalised importance sampling in fp64.

Legend: prompt n with G responses i, w_i = exp(S_i' - S_i) how much likelier a response has become, ŵ_i = w_i / Σ_j w_j within
its prompt, N_i weighted entropy of a response (w_i Σ_t H_t as the functional weighs it) and N_i' the same after the step.

    change_n = mean_i (N_i' - N_i) + G/(G - 1) [Σ_i ŵ_i N_i' - mean_i N_i']

The first term is what happens at the same prefixes, the second how often they are visited; normalising within a prompt shrinks
the second by 1 - 1/G on average, to first order, which the factor takes back. For the mean over all tokens, lengths change with
the visits likewise, and the change is that of a ratio. Errors are jackknifes over prompts.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

from entropy_fast.estimates.u_statistic import jackknife

__all__ = ["Reweighted", "reweighted"]

FEWEST_FOR_PARETO = 5  # weights in the tail, below which no shape can be fitted


@dataclasses.dataclass(frozen=True)
class Reweighted:
    """A change, from responses sampled before it.

    Attributes:
        total: of the expectation of the functional.
        total_std_error: of that, from the sampled prompts and responses; NaN for fewer than two prompts.
        direct: of the same responses at their own prefixes.
        direct_std_error: of that, from the sampled prompts; NaN for fewer than two.
        by_prompt: [B] each prompt's part; their mean is ``total`` unless the functional is a ratio.
        kept: [B] the total with each prompt left out.
        ess: share of the responses that are worth something after weighting: Σ_n 1/Σ ŵ² over their number.
        pareto_k: shape of the weights' tail; above 0.7 the total is not to be trusted, whatever its error says. NaN where
            weights do not vary or are too few.
    """

    total: float
    total_std_error: float
    direct: float
    direct_std_error: float
    by_prompt: Tensor
    kept: Tensor
    ess: float
    pareto_k: float


def reweighted(
    prompt: Tensor,
    log_weights: Tensor,
    before: Tensor,
    after: Tensor,
    lengths: Tensor | None = None,
) -> Reweighted:
    """The change of an expectation.

    Args:
        prompt: [N] index of each response's prompt.
        log_weights: [N] S_i' - S_i, fp64.
        before: [N] N_i, fp64.
        after: [N] N_i', fp64.
        lengths: [N] of responses, where the functional is Σ N over Σ lengths; None elsewhere.
    """
    n_prompts = int(prompt.max()) + 1
    parts: list[tuple[float, float, float, float, float]] = []
    effective = 0.0
    for n in range(n_prompts):
        rows = prompt == n
        share = torch.softmax(log_weights[rows], 0)
        size = int(rows.sum())
        effective += float(1 / share.square().sum())
        correction = size / (size - 1) if size > 1 else math.nan

        def visits(values: Tensor, share: Tensor = share, correction: float = correction) -> float:
            return correction * float((share * values).sum() - values.mean())

        own = torch.ones_like(before[rows]) if lengths is None else lengths[rows]
        parts.append(
            (
                float(before[rows].mean()),
                float(after[rows].mean()),
                visits(after[rows]),
                float(own.mean()),
                0.0 if lengths is None else visits(own),
            )
        )
    old, same, visit, length, longer = torch.tensor(parts, dtype=torch.float64).unbind(1)
    total = _ratio_change(old.mean(), (same + visit).mean(), length.mean(), (length + longer).mean())
    others = n_prompts - 1
    kept = torch.full((n_prompts,), torch.nan, dtype=torch.float64)
    kept_direct = kept
    if others:
        means = [(t.sum() - t) / others for t in (old, same + visit, length, length + longer)]
        kept = torch.stack([_ratio_change(*(m[n] for m in means)) for n in range(n_prompts)])
        kept_direct = (same - old).sum() - (same - old)
        kept_direct = kept_direct / (length.sum() - length)
    return Reweighted(
        float(total),
        jackknife(kept) if others else math.nan,
        float(same.mean() / length.mean() - old.mean() / length.mean()),
        jackknife(kept_direct) if others else math.nan,
        same + visit - old,
        kept,
        effective / len(prompt),
        pareto_k(log_weights),
    )


def _ratio_change(old: Tensor, new: Tensor, old_length: Tensor, new_length: Tensor) -> Tensor:
    return new / new_length - old / old_length


def pareto_k(log_weights: Tensor) -> float:
    """Shape of the tail of [N] weights, by arviz-stats; NaN where they do not vary or are too few."""
    values = log_weights.double().cpu().numpy()
    if len(values) < 5 * FEWEST_FOR_PARETO or not np.ptp(values) > 0:
        return math.nan
    from arviz_stats.base.array import array_stats

    try:
        with np.errstate(all="ignore"):
            return float(array_stats.psislw(values)[1])  # type: ignore[no-untyped-call]
    except ValueError:
        # Its way of saying that the tail is one value many times over.
        return math.nan
