"""A layer whose backward writes over what it saved, as gated products of kernel libraries do to save memory.

A second backward over the same graph goes through what the first has left, and autograd does not see it: the numbers would be
wrong without a word.
"""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from probe_models.architectures import add_lora, build_model, stepped_adamw
from probe_models.batches import make_rollouts
from torch import Tensor, nn

from entropy_fast import DeltaH1Result, EstimateOptions, RunOptions, fast_delta_h1


class GatedProduct(torch.autograd.Function):
    """silu(gate) · up; its backward leaves the two gradients where the two factors were."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        sigmoid = torch.sigmoid(gate)
        by_gate = above * up * sigmoid * (1 + gate * (1 - sigmoid))
        by_up = above * nn.functional.silu(gate)
        # Through `.data` the counter that autograd looks at stays as it is, as where a kernel gets a pointer.
        gate.data.copy_(by_gate)
        up.data.copy_(by_up)
        return gate.data, up.data


def gated(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(GatedProduct.apply(self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-untyped-call]


def with_the_librarys_forward(model: nn.Module, library: str = "liger_kernel.transformers.swiglu") -> nn.Module:
    """As such a library patches a model: a forward of the instance's own."""
    function = types.FunctionType(gated.__code__, gated.__globals__)
    function.__module__ = library
    for module in model.modules():
        if hasattr(module, "gate_proj"):
            module.forward = types.MethodType(function, module)
    return model


def forecast(model: nn.Module, engine: str) -> DeltaH1Result:
    """With several backwards over the same graph: two parts, or a prompt's terms by themselves."""
    estimate = EstimateOptions(entropy_estimator="score_function") if engine == "two_pass" else EstimateOptions()
    return fast_delta_h1(
        model, stepped_adamw(model), make_rollouts((2, 2, 2)), estimate=estimate, run=RunOptions(engine=engine)
    )


@pytest.mark.parametrize("engine", ["one_pass", pytest.param("two_pass", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_every_backward_goes_through_what_the_forward_saved(engine: str, lora: bool) -> None:
    def model() -> nn.Module:
        return add_lora(build_model()) if lora else build_model()

    plain, patched = (forecast(made, engine) for made in (model(), with_the_librarys_forward(model())))
    assert patched.delta_h1 == pytest.approx(plain.delta_h1, rel=1e-5)
    assert patched.std_error == pytest.approx(plain.std_error, rel=1e-5)
    if engine == "one_pass":
        assert plain.split is not None and patched.split is not None
        assert patched.split.direct.value == pytest.approx(plain.split.direct.value, rel=1e-5)


def test_the_layer_of_this_test_does_what_is_feared() -> None:
    """Under a name that nobody knows, it makes the numbers wrong: else the test above shows nothing."""
    plain, patched = (
        forecast(made, "one_pass")
        for made in (build_model(), with_the_librarys_forward(build_model(), "somebody_elses.layers"))
    )
    assert abs(patched.delta_h1 - plain.delta_h1) > 0.01 * abs(plain.delta_h1)
