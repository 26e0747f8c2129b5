"""The influence kernel from its definition: one unpadded sequence at a time, ``torch.autograd.grad``, plain sums.

Nothing of the package is used here.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from probe_models.batches import Sample


@dataclasses.dataclass(frozen=True)
class Kernel:
    """K between two batches (or within one), and what was scored on the way."""

    matrix: Tensor
    learning_rate: float
    sequence_logprobs: dict[Sample, float]
    x_gradients: list[list[Tensor]]
    g_gradients: list[list[Tensor]]

    @property
    def same_batch(self) -> float:
        """lr · U, U the mean of K off the diagonal."""
        n = self.matrix.shape[0]
        off_diagonal = float(self.matrix.sum() - self.matrix.diagonal().sum())
        return self.learning_rate * off_diagonal / (n * (n - 1))

    @property
    def two_batch(self) -> float:
        """lr · mean of K."""
        return self.learning_rate * float(self.matrix.mean())


def kernel_by_definition(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    samples: Sequence[Sample],
    update: Sequence[Sample] | None = None,
    *,
    budget: int = 8,
    autocast: torch.dtype | None = None,
) -> Kernel:
    """K_nm = X_n · P g_m with prompts in order of first appearance and w_i = 1 / budget.

    Args:
        model: in a state without dropout; it runs in the mode it is in.
        optimizer: Adam or AdamW that has stepped.
        samples: the entropy batch, and the update batch too unless one is given.
        update: the update batch.
        budget: L_max.
        autocast: run the forward under autocast with this dtype.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]
    scored: dict[Sample, float] = {}

    def gradients(batch: Sequence[Sample], which: str) -> list[list[Tensor]]:
        found = []
        for group in dict.fromkeys(s.group for s in batch):
            members = [s for s in batch if s.group == group]
            values, per_sequence = [], []
            for sample in members:
                value = _sequence_logprob(model, sample, autocast)
                taken = torch.autograd.grad(value, parameters, allow_unused=True)
                per_sequence.append(
                    [torch.zeros_like(p) if g is None else g for g, p in zip(taken, parameters, strict=True)]
                )
                values.append(float(value))
                scored[sample] = float(value)
            size = len(members)
            total = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
            for i, sample in enumerate(members):
                if which == "X":
                    others = [values[j] / budget for j in range(size) if j != i]
                    coefficient = -(values[i] / budget - sum(others) / len(others)) / size
                else:
                    coefficient = sample.advantage / (budget * size)
                for part, gradient in zip(total, per_sequence[i], strict=True):
                    part += coefficient * gradient.to(torch.float64)
            found.append(total)
        return found

    x = gradients(samples, "X")
    g = gradients(samples if update is None else update, "Y")
    scale = [_preconditioner(optimizer, p) for p in parameters]
    matrix = torch.tensor(
        [
            [sum(float((a * b * s).sum()) for a, b, s in zip(row, column, scale, strict=True)) for column in g]
            for row in x
        ],
        dtype=torch.float64,
    )
    return Kernel(matrix, float(optimizer.param_groups[0]["lr"]), scored, x, g)


def _sequence_logprob(model: nn.Module, sample: Sample, autocast: torch.dtype | None) -> Tensor:
    ids = torch.tensor([[*sample.prompt, *sample.response]])
    context = contextlib.nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast)
    with context:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    wide = torch.promote_types(logits.dtype, torch.float32)
    start = len(sample.prompt)
    chosen = torch.log_softmax(logits[start - 1 : -1].to(wide), dim=-1)
    return chosen[torch.arange(len(sample.response)), torch.tensor(sample.response)].sum()


def _preconditioner(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    """Of the parameter's own group, its learning rate in units of the first group's."""
    state = optimizer.state[parameter]
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    corrected = state["exp_avg_sq"].to(torch.float64) / (1 - group["betas"][1] ** float(state["step"]))
    return (group["lr"] / optimizer.param_groups[0]["lr"]) / (corrected.sqrt() + group["eps"])
