"""An engine from outside the package: a class with two methods and its registration, in less than 40 lines."""

from __future__ import annotations

import inspect

import pytest
import torch
from engine_sums import relative
from exactness import batch_of
from probe_models.architectures import add_lora, build_model, stepped_adamw
from probe_options import options_of

from entropy_fast import RunOptions, fast_delta_h1
from entropy_fast.columns import SequenceTable, Side
from entropy_fast.context import ProbeContext
from entropy_fast.engines import EngineKind, engine_kind, engine_kinds, register_engine, registry
from entropy_fast.engines.gradient_sum import GradientSum, inner_product
from entropy_fast.engines.sums import finished
from entropy_fast.errors import ConfigError
from entropy_fast.estimates.kernel_sums import KernelSums
from entropy_fast.estimates.measured import Measured, Plan
from entropy_fast.rollouts import Rollouts
from entropy_fast.ways.teacher_forcing import align_logprobs, model_logits, pad_rows


class EveryPrompt:
    def __init__(self, context: ProbeContext) -> None:
        self.context = context

    def same_batch(self, rollouts: Rollouts) -> Measured:
        return self.two_batch(rollouts, rollouts)

    def two_batch(self, entropy: Rollouts, update: Rollouts) -> Measured:
        x_total, x, x_table = self.gradients(entropy, Side.FUNCTIONAL)
        g_total, g, g_table = self.gradients(update, Side.UPDATE)
        sums = finished(self.context, x_total, g_total, entropy, update)
        y = [self.context.step.apply_preconditioner(own) for own in g]
        kernel = torch.tensor([[inner_product(a, b) for b in y] for a in x], dtype=torch.float64)
        found = KernelSums(float(kernel.sum()), kernel.sum(1), kernel.sum(0))
        if entropy is update:
            sizes = torch.ones(len(x), dtype=torch.int64)
            found = KernelSums(found.x_dot_y, found.row_sums, kernel.sum(0), kernel.diagonal(), sizes, kernel)
        tables = {"entropy": x_table, "update": g_table}
        plan = Plan("every prompt by itself")
        return Measured(found, sums.coverage, tables, sums.excluded, sums.leading_products, plan)

    def gradients(self, rollouts: Rollouts, side: Side) -> tuple[GradientSum, list[tuple], SequenceTable]:
        context, columns = self.context, self.context.columns.of_side(side)
        table = SequenceTable.of(rollouts.n_sequences, columns, ratios=False)
        total, units = GradientSum.zeros(context.registry.tensors, None), []
        with context.probe_state():
            for rows in map(rollouts.rows_of_prompt, range(rollouts.n_prompts)):
                batch = pad_rows(rollouts, rows, context.device)
                forward = align_logprobs(model_logits(context.registry.module, batch), batch)
                scored = forward.scored_tokens(rollouts, rows)
                coefficients = columns.weigh(scored)
                table.put(rows, scored.sequence_logprobs, coefficients)
                units.append(torch.autograd.grad(coefficients.losses(forward, 0).sum(), context.registry.tensors))
                total.add(units[-1])
        return total, units, table


KIND = EngineKind("every_prompt", EveryPrompt, takes=frozenset())


@pytest.fixture(autouse=True)
def unregistered_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))


def test_its_result_is_that_of_the_others() -> None:
    assert len(inspect.getsource(EveryPrompt).splitlines()) + 1 < 40
    assert register_engine(KIND) is KIND
    assert engine_kinds()[-1] is KIND
    model = add_lora(build_model("gpt2", dtype=torch.float64)).double()
    optimizer = stepped_adamw(model)
    rollouts, other = batch_of("uneven groups"), batch_of("left-padded", seed=8)
    for batches in ({}, {"entropy_rollouts": other}):
        found, expected = (
            fast_delta_h1(model, optimizer, rollouts, **options_of(engine=engine), **batches)
            for engine in ("every_prompt", "two_pass")
        )
        assert (found.engine, str(found.plan)) == ("every_prompt", "every prompt by itself.")
        for name in ("row_sums", "column_sums") if batches else ("row_sums", "column_sums", "diagonal"):
            assert relative(getattr(found, name), getattr(expected, name)) <= 1e-10, name
        assert abs(found.delta_h1 - expected.delta_h1) <= 1e-10 * expected.std_error
        assert found.std_error == pytest.approx(expected.std_error, rel=1e-9)


def test_it_is_known_by_name_and_asked_last() -> None:
    with pytest.raises(ConfigError, match="'every_prompt'") as caught:
        engine_kind(RunOptions(engine="every_prompt"))
    assert "'two_pass'" in caught.value.fix
    register_engine(KIND)
    assert engine_kind(RunOptions(engine="every_prompt")) is KIND
    assert engine_kind(RunOptions()).name == "one_pass"
    with pytest.raises(ConfigError, match=r"`y_pass`.*'every_prompt' has no use for it"):
        engine_kind(RunOptions(engine="every_prompt", y_pass="autograd_grad"))
