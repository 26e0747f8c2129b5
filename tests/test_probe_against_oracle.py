"""The probe against an independent derivation: every sequence alone, without padding, in fp64, by definitions and loops.

Legend: K_nm = X_n · Y_m, U the estimate per unit of learning rate, s_n = X_n · Ȳ. See tests/_support/probe_oracle.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from probe_options import options_of
from probe_oracle import models, oracle, u_statistics
from probe_oracle.batches import Shape, make_rollouts
from probe_oracle.oracle import relative_error
from torch import nn

from entropy_fast import DeltaH1Result, OfflineEntropyProbe, ProbeComponents, Rollouts, RunOptions
from entropy_fast.errors import GradientCoverageError
from entropy_fast.rollouts.units import prompt_units
from entropy_fast.step import AdamState

TOLERANCE = 1e-9
WEIGHTINGS = ("dr_grpo", "per_token", "sequence")
Setup = tuple[nn.Module, torch.optim.Optimizer]

pytestmark = pytest.mark.filterwarnings("ignore:.*without response tokens were left out")


def check(actual: Any, expected: Any, what: str, tolerance: float = TOLERANCE) -> None:
    error = relative_error(actual, expected)
    assert error < tolerance, f"{what}: relative error {error:.3g}"


def error_of(result: DeltaH1Result, name: str) -> float:
    return next(e.value for e in result.diagnostics.standard_errors if e.name == name)


@pytest.fixture(scope="module")
def setups() -> dict[str, Setup]:
    """Model and stepped optimizer by name; built once, and never changed by a probe."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    patch = pytest.MonkeyPatch()
    patch.setattr(Qwen2RMSNorm, "forward", models.double_precision_norm)
    built: dict[str, Setup] = {}
    for name, make in (("tiny", models.tiny_transformer), ("qwen2", models.qwen2), ("gpt2", models.gpt2)):
        model = make()
        built[name] = (model.train(), models.stepped_adam(model))
    yield built  # type: ignore[misc]
    patch.undo()


def probe(setup: Setup, **options: Any) -> OfflineEntropyProbe:
    return OfflineEntropyProbe(*setup, **options_of(engine="two_pass", **options))


def check_same_batch(
    result: DeltaH1Result, expected: oracle.PromptGradients, units: list[list[int]], lr: float
) -> None:
    """Everything a same-batch result says, for the given units."""
    whole = expected.kernel
    kernel = u_statistics.block_kernel(whole, units)
    equal = len({len(unit) for unit in units}) == 1
    m = len(units)
    check(result.x_dot_y, kernel.sum(), "X_sum · Y_sum")
    check(result.diagonal, kernel.diagonal(), "K_nn")
    check(result.row_sums, kernel.sum(1), "row sums")
    check(result.column_sums, kernel.sum(0), "column sums")
    if result.run_options.full_kernel:
        check(result.kernel, kernel, "K")
    else:
        assert result.kernel is None
    check(result.delta_h1, lr * u_statistics.u_value(whole, units), "δH₁ = lr · U")
    assert result.learning_rate == lr
    jackknife = lr * u_statistics.jackknife(whole, units) if m >= 3 else None
    assert math.isnan(result.std_error) == (jackknife is None)
    if jackknife is not None:
        check(error_of(result, "jackknife"), jackknife, "jackknife")
        given = lr * u_statistics.jackknife_of_rows(whole, units)
        check(result.std_error, given, "std_error")
        check(error_of(result, "x_row_means"), given, "x row means")
    per_unit = kernel / len(units[0]) ** 2  # for equal units: K between unit means
    if equal and m >= 3:
        check(error_of(result, "plug_in"), lr * u_statistics.plug_in(per_unit), "plug-in")
        check(error_of(result, "x_row_means"), lr * u_statistics.x_row_mean_error(per_unit), "x row means")
    else:
        assert math.isnan(error_of(result, "plug_in"))
        assert math.isnan(error_of(result, "x_row_means")) == (m < 3)
    if equal and m >= 4 and result.run_options.full_kernel:
        variance = lr**2 * u_statistics.unbiased_variance(per_unit)
        check(result.diagnostics.unbiased_variance, variance, "unbiased variance")
        if variance >= 0:
            check(error_of(result, "unbiased"), math.sqrt(variance), "unbiased error")
        else:
            assert math.isnan(error_of(result, "unbiased"))
    else:
        assert math.isnan(result.diagnostics.unbiased_variance)
    check_shares(result, expected, units, lr)


