"""A model, its optimizer and a batch, ready to be probed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from probe_options import options_of
from torch import nn

from entropy_fast import DeltaH1Result, OfflineEntropyProbe, ProbeComponents, Rollouts
from probe_models.architectures import add_lora, build_model, stepped_adamw
from probe_models.batches import Sample, make_samples, pack


@dataclasses.dataclass
class Case:
    """What a user has in hand when calling the probe."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    samples: list[Sample]
    rollouts: Rollouts

    def probe(self, *, engine: str = "two_pass", **options: Any) -> OfflineEntropyProbe:
        """By the reference engine unless another is asked for."""
        return OfflineEntropyProbe(self.model, self.optimizer, **options_of(engine=engine, **options))


def case_of(model: nn.Module, group_sizes: Sequence[int] = (2, 3, 2)) -> Case:
    samples = make_samples(group_sizes)
    return Case(model, stepped_adamw(model), samples, pack(samples))


def lora_case(family: str = "qwen2", group_sizes: Sequence[int] = (2, 3, 2), *, dropout: float = 0.0) -> Case:
    return case_of(add_lora(build_model(family, dropout=dropout), dropout=dropout), group_sizes)


def estimate_of(probe: OfflineEntropyProbe, *batches: Rollouts) -> DeltaH1Result:
    """Of one batch, or of an entropy batch and an update batch."""
    if len(batches) == 1:
        return probe.compute_delta_h1(*batches)
    return probe.run_mixed_probe(entropy_rollouts=batches[0], update_rollouts=batches[1])


def components_of(probe: OfflineEntropyProbe) -> ProbeComponents:
    """The two-pass engine in the probe's setting."""
    return ProbeComponents.of(probe.context)


def mute_adapters(model: nn.Module) -> None:
    """Adapters out of the forward while their parameters go on requiring grad (``disable_adapter()`` freezes them too)."""
    for module in model.modules():
        if hasattr(module, "_disable_adapters"):
            module._disable_adapters = True
