"""Per-sample gradients by Opacus' hooks, a prompt's responses at a time."""

from __future__ import annotations

import importlib.util
import warnings

import torch
from torch import Tensor

from benchmarks.probe.padded import Padded
from benchmarks.probe.per_sample import kernel_sums
from benchmarks.probe.plain_step import sequence_logprobs
from benchmarks.probe.setting import Setting
from benchmarks.probe.sums import Sums


def why_not() -> str | None:
    """The reason when Opacus cannot be tried here."""
    if importlib.util.find_spec("opacus") is None:
        return "not installed (pip install '.[bench]')"
    return None


def opacus_sums(setting: Setting) -> Sums:
    """Kernel sums; see `benchmarks.probe.per_sample`. Hooks and flags are gone from the model afterwards."""
    with warnings.catch_warnings():
        # Secure random numbers, which this has no use for, and hooks that fire before their module's inputs are done.
        warnings.simplefilter("ignore")
        from opacus import GradSampleModule

        wrapped = GradSampleModule(setting.model, batch_first=True, loss_reduction="sum", strict=False)
        trained = setting.trained

        def per_sample(part: Padded) -> tuple[Tensor, dict[str, Tensor]]:
            S = sequence_logprobs(wrapped, part, setting.autocast())
            torch.autograd.backward(S.sum())
            gradients = {name: p.grad_sample for name, p in trained.items()}
            wrapped.zero_grad(set_to_none=True)
            return S.detach(), gradients

        try:
            return kernel_sums(setting, per_sample)
        finally:
            wrapped.zero_grad(set_to_none=True)
            wrapped.to_standard_module()