def check_shares(result: DeltaH1Result, expected: oracle.PromptGradients, units: list[list[int]], lr: float) -> None:
    """Whose δH₁ it is: K over pairs of prompts in different units, by row, by column, and their mean."""
    kernel = expected.kernel
    unit_of = {n: u for u, unit in enumerate(units) for n in unit}
    b = kernel.shape[0]
    pairs = [(n, m) for n in range(b) for m in range(b) if unit_of[n] != unit_of[m]]
    as_entropy, as_update = [0.0] * len(units), [0.0] * len(units)
    for n, m in pairs:
        as_entropy[unit_of[n]] += lr * float(kernel[n, m]) / len(pairs)
        as_update[unit_of[m]] += lr * float(kernel[n, m]) / len(pairs)
    assert [share.group_ids for share in result.per_prompt] == [tuple(expected.groups[n] for n in u) for u in units]
    assert all(share.role == "both" for share in result.per_prompt)
    check([share.as_entropy for share in result.per_prompt], as_entropy, "shares by entropy")
    check([share.as_update for share in result.per_prompt], as_update, "shares by update")
    halves = [(e + u) / 2 for e, u in zip(as_entropy, as_update, strict=True)]
    check([share.delta_h1 for share in result.per_prompt], halves, "shares")
    check(math.fsum(share.delta_h1 for share in result.per_prompt), result.delta_h1, "sum of the shares")


CASES = [
    ("tiny", "dr_grpo", 1, Shape(budget=3)),
    ("tiny", "dr_grpo", 2, Shape()),
    ("tiny", "per_token", 3, Shape(empty=2)),
    ("tiny", "sequence", 2, Shape(holes=True, longest_response=8)),
    ("tiny", "dr_grpo", 3, Shape(holes=True, empty=1, budget=2)),
    ("tiny", "per_token", 1, Shape(sizes=(2, 5, 2), interleaved=False)),
    ("tiny", "dr_grpo", 2, Shape(sizes=(0, 3, 2, 4, 2), empty=2, budget=1, interleaved=False)),  # a prompt drops out
    ("tiny", "dr_grpo", 3, Shape(sizes=(3, 2), empty=1)),  # too few prompts for an error
    ("qwen2", "dr_grpo", 2, Shape(budget=1, empty=1)),
    ("qwen2", "per_token", 3, Shape(sizes=(2, 3, 2, 2), holes=True)),
    ("gpt2", "dr_grpo", 3, Shape()),
    ("gpt2", "sequence", 2, Shape(sizes=(3, 2, 2, 4), holes=True, empty=1)),
]


@pytest.mark.parametrize(("name", "weighting", "size", "shape"), CASES)
def test_same_batch_estimate_and_the_whole_kernel(
    setups: dict[str, Setup], name: str, weighting: str, size: int, shape: Shape
) -> None:
    rollouts = make_rollouts(shape, models.VOCABULARY, seed=size)
    expected = oracle.prompt_gradients(*setups[name], rollouts, weighting)
    options: dict[str, Any] = {"weighting": weighting, "prompts_per_microbatch": size}
    units = u_statistics.singles(expected.x)
    for extra in ({"full_kernel": True}, {"accumulate_on": "cpu"}):
        result = probe(setups[name], **options, **extra).compute_delta_h1(rollouts)
        check_same_batch(result, expected, units, lr=1e-3)
    kept = rollouts.without_empty_responses()[0]
    rows = [row for row in range(rollouts.n_sequences) if row in expected.logprobs]
    assert kept.n_sequences == len(rows)
    for side, coefficients, name in (("entropy", expected.entropy, "c_i"), ("update", expected.update, "a_i")):
        table = result.sequences[side]
        check(table.sequence_logprobs, [expected.logprobs[row] for row in rows], "S_i")
        check(table.coefficients[side], [coefficients[row] for row in rows], name)


