"""Options of a probe, checked once. They are data: nothing here touches a model."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Literal, get_args

import torch

from entropy_fast.errors import ConfigError

__all__ = [
    "AccumulateOn",
    "ConditionalVariance",
    "EntropyEstimator",
    "ImportanceRatio",
    "Mode",
    "ProbeConfig",
    "Weighting",
    "YPass",
]

Weighting = Literal["dr_grpo", "per_token", "sequence"]
EntropyEstimator = Literal["score_function", "rao_blackwell"]
ImportanceRatio = Literal["none", "token"]
Mode = Literal["exact", "blocks"]
AccumulateOn = Literal["device", "cpu"]
YPass = Literal["backward", "autograd_grad"]
ConditionalVariance = Literal["per_prompt", "alpha"]


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    """How a probe is run.

    Args:
        weighting: length weight w_i of a sequence log-prob: ``dr_grpo`` 1/L_max, ``per_token`` 1/L_i, ``sequence`` 1.
        entropy_estimator: how the entropy gradient is estimated: ``score_function`` from log-probs, with a leave-one-out
            baseline; ``rao_blackwell`` from the entropy of the model's distribution at every token, which usually varies less
            from sample to sample and costs another backward.
        importance_ratio: ``token`` multiplies the update's gradient at every token by πθ/π_old, from the rollouts'
            ``old_logprobs``, as the clipped surrogate of PPO and GRPO does once θ has moved on from what sampled, and costs
            another backward; ``none`` takes the ratio to be 1.
        clip_range: ε_low and ε_high: with ``importance_ratio="token"``, tokens whose ratio is above 1 + ε_high under a positive
            advantage, or below 1 - ε_low under a negative one, send nothing back; None clips nothing.
        mode: ``exact`` takes every prompt as a unit of the U-statistic, ``blocks`` takes blocks of prompts (fewer
            backward passes, a coarser error bar).
        blocks: number of blocks M for ``mode="blocks"``, at least 2.
        prompts_per_microbatch: prompts in one forward; None leaves that to the engine: one for the two-pass engine, and as
            many tokens as matrix products need to run at full rate for the one-pass engine.
        accumulate_on: where X_sum and Y_sum are kept; ``cpu`` costs a copy per microbatch and frees device memory.
        y_pass: how the update gradient is taken; ``autograd_grad`` is the route some scripts use, kept to compare with.
        conditional_variance: how the per-prompt projections of the entropy batch are obtained in the two-batch estimate:
            one backward a prompt, or the double backward of the alpha trick.
        strict: an untouched trainable parameter is an error instead of a count.
        autocast_dtype: run forwards under autocast with this dtype; None leaves the caller's autocast state alone.
        full_kernel: for the two-pass engine: keep every prompt's gradients (2·B copies of the trainable parameters, on the CPU)
            and return the whole influence kernel K [B, B], which also gives the unbiased variance of U. The one-pass engine
            does where they fit ``memory_budget``.
        max_excluded_share: largest share of ‖g‖² that may sit in elements the optimizer has no second moment for
            (v = 0, no state, not in the optimizer) before the probe refuses to answer.
        memory_budget: bytes, as a number or like "8GiB", that the one-pass engine may spend on keeping every unit's gradients,
            which gives the whole influence kernel; above it the kernel's diagonal, row and column sums come from a second
            sweep over the batch. A microbatch's activations are held to it too.
        by_sequence: give every sequence's share of δH₁ too, by one more sweep a batch; for the one-pass engine alone. With one
            batch, every unit's gradients have to fit ``memory_budget``.

    Raises:
        ConfigError: an option has a value outside what is listed.
    """

    weighting: Weighting = "dr_grpo"
    entropy_estimator: EntropyEstimator = "score_function"
    importance_ratio: ImportanceRatio = "none"
    clip_range: tuple[float, float] | None = None
    mode: Mode = "exact"
    blocks: int | None = None
    prompts_per_microbatch: int | None = None
    accumulate_on: AccumulateOn = "device"
    y_pass: YPass = "backward"
    conditional_variance: ConditionalVariance = "per_prompt"
    strict: bool = False
    autocast_dtype: torch.dtype | None = None
    full_kernel: bool = False
    max_excluded_share: float = 0.01
    memory_budget: int | str = 4 * 2**30
    by_sequence: bool = False

    def __post_init__(self) -> None:
        for field, choices in (
            ("weighting", get_args(Weighting)),
            ("entropy_estimator", get_args(EntropyEstimator)),
            ("importance_ratio", get_args(ImportanceRatio)),
            ("mode", get_args(Mode)),
            ("accumulate_on", get_args(AccumulateOn)),
            ("y_pass", get_args(YPass)),
            ("conditional_variance", get_args(ConditionalVariance)),
        ):
            if getattr(self, field) not in choices:
                raise ConfigError(
                    f"ProbeConfig: `{field}` is {getattr(self, field)!r}.", fix=f"use one of {', '.join(choices)}."
                )
        self._check_clip_range()
        for field in ("prompts_per_microbatch", "blocks"):
            value = getattr(self, field)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise ConfigError(f"ProbeConfig: `{field}` is {value!r}.", fix="use a whole number.")
        if self.mode == "blocks" and (self.blocks is None or self.blocks < 2):
            raise ConfigError(
                f"ProbeConfig: mode='blocks' with blocks={self.blocks}; the U-statistic needs at least 2 blocks.",
                fix="pass blocks=M with 2 <= M <= number of prompts.",
            )
        if self.mode == "exact" and self.blocks is not None:
            raise ConfigError(
                f"ProbeConfig: blocks={self.blocks} has no meaning in mode='exact'.",
                fix="pass mode='blocks', or leave it out.",
            )
        if self.prompts_per_microbatch is not None and self.prompts_per_microbatch < 1:
            raise ConfigError(
                f"ProbeConfig: `prompts_per_microbatch` is {self.prompts_per_microbatch}.", fix="use 1 or more."
            )
        if _bytes(self.memory_budget) is None:
            raise ConfigError(
                f"ProbeConfig: `memory_budget` is {self.memory_budget!r}.",
                fix='use a number of bytes, such as 8 * 2**30, or a text such as "8GiB", "500 MB".',
            )
        if not 0 <= self.max_excluded_share <= 1:
            raise ConfigError(
                f"ProbeConfig: `max_excluded_share` is {self.max_excluded_share}; it is a share.",
                fix="use a number in [0, 1].",
            )
        if self.autocast_dtype not in (None, torch.bfloat16, torch.float16):
            raise ConfigError(
                f"ProbeConfig: `autocast_dtype` is {self.autocast_dtype}.",
                fix="use torch.bfloat16, torch.float16 or None.",
            )

    def _check_clip_range(self) -> None:
        if self.clip_range is None:
            return
        if self.importance_ratio == "none":
            raise ConfigError(
                f"ProbeConfig: clip_range={self.clip_range!r} with importance_ratio='none', whose ratios are all 1.",
                fix="pass importance_ratio='token' (--importance-ratio token), or leave clip_range (--clip) out.",
            )
        given: object = self.clip_range  # whatever somebody passed
        pair = isinstance(given, (tuple, list)) and len(given) == 2 and all(type(e) in (int, float) for e in given)
        if not pair or not (0 <= self.clip_range[0] <= 1 and 0 <= self.clip_range[1] < math.inf):
            raise ConfigError(
                f"ProbeConfig: `clip_range` is {given!r}.",
                fix="use (ε_low, ε_high) with ε_low in [0, 1] and ε_high >= 0, such as (0.2, 0.2) for 0.2 on both sides.",
            )

    @property
    def coefficients_by_token(self) -> bool:
        """Whether coefficients differ within a sequence, so that X and g are no multiples of one ∇S_i."""
        return self.wants_token_entropies or self.importance_ratio == "token"

    @property
    def wants_token_entropies(self) -> bool:
        """Whether the entropy gradient needs the entropy of the model's distribution at every response token."""
        return self.entropy_estimator == "rao_blackwell"

    def wants_token_entropies_for(self, labels: str) -> bool:
        """Likewise, where only the ``labels`` of X and Y are wanted: an update has no use for them."""
        return self.wants_token_entropies and "X" in labels

    @property
    def memory_bytes(self) -> int:
        """``memory_budget`` as a number of bytes."""
        found = _bytes(self.memory_budget)
        assert found is not None
        return found


_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{i}B": (1024 if i else 1000) ** power for power, prefix in enumerate("KMGT", start=1) for i in ("", "i")
}


def _bytes(budget: int | str) -> int | None:
    """A number of bytes, None where it is not one."""
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", budget)
        known = {name.lower(): size for name, size in _UNITS.items()}
        if match is None or match[2].lower() not in known:
            return None
        return int(float(match[1]) * known[match[2].lower()])
    return budget if isinstance(budget, int) and not isinstance(budget, bool) and budget >= 0 else None
