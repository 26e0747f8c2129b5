"""Signals of one backward, put together by units; which modules are captured."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from entropy_fast.capture import CapturedModules, GradientRecorder, ProjectionRecorder


class TestGradientRecorder:
    def test_small_coefficients_in_half_precision(self) -> None:
        parameter = nn.Parameter(torch.zeros(3, 2, dtype=torch.float16))
        gradients = GradientRecorder({"w": parameter}, 1, 2)
        coefficient = torch.tensor([3e-5, -1e-5], dtype=torch.float64)
        gradients.expect([0, 0], torch.stack([coefficient] * 2), 4)
        left, right = torch.full((2, 4, 3), 1e-3).half(), torch.full((2, 4, 2), 0.5).half()
        gradients.product("w", left, right)
        expected = (coefficient.view(2, 1, 1) * left.double() * 0.5).sum((0, 1))
        for found in gradients.columns:
            torch.testing.assert_close(found["w"][0].double(), expected[:, None].expand(3, 2), rtol=1e-3, atol=0)

    def test_signals_that_are_not_by_sequence_are_refused(self) -> None:
        gradients = GradientRecorder({"w": nn.Parameter(torch.zeros(3, 2))}, 1, 2)
        gradients.expect([0, 0], torch.ones(2, 2).double(), 4)
        gradients.product("w", torch.ones(5, 3), torch.ones(5, 2))
        gradients.per_row("b", torch.ones(3, 2))
        assert gradients.refused == {"w", "b"}

    def test_nothing_is_recorded_while_paused(self) -> None:
        gradients = GradientRecorder({"w": nn.Parameter(torch.zeros(3, 2))}, 1, 2)
        gradients.product("w", torch.ones(2, 4, 3), torch.ones(2, 4, 2))
        gradients.per_row("w", torch.ones(2, 3, 2))
        assert not gradients.touched


class TestProjectionRecorder:
    """Two sequences of one unit and one of another, in a line of tokens; V differs between units."""

    RUNS: ClassVar = [(0, 0, 3), (1, 3, 5)]
    SEQUENCE = torch.tensor([0, 0, 1, 2, 2])
    COEFFICIENTS = torch.tensor([[2.0, 2.0, 0.5, -1.0, -1.0], [3.0, 3.0, 0.0, 0.25, 7.0]]).double()

    def projections(self, *shape: int, columns: tuple[int, ...] = (0,)) -> tuple[ProjectionRecorder, torch.Tensor]:
        directions = torch.randn(2, *shape, dtype=torch.float64)
        found = ProjectionRecorder(
            lambda _, unit: (directions[unit],) * len(columns), 4, columns, torch.device("cpu"), by_unit=True
        )
        found.start(torch.tensor([3, 0, 2]))
        found.expect_packed(self.RUNS, self.COEFFICIENTS, self.SEQUENCE)
        return found, directions

    def expected(self, by_token: torch.Tensor, column: int = 0) -> torch.Tensor:
        values, weighted = by_token.new_zeros(4, 1), by_token * self.COEFFICIENTS[column]
        values[3, 0], values[0, 0], values[2, 0] = weighted[:2].sum(), weighted[2], weighted[3:].sum()
        return values

    def test_every_direction_has_its_column_s_coefficients(self) -> None:
        left, right = torch.randn(1, 5, 3).double(), torch.randn(1, 5, 4).double()
        found, directions = self.projections(3, 4, columns=(0, 1))
        by_token = torch.einsum("ta,tab,tb->t", left[0], directions[[0, 0, 0, 1, 1]], right[0])
        found.product("w", left, right)
        # A backward for one column alone adds nothing to the other.
        found.expect_packed(self.RUNS, self.COEFFICIENTS * torch.tensor([[0.0], [1.0]]), self.SEQUENCE)
        found.product("w", left, right)
        x, g = (self.expected(by_token, column) for column in range(2))
        torch.testing.assert_close(found.values, torch.cat([x, 2 * g], 1))

    def test_products_from_either_side(self) -> None:
        for rows, columns in ((3, 7), (7, 3)):
            found, directions = self.projections(rows, columns)
            left, right = torch.randn(1, 5, rows).double(), torch.randn(1, 5, columns).double()
            found.product("w", left, right)
            of = directions[[0, 0, 0, 1, 1]]
            torch.testing.assert_close(found.values, self.expected(torch.einsum("ta,tab,tb->t", left[0], of, right[0])))

    def test_look_ups_in_a_table_and_in_a_transposed_one(self) -> None:
        index, rows = torch.tensor([[4, 0, 4, 2, 1]]), torch.randn(1, 5, 3).double()
        for transposed in (False, True):
            found, directions = self.projections(*((3, 6) if transposed else (6, 3)))
            found.scatter("e", index, rows, transposed=transposed)
            tables = directions.transpose(1, 2) if transposed else directions
            looked_up = tables[[0, 0, 0, 1, 1], index[0]]
            torch.testing.assert_close(found.values, self.expected((looked_up * rows[0]).sum(-1)))

    def test_signals_that_are_not_by_sequence_are_refused(self) -> None:
        found, _ = self.projections(3, 2)
        found.product("w", torch.ones(2, 5, 3), torch.ones(2, 5, 2))
        found.per_row("b", torch.ones(4, 3, 2))
        assert found.refused == {"w", "b"}
        assert not found.values.any()

    def test_nothing_is_recorded_while_paused(self) -> None:
        found, _ = self.projections(3, 2)
        found.pause()
        found.product("w", torch.ones(1, 5, 3), torch.ones(1, 5, 2))
        found.per_position("w", torch.ones(1, 5, 6))
        found.scatter("w", torch.zeros(1, 5).long(), torch.ones(1, 5, 2))
        assert not found.values.any()


def test_routed_experts_are_not_captured() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(2, 2)])
            self.router = nn.Linear(2, 1)

    module = Experts()
    modules = CapturedModules(module, {id(p): name for name, p in module.named_parameters()})
    assert modules.captured == {"router.weight", "router.bias"}
