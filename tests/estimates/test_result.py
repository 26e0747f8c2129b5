"""Results at the edges: no signal at all, no error bar, options that do not apply."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from probe_models.batches import make_rollouts
from probe_models.cases import lora_case
from probe_options import options_of
from scipy.stats import t as student_t

from entropy_fast import RunOptions, fast_delta_h1
from entropy_fast.checks.parameter_registry import ParameterRegistry
from entropy_fast.errors import ConfigError, ModelStateError, OptimizerStateError, RolloutsError
from entropy_fast.run_folder.result_files import result_document


def with_advantages(rollouts, advantages):
    return dataclasses.replace(rollouts, advantages=advantages)


def test_an_update_of_nothing_is_said_to_be_nothing() -> None:
    case = lora_case()
    nothing = with_advantages(case.rollouts, torch.zeros(case.rollouts.n_sequences))
    result = case.probe().compute_delta_h1(nothing)
    assert result.delta_h1 == 0
    assert result.sign_established is False
    assert any("this batch's own update is exactly 0" in note for note in result.diagnostics.warnings)
    assert "exactly 0" in result.verdict.sentence


def test_delta_h1_is_linear_in_the_advantages() -> None:
    case = lora_case()
    once = case.probe().compute_delta_h1(case.rollouts)
    twice = case.probe().compute_delta_h1(with_advantages(case.rollouts, 2 * case.rollouts.advantages))
    assert twice.delta_h1 == pytest.approx(2 * once.delta_h1, rel=1e-4)


def test_interval_is_students_t_on_the_number_of_units() -> None:
    case = lora_case()
    result = case.probe().compute_delta_h1(case.rollouts)
    units = len(result.per_prompt)
    low, high = result.interval(0.9)
    half = student_t.ppf(0.95, units - 1) * result.std_error
    assert (low, high) == pytest.approx((result.delta_h1 - half, result.delta_h1 + half))
    for level in (0, 1, 95):
        with pytest.raises(ConfigError, match="level"):
            result.interval(level)


def test_a_sign_is_established_where_the_interval_leaves_out_0_too() -> None:
    """With few units Student's t is wider than two standard errors."""
    case = lora_case()
    result = case.probe().compute_delta_h1(case.rollouts)
    degrees, error = result.forecast.degrees, result.std_error
    assert degrees is not None and degrees <= len(result.per_prompt) - 1
    t = float(student_t.ppf(0.975, degrees))
    assert t > 2.5
    for times, established in ((1.9, False), (2.1, False), (t - 0.01, False), (t + 0.01, True)):
        for sign in (1, -1):
            value = sign * times * error
            forecast = dataclasses.replace(result.forecast, value=value)
            moved = dataclasses.replace(result, delta_h1=value, forecast=forecast, split=None)
            assert moved.sign_established is established
            assert moved.verdict.total_established is established
            assert ("sign is established" in moved.verdict.sentence) is established
    known = dataclasses.replace(result.forecast, degrees=999.0)
    many = dataclasses.replace(result, delta_h1=1.99 * error, forecast=known)
    assert many.sign_established is False  # 1.96 standard errors are not two


def test_two_prompts_give_no_error_bar_and_no_sign() -> None:
    case = lora_case()
    first_two = torch.cat([case.rollouts.rows_of_prompt(n) for n in range(2)])
    result = case.probe().compute_delta_h1(case.rollouts.select_rows(first_two))
    # Numbers, which a logger expects; and null in a file.
    unknown = [result.std_error, *result.interval(), *(e.value for e in result.diagnostics.standard_errors)]
    assert all(isinstance(value, float) and math.isnan(value) for value in unknown)
    assert math.isnan(result.diagnostics.unbiased_variance)
    assert result.sign_established is None
    document = result_document(result)
    assert document["std_error"] is None and document["interval_95"] is None
    assert [error["value"] for error in document["diagnostics"]["standard_errors"]] == [None] * 4
    json.dumps(document, allow_nan=False)
    assert "no standard error" in str(result)
    assert "too few prompts" in result.verdict.sentence


@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
def test_two_batches_refuse_the_whole_kernel(engine: str) -> None:
    case = lora_case()
    with pytest.raises(ConfigError, match="does not keep K"):
        case.probe(engine=engine, full_kernel=True).run_mixed_probe(
            entropy_rollouts=make_rollouts((2, 2), seed=9), update_rollouts=case.rollouts
        )


