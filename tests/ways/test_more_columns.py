"""Columns that the package does not know: recorders hold the gradients of their losses, whichever way sequences go.

Legend: C columns, c_i or c_t and e_t their coefficients of S_i, s_t and H_t.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch
from probe_models.architectures import add_lora, build_model, stepped_adamw
from probe_models.batches import make_samples, pack
from probe_models.own_dtype import computing_in_own_dtype
from torch import Tensor, nn

from entropy_fast import Rollouts
from entropy_fast.capture import CapturedModules, GradientRecorder
from entropy_fast.columns import Columns, ScoredTokens, Side, columns_of
from entropy_fast.columns.coefficients import ColumnWeights
from entropy_fast.columns.column import ColumnDefaults
from entropy_fast.config import EstimateOptions
from entropy_fast.context import ProbeContext
from entropy_fast.step import AdamState
from entropy_fast.ways import Microbatch, Way
from entropy_fast.ways.packed import PackedWay
from entropy_fast.ways.packed import way as packed_way
from entropy_fast.ways.padded import LogitsWay
from entropy_fast.ways.teacher_forcing import align_logprobs, model_logits, pad_rows


@dataclasses.dataclass(frozen=True)
class Reward(ColumnDefaults):
    """A number per sequence, with a leave-one-out baseline in its prompt."""

    name: ClassVar[str] = "reward"
    side: ClassVar[Side] = Side.FUNCTIONAL
    by_token: ClassVar[bool] = False
    needs_entropies: ClassVar[bool] = False

    def check(self, rollouts: Rollouts) -> None:
        pass

    def weigh(self, scored: ScoredTokens) -> ColumnWeights:
        reward = torch.sin(3.0 * scored.rows.double())
        member, size = scored.places.member, scored.places.group_size
        others = (member @ (member.T @ reward) - reward) / (size - 1)
        return ColumnWeights(((reward - others) / size).to(scored.logprobs.device))


@dataclasses.dataclass(frozen=True)
class TokenEntropies(ColumnDefaults):
    """The entropies of tokens alone, later ones weighing less; with a ``cross`` their log-probs too."""

    cross: float
    name: ClassVar[str] = "token entropies"
    side: ClassVar[Side] = Side.FUNCTIONAL
    by_token: ClassVar[bool] = True
    needs_entropies: ClassVar[bool] = True

    def check(self, rollouts: Rollouts) -> None:
        pass

    def weigh(self, scored: ScoredTokens) -> ColumnWeights:
        assert scored.entropies is not None
        e = 1e-3 / (1.0 + scored.places.column.double())
        c = self.cross * scored.entropies.double() if self.cross else None
        means = scored.places.means(torch.zeros_like(e) if c is None else c)
        return ColumnWeights(means, c, e)


def setting(family: str) -> tuple[ProbeContext, CapturedModules, Columns]:
    model = add_lora(build_model(family, dtype=torch.float64)).double()
    context = ProbeContext.of(model, AdamState.from_optimizer(stepped_adamw(model), model))
    known = columns_of(EstimateOptions())
    columns = Columns((TokenEntropies(0.0), known.members[-1], Reward(), TokenEntropies(-70.0)))
    names = {id(p.tensor): p.name for p in context.registry.parameters}
    return context, CapturedModules(model, names), columns


def by_autograd(context: ProbeContext, microbatch: Microbatch, columns: Columns) -> list[list[dict[str, Tensor]]]:
    """For every column and unit the gradients of `Coefficients.losses`, by name."""
    registry = context.registry
    batch = pad_rows(microbatch.rollouts, microbatch.rows, context.device)
    forward = align_logprobs(model_logits(registry.module, batch), batch, want_entropies=True)
    coefficients = columns.weigh(forward.scored_tokens(microbatch.rollouts, microbatch.rows))
    unit = torch.tensor(microbatch.unit)
    return [
        [
            dict(
                zip(
                    registry.names,
                    torch.autograd.grad(
                        coefficients.losses(forward, column)[unit == number].sum(), registry.tensors, retain_graph=True
                    ),
                    strict=True,
                )
            )
            for number in sorted(set(microbatch.unit))
        ]
        for column in range(len(columns))
    ]


@pytest.mark.parametrize("way", ["in one row", "apart", "whole sequences", "logits"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_four_columns_of_two_units(family: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    context, modules, columns = setting(family)
    assert (columns.backwards, columns.most_at_once) == (3, 2)
    rollouts = pack(make_samples((3, 2, 4)))
    rows = torch.cat([rollouts.rows_of_prompt(prompt) for prompt in range(3)])
    # The first two prompts are one unit, the third is the second.
    unit = [0 if int(prompt) < 2 else 1 for prompt in rollouts.prompt_index[rows]]
    microbatch = Microbatch(rollouts, rows, unit, columns)
    monkeypatch.setattr(packed_way, "_MOST_COPIED", 0 if way == "apart" else 10**9)
    taken: Way = LogitsWay(context, modules) if way == "logits" else PackedWay(context, modules)
    if isinstance(taken, PackedWay):
        taken.shares = way != "whole sequences"
    parameters: dict[str, nn.Parameter] = dict(zip(context.registry.names, context.registry.tensors, strict=True))
    recorder = GradientRecorder(parameters, 2, len(columns))
    with context.probe_state(), computing_in_own_dtype(context.model):
        expected = by_autograd(context, microbatch, columns)
        with modules.recording(recorder):
            recorder.start(rows)
            taken.run(microbatch, recorder)
    assert not recorder.refused
    if way in ("in one row", "apart"):
        assert taken.prompt_forwards == (2 if way == "in one row" else 1)
    for column, by_unit in enumerate(expected):
        size = max(float(tensor.norm()) for gradients in by_unit for tensor in gradients.values())
        assert size > 0
        for number, gradients in enumerate(by_unit):
            for name, gradient in gradients.items():
                error = float((recorder.columns[column][name][number] - gradient).norm())
                assert error <= 1e-10 * max(float(gradient.norm()), 1e-3 * size), (column, number, name)
