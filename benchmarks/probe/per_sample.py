"""Kernel sums from per-sample gradients: what one does with `torch.func` or Opacus.

Legend (docs/theory.md): S_i sequence log-prob, c_i and a_i coefficients, X_n = Σ c_i ∇S_i and g_n = Σ a_i ∇S_i over the
responses of prompt n, Y_m = P g_m, K_nm = X_n · Y_m.

A library gives ∇S_i of every response of a prompt, [G, ...] for every parameter; that is summed to X_n and g_n at once, since
∇S_i of all sequences rarely fit memory together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.probe.frozen_two_pass import adam_scales
from benchmarks.probe.padded import Padded
from benchmarks.probe.setting import Setting
from benchmarks.probe.sums import Sums

_COLUMNS = 2**18  # of a matrix that are converted at a time

# S [1, G] and ∇S [G, ...] of every trained parameter, for a batch of one prompt.
PerSample = Callable[[Padded], tuple[Tensor, dict[str, Tensor]]]


def _stacks(setting: Setting, batch: Padded, per_sample: PerSample, wanted: str) -> dict[str, list[Tensor]]:
    """X and g of every prompt, ``[B, ...]`` for each trained parameter."""
    stacks = {label: [torch.zeros(batch.prompts, *p.shape) for p in setting.trained.values()] for label in wanted}
    for number, part in enumerate(batch.microbatches(1)):
        S, gradients = per_sample(part)
        coefficients = dict(zip("XY", part.coefficients(S.reshape(1, -1)), strict=True))
        for label, stack in stacks.items():
            for held, name in zip(stack, setting.trained, strict=True):
                held[number] = torch.tensordot(coefficients[label][0], gradients[name].float(), dims=1)
    return stacks


def kernel_sums(setting: Setting, per_sample: PerSample) -> Sums:
    """X_sum · Y_sum, row and column sums, and with one batch the diagonal (with two it is empty)."""
    update, entropy = setting.padded, setting.padded_entropy
    of_update = _stacks(setting, update, per_sample, "Y" if entropy is not None else "XY")
    X = of_update["X"] if entropy is None else _stacks(setting, entropy, per_sample, "X")["X"]
    kernel = torch.zeros(len(X[0]), len(of_update["Y"][0]), dtype=torch.float64)
    for x, g, scale in zip(X, of_update["Y"], adam_scales(setting.optimizer), strict=True):
        for columns, others in zip(*((t.flatten(1).split(_COLUMNS, 1)) for t in (x, g * scale)), strict=True):
            # Millions of products of both signs: their sum in fp32 would lose what the comparison looks at.
            kernel += columns.double() @ others.double().t()
    diagonal = kernel.diagonal() if entropy is None else torch.zeros(0, dtype=torch.float64)
    return Sums(float(kernel.sum()), diagonal, kernel.sum(1), kernel.sum(0))