@pytest.mark.parametrize("name", ["tiny", "qwen2", "gpt2"])
@pytest.mark.parametrize("accumulate_on", ["device", "cpu"])
@pytest.mark.parametrize("y_pass", ["backward", "autograd_grad"])
def test_accumulated_sums_tensor_by_tensor(
    setups: dict[str, Setup], name: str, accumulate_on: str, y_pass: str
) -> None:
    model, optimizer = setups[name]
    rollouts = make_rollouts(Shape(budget=2), models.VOCABULARY, seed=4)
    expected = oracle.prompt_gradients(model, optimizer, rollouts, "dr_grpo")
    state = AdamState.from_optimizer(optimizer, model)
    run = RunOptions(prompts_per_microbatch=2, accumulate_on=accumulate_on, y_pass=y_pass)  # type: ignore[arg-type]
    components = ProbeComponents(model, state, **(options_of() | {"run": run}))
    x_sum, y_sum = components.accumulate_sum_X(rollouts), components.accumulate_sum_Y(rollouts)
    shapes = [p.shape for p in model.parameters()]
    for total, flat in ((x_sum, expected.x.sum(0)), (y_sum, expected.y.sum(0))):
        assert [t.shape for t in total.tensors] == shapes
        start = 0
        for tensor in total.tensors:
            part = flat[start : start + tensor.numel()]
            start += tensor.numel()
            # The biases of keys have a gradient of exactly 0 (softmax does not see them); roundings are all there is.
            scale = max(float(part.abs().max()), 1e-6 * float(flat.abs().max()))
            assert float((tensor.reshape(-1) - part).abs().max()) < TOLERANCE * scale
        check(oracle.flatten(total.tensors), flat, "the whole sum")