def test_two_batches_refuse_blocks() -> None:
    case = lora_case()
    probe = case.probe(blocks=2)
    other = with_advantages(case.rollouts, case.rollouts.advantages)
    with pytest.raises(ConfigError, match="blocks"):
        probe.run_mixed_probe(entropy_rollouts=case.rollouts, update_rollouts=other)


@pytest.mark.parametrize("factor", [1e-3, 1e-7, 1e-12])
def test_small_advantages_do_not_underflow_in_float16(factor: float) -> None:
    case = lora_case()
    probe = case.probe(autocast_dtype=torch.float16)
    whole = probe.compute_delta_h1(case.rollouts)
    small = probe.compute_delta_h1(with_advantages(case.rollouts, factor * case.rollouts.advantages.double()))
    assert small.delta_h1 == pytest.approx(factor * whole.delta_h1, rel=0.02)


def test_scaling_by_a_power_of_two_changes_no_bit_in_float32() -> None:
    case = lora_case()
    plain = case.probe().compute_delta_h1(case.rollouts)
    scaled = case.probe().compute_delta_h1(with_advantages(case.rollouts, 2.0**-40 * case.rollouts.advantages.double()))
    assert scaled.delta_h1 == 2.0**-40 * plain.delta_h1


def test_the_same_sequences_in_both_batches_are_refused_however_they_are_wrapped() -> None:
    case = lora_case()
    probe = case.probe()
    copied = dataclasses.replace(case.rollouts)
    part = case.rollouts.select_rows(case.rollouts.rows_of_prompt(0))
    for entropy, update in ((copied, case.rollouts), (part, case.rollouts), (case.rollouts, part)):
        with pytest.raises(RolloutsError, match="every sequence of one batch"):
            probe.run_mixed_probe(entropy_rollouts=entropy, update_rollouts=update)


def test_randomness_that_survives_is_an_error() -> None:
    case = lora_case()
    probe = case.probe()

    def noise(module, inputs, output):
        output.logits = torch.nn.functional.dropout(output.logits, 0.3, training=True)
        return output

    handle = case.model.register_forward_hook(noise)
    with pytest.raises(ModelStateError, match="two forwards of sequence"):
        probe.compute_delta_h1(case.rollouts)
    handle.remove()
    probe.compute_delta_h1(case.rollouts)


def test_notes_on_precision_and_on_prompts_without_spread() -> None:
    case = lora_case()
    first = case.rollouts.prompt_index == 0
    partly = with_advantages(case.rollouts, case.rollouts.advantages * ~first)
    notes = " ".join(case.probe(autocast_dtype=torch.bfloat16).compute_delta_h1(partly).diagnostics.warnings)
    assert "computed in torch.bfloat16" in notes
    assert f"1 of {case.rollouts.n_prompts} prompts have advantage 0" in notes
    assert "computed in" not in " ".join(case.probe().compute_delta_h1(case.rollouts).diagnostics.warnings)


def test_arguments_of_the_wrong_kind_are_named() -> None:
    case = lora_case()
    call = (case.model, case.optimizer)
    with pytest.raises(RolloutsError, match=r"`rollouts` is a dict(.|\n)*from_dict"):
        fast_delta_h1(*call, {"sequences": []})
    with pytest.raises(RolloutsError, match="`entropy_rollouts` is a dict"):
        fast_delta_h1(*call, case.rollouts, entropy_rollouts={})
    with pytest.raises(ConfigError, match="a dict was passed where EstimateOptions is expected"):
        fast_delta_h1(*call, case.rollouts, estimate={"weighting": "sequence"})
    with pytest.raises(ConfigError, match="a dict was passed where RunOptions is expected"):
        fast_delta_h1(*call, case.rollouts, run={"engine": "two_pass"})
    with pytest.raises(ConfigError, match="`learning_rate` is '1e-3'"):
        fast_delta_h1(*call, case.rollouts, **options_of(learning_rate="1e-3"))
    with pytest.raises(OptimizerStateError, match="order of the arguments"):
        fast_delta_h1(case.optimizer, case.model, case.rollouts)
    with pytest.raises(ConfigError, match="`prompts_per_microbatch` is"):
        RunOptions(prompts_per_microbatch=1.5)
    with pytest.raises(ModelStateError, match="meta device"):
        ParameterRegistry.build(case.model.to("meta"), {})
