"""Signals of one backward, put together by units; which modules are captured."""

from __future__ import annotations

import torch
from torch import nn

from entropy_fast.engines.capture import CapturedModules, UnitGradients


class TestUnitGradients:
    def test_small_coefficients_in_half_precision(self) -> None:
        parameter = nn.Parameter(torch.zeros(3, 2, dtype=torch.float16))
        gradients = UnitGradients({"w": parameter}, 1)
        coefficient = torch.tensor([3e-5, -1e-5], dtype=torch.float64)
        gradients.expect([0, 0], (coefficient, coefficient), 4)
        left, right = torch.full((2, 4, 3), 1e-3).half(), torch.full((2, 4, 2), 0.5).half()
        gradients.product("w", left, right)
        expected = (coefficient.view(2, 1, 1) * left.double() * 0.5).sum((0, 1))
        torch.testing.assert_close(
            gradients.entropy["w"][0].double(), expected[:, None].expand(3, 2), rtol=1e-3, atol=0
        )

    def test_signals_that_are_not_by_sequence_are_refused(self) -> None:
        gradients = UnitGradients({"w": nn.Parameter(torch.zeros(3, 2))}, 1)
        gradients.expect([0, 0], (torch.ones(2).double(), torch.ones(2).double()), 4)
        gradients.product("w", torch.ones(5, 3), torch.ones(5, 2))
        gradients.per_row("b", torch.ones(3, 2))
        assert gradients.refused == {"w", "b"}

    def test_nothing_is_recorded_while_paused(self) -> None:
        gradients = UnitGradients({"w": nn.Parameter(torch.zeros(3, 2))}, 1)
        gradients.product("w", torch.ones(2, 4, 3), torch.ones(2, 4, 2))
        gradients.per_row("w", torch.ones(2, 3, 2))
        assert not gradients.touched


def test_routed_experts_are_not_captured() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(2, 2)])
            self.router = nn.Linear(2, 1)

    module = Experts()
    modules = CapturedModules(module, {id(p): name for name, p in module.named_parameters()})
    assert modules.captured == {"router.weight", "router.bias"}