@pytest.mark.parametrize("blocks", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_blocks_of_equal_and_unequal_sizes(setups: dict[str, Setup], blocks: int, weighting: str) -> None:
    shape = Shape(sizes=(2, 3, 2, 2, 3, 2, 4, 2), budget=2)
    rollouts = make_rollouts(shape, models.VOCABULARY, seed=blocks)
    expected = oracle.prompt_gradients(*setups["tiny"], rollouts, weighting)
    sizes = [8 // blocks + (1 if block < 8 % blocks else 0) for block in range(blocks)]
    starts = [sum(sizes[:block]) for block in range(blocks)]
    units = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
    assert prompt_units(8, blocks) == units
    options: dict[str, Any] = {"blocks": blocks, "weighting": weighting, "prompts_per_microbatch": 2}
    result = probe(setups["tiny"], **options, full_kernel=True).compute_delta_h1(rollouts)
    check_same_batch(result, expected, units, lr=1e-3)


@pytest.mark.parametrize("name", ["tiny", "qwen2", "gpt2"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_two_batches_by_a_backward_per_prompt_and_by_the_alpha_trick(
    setups: dict[str, Setup], name: str, size: int
) -> None:
    weighting = WEIGHTINGS[size - 1]
    entropy = make_rollouts(Shape(empty=1, budget=size - 1), models.VOCABULARY, seed=10 + size)
    update = make_rollouts(Shape(sizes=(2, 3, 4, 2), budget=1), models.VOCABULARY, seed=20 + size)
    of_entropy = oracle.prompt_gradients(*setups[name], entropy, weighting)
    of_update = oracle.prompt_gradients(*setups[name], update, weighting)
    kernel = oracle.cross_kernel(of_entropy.x, of_update.y)
    b_entropy, b_update = kernel.shape
    s = [math.fsum(kernel[n].tolist()) / b_update for n in range(b_entropy)]
    t = [math.fsum(kernel[:, m].tolist()) / b_entropy for m in range(b_update)]
    lr = 1e-3
    v_x, v_y = u_statistics.standard_error(s) ** 2, u_statistics.standard_error(t) ** 2
    for route in ("per_prompt", "alpha"):
        options: dict[str, Any] = {"weighting": weighting, "prompts_per_microbatch": size}
        result = probe(setups[name], **options, conditional_variance=route).run_mixed_probe(
            entropy_rollouts=entropy, update_rollouts=update
        )
        check(result.delta_h1, lr * math.fsum(s) / b_entropy, f"{route}: δH₁ = lr · X̄ · Ȳ")
        check(result.x_dot_y, kernel.sum(), f"{route}: X_sum · Y_sum")
        check(result.row_sums, [b_update * value for value in s], f"{route}: s_n")
        check(result.column_sums, [b_entropy * value for value in t], f"{route}: t_m")
        check(result.std_error, lr * math.sqrt(v_x), f"{route}: std_error")
        check(error_of(result, "conditional_on_update"), lr * math.sqrt(v_x), f"{route}: conditional error")
        check(error_of(result, "v_x_plus_v_y"), lr * math.sqrt(v_x + v_y), f"{route}: V_X + V_Y")
        assert result.diagonal is None
        of_role = {r: [p for p in result.per_prompt if p.role == r] for r in ("entropy", "update")}
        assert [p.group_ids for p in of_role["entropy"]] == [(g,) for g in of_entropy.groups]
        assert [p.group_ids for p in of_role["update"]] == [(g,) for g in of_update.groups]
        check([p.delta_h1 for p in of_role["entropy"]], [lr * value / b_entropy for value in s], "shares of E")
        check([p.delta_h1 for p in of_role["update"]], [lr * value / b_update for value in t], "shares of U")


def test_alpha_projections_per_prompt_of_a_direction_of_ones_own(setups: dict[str, Setup]) -> None:
    model, optimizer = setups["tiny"]
    rollouts = make_rollouts(Shape(), models.VOCABULARY, seed=5)
    expected = oracle.prompt_gradients(model, optimizer, rollouts, "dr_grpo")
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in model.parameters()]
    components = ProbeComponents(
        model, AdamState.from_optimizer(optimizer, model), **options_of(prompts_per_microbatch=2)
    )
    found = components.compute_conditional_variance_over_E_alpha(rollouts, direction)
    flat = oracle.flatten(direction)
    check(found, [float(x @ flat) for x in expected.x], "s_n")


def test_the_two_routes_of_the_update_pass_agree(setups: dict[str, Setup]) -> None:
    rollouts = make_rollouts(Shape(budget=2), models.VOCABULARY, seed=6)
    by_route = [
        probe(setups["gpt2"], y_pass=y_pass).compute_delta_h1(rollouts) for y_pass in ("backward", "autograd_grad")
    ]
    check(by_route[1].delta_h1, by_route[0].delta_h1, "δH₁", 1e-11)
    check(by_route[1].column_sums, by_route[0].column_sums, "column sums", 1e-11)


def test_learning_rate_given_or_scheduled_scales_the_estimate_and_nothing_else(setups: dict[str, Setup]) -> None:
    rollouts = make_rollouts(Shape(budget=2), models.VOCABULARY, seed=7)
    model, optimizer = setups["tiny"]
    expected = oracle.prompt_gradients(model, optimizer, rollouts, "dr_grpo")
    result = OfflineEntropyProbe(
        model, optimizer, **options_of(learning_rate=0.25, engine="two_pass")
    ).compute_delta_h1(rollouts)
    check_same_batch(result, expected, u_statistics.singles(expected.x), lr=0.25)


def test_what_has_no_second_moment_is_left_out_of_y_if_that_is_allowed_and_an_error_if_not() -> None:
    model = models.tiny_transformer(seed=3)
    kept = [p for name, p in model.named_parameters() if name != "head.weight"]
    optimizer = torch.optim.AdamW(kept, lr=1e-3)
    for parameter in kept[1:]:  # the embedding of tokens is never stepped
        parameter.grad = torch.randn(parameter.shape, dtype=torch.float64)
    model.positions.weight.grad[4] = 0  # type: ignore[index]
    optimizer.step()
    rollouts = make_rollouts(Shape(budget=1), models.VOCABULARY, seed=9)
    expected = oracle.prompt_gradients(model, optimizer, rollouts, "dr_grpo")
    result = probe((model, optimizer), max_excluded_share=1.0).compute_delta_h1(rollouts)
    check_same_batch(result, expected, u_statistics.singles(expected.x), lr=1e-3)
    raw = torch.zeros_like(expected.x[0])  # Σ_n g_n, from a_i and the gradients of the sequences alone
    for sequence in oracle.sequences_of(model, rollouts):
        raw += expected.update[sequence.row] * sequence.gradient
    lost = raw[oracle.preconditioner(model, optimizer) == 0]
    excluded = result.diagnostics.excluded
    check(excluded.share, float(lost @ lost) / float(raw @ raw), "share of ‖g‖²")
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert excluded.not_in_optimizer == sizes["head.weight"]
    assert 0 < excluded.without_state <= sizes["tokens.weight"]
    assert excluded.zero_moment == 8  # one position
    with pytest.raises(GradientCoverageError, match=f"{sizes['head.weight']} not in the optimizer"):
        probe((model, optimizer)).compute_delta_h1(rollouts)


shapes = st.builds(
    Shape,
    sizes=st.lists(st.integers(2, 4), min_size=2, max_size=5).map(tuple),
    longest_prompt=st.integers(1, 4),
    longest_response=st.integers(1, 5),
    interleaved=st.booleans(),
    holes=st.booleans(),
    empty=st.integers(0, 1),
    budget=st.integers(0, 3),
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=shapes, seed=st.integers(0, 99), weighting=st.sampled_from(WEIGHTINGS), size=st.integers(1, 3))
def test_batches_of_any_shape(setups: dict[str, Setup], shape: Shape, seed: int, weighting: str, size: int) -> None:
    rollouts = make_rollouts(shape, models.VOCABULARY, seed)
    expected = oracle.prompt_gradients(*setups["tiny"], rollouts, weighting)
    options: dict[str, Any] = {"weighting": weighting, "prompts_per_microbatch": size, "full_kernel": True}
    result = probe(setups["tiny"], **options).compute_delta_h1(rollouts)
    check_same_batch(result, expected, u_statistics.singles(expected.x), lr=1e-3)


def _repadded(rollouts: Rollouts) -> Rollouts:
    """The same sequences, padded on the left and with other junk."""
    fields: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "loss_mask": []}
    width = rollouts.input_ids.shape[1]
    for row in range(rollouts.n_sequences):
        real = rollouts.attention_mask[row] == 1
        missing = width - int(real.sum())
        for name, junk in (("input_ids", row % 7), ("attention_mask", 0), ("loss_mask", 0)):
            fields[name].append([junk] * missing + getattr(rollouts, name)[row][real].tolist())
    return dataclasses.replace(rollouts, **{name: torch.tensor(rows) for name, rows in fields.items()})


@pytest.mark.parametrize("change", [_repadded, lambda r: r.select_rows(torch.arange(r.n_sequences).flip(0))])
def test_padding_and_the_order_of_rows_do_not_matter(
    setups: dict[str, Setup], change: Callable[[Rollouts], Rollouts]
) -> None:
    rollouts = make_rollouts(Shape(holes=True), models.VOCABULARY, seed=8)
    first = probe(setups["gpt2"]).compute_delta_h1(rollouts)
    second = probe(setups["gpt2"]).compute_delta_h1(change(rollouts))
    check(second.delta_h1, first.delta_h1, "δH₁")
    shares = [{p.group_ids: p.delta_h1 for p in result.per_prompt} for result in (first, second)]
    assert shares[0].keys() == shares[1].keys()
    check([shares[1][key] for key in shares[0]], list(shares[0].values()), "shares")
