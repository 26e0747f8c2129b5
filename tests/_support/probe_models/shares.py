"""Shares of δH₁ from their definition: every sequence's gradient by itself, products of all pairs, then sums over pairs.

Legend: S_i log-prob of sequence i, c_i and a_i coefficients, D_ij = ∇S_i · P ∇S_j, w_i length weight. With one batch
δH₁ = lr Σ c_i a_j D_ij / pairs over sequences of different units. Nothing of the package is used here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from probe_models.batches import Sample
from probe_models.oracle import _preconditioner, _sequence_logprob

BUDGET = 8


@dataclasses.dataclass(frozen=True)
class Shares:
    """Of δH₁; ``terms`` [parameters, n of E, n of U] is what every pair of sequences adds in every parameter."""

    names: list[str]
    terms: Tensor

    @property
    def as_entropy(self) -> Tensor:
        return self.terms.sum((0, 2))

    @property
    def as_update(self) -> Tensor:
        return self.terms.sum((0, 1))

    @property
    def by_parameter(self) -> dict[str, float]:
        return dict(zip(self.names, self.terms.sum((1, 2)).tolist(), strict=True))


def shares_by_definition(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    samples: Sequence[Sample],
    update: Sequence[Sample] | None = None,
    *,
    weighting: str = "dr_grpo",
    blocks: int | None = None,
) -> Shares:
    """Of one batch, whose units are prompts or blocks of prompts; with an ``update`` batch, of two."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]
    scale = [_preconditioner(optimizer, p) for p in parameters]
    x_gradients, c, _ = _sequences(model, samples, parameters, weighting)
    if update is None:
        y_gradients, a = x_gradients, _sequences(model, samples, parameters, weighting)[2]
        unit = _units(samples, blocks)
        sizes = torch.bincount(torch.tensor(sorted({s.group: u for s, u in zip(samples, unit, strict=True)}.values())))
        pairs = float(sizes.sum() ** 2 - sizes.square().sum())
        apart = torch.tensor([[float(i != j) for j in unit] for i in unit], dtype=torch.float64)
    else:
        y_gradients, _, a = _sequences(model, update, parameters, weighting)
        pairs = float(len({s.group for s in samples}) * len({s.group for s in update}))
        apart = torch.ones(len(samples), len(update), dtype=torch.float64)
    products = torch.stack(
        [
            torch.stack([g[k].flatten() for g in x_gradients])
            @ torch.stack([(g[k] * p).flatten() for g in y_gradients]).t()
            for k, p in enumerate(scale)
        ]
    )
    factor = optimizer.param_groups[0]["lr"] / pairs
    return Shares([n for n, _ in named], factor * c[:, None] * a[None] * apart * products)


def _sequences(
    model: nn.Module, samples: Sequence[Sample], parameters: list[Tensor], weighting: str
) -> tuple[list[list[Tensor]], Tensor, Tensor]:
    """∇S_i, c_i and a_i."""
    gradients, weighted, weights = [], [], []
    for sample in samples:
        value = _sequence_logprob(model, sample, None)
        taken = torch.autograd.grad(value, parameters, allow_unused=True)
        gradients.append(
            [torch.zeros_like(p) if g is None else g.double() for g, p in zip(taken, parameters, strict=True)]
        )
        weights.append({"dr_grpo": 1 / BUDGET, "per_token": 1 / len(sample.response), "sequence": 1.0}[weighting])
        weighted.append(weights[-1] * float(value.detach()))
    c, a = [], []
    for i, sample in enumerate(samples):
        others = [weighted[j] for j, other in enumerate(samples) if other.group == sample.group and j != i]
        size = len(others) + 1
        c.append(-(weighted[i] - sum(others) / len(others)) / size)
        a.append(sample.advantage * weights[i] / size)
    return gradients, torch.tensor(c, dtype=torch.float64), torch.tensor(a, dtype=torch.float64)


def _units(samples: Sequence[Sample], blocks: int | None) -> list[int]:
    """Unit of every sample: its prompt in order of first appearance, or the block of successive prompts it is in."""
    prompts = list(dict.fromkeys(s.group for s in samples))
    if blocks is None:
        return [prompts.index(s.group) for s in samples]
    edges = torch.arange(len(prompts)).tensor_split(blocks)
    block_of = {int(p): number for number, part in enumerate(edges) for p in part}
    return [block_of[prompts.index(s.group)] for s in samples]
