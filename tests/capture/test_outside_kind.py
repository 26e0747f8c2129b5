"""A layer kind that the package does not know, registered from outside of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from engine_sums import assert_same_sums, observe
from probe_models.architectures import build_model, stepped_adamw
from probe_models.batches import make_rollouts
from torch import Tensor, nn

from entropy_fast.capture import CapturedLayer, Recorder, layer_kinds, own_parameters, register_layer_kind


class Gain(nn.Module):
    """A factor for every feature."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, size, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class CapturedGain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, name: str, recorder: Recorder) -> Tensor:
        ctx.save_for_backward(x, gain)
        ctx.name, ctx.recorder = name, recorder
        return x * gain

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        x, gain = ctx.saved_tensors
        ctx.recorder.per_position(ctx.name, above * x)
        return above * gain, None, None, None


def gain_kind(module: nn.Module, names: Mapping[int, str]) -> CapturedLayer | None:
    name = own_parameters(module, names).get("gain") if type(module) is Gain else None
    if name is None:
        return None
    return CapturedLayer(
        lambda _, recorder: lambda x: CapturedGain.apply(x, module.gain, name, recorder), frozenset({name})
    )


def test_a_kind_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("gpt2", dtype=torch.float64)
    model.transformer.h[1].mlp.act = nn.Sequential(model.transformer.h[1].mlp.act, Gain(4 * model.config.n_embd))
    optimizer, rollouts = stepped_adamw(model), make_rollouts((2, 3, 2, 4))
    expected = observe("two_pass", model, optimizer, rollouts)
    with pytest.warns(UserWarning, match="1 of .* trainable parameters are used in ways"):
        assert_same_sums(observe("one_pass", model, optimizer, rollouts), expected, 1e-10)
    monkeypatch.setattr(layer_kinds, "_KINDS", list(layer_kinds._KINDS))
    assert register_layer_kind(gain_kind) is gain_kind
    found = observe("one_pass", model, optimizer, rollouts)
    total = len(list(model.parameters()))
    assert found.result.plan.captured == f"{total} of {total} parameters captured"
    assert found.result.plan.way.startswith("packed")
    assert_same_sums(found, expected, 1e-10)
