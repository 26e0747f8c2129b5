"""Results at the edges: no signal at all, no error bar, options that do not apply."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from probe_models.cases import lora_case
from scipy.stats import t as student_t

from entropy_fast.errors import ConfigError
from entropy_fast.report.terminal import verdict


def with_advantages(rollouts, advantages):
    return dataclasses.replace(rollouts, advantages=advantages)


def test_an_update_of_nothing_is_said_to_be_nothing() -> None:
    case = lora_case()
    nothing = with_advantages(case.rollouts, torch.zeros(case.rollouts.n_sequences))
    result = case.probe().compute_delta_h1(nothing)
    assert result.delta_h1 == 0
    assert result.sign_established is False
    assert any("update gradient is exactly 0" in note for note in result.diagnostics.warnings)
    assert "exactly 0" in verdict(result)


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


def test_two_prompts_give_no_error_bar_and_no_sign() -> None:
    case = lora_case()
    first_two = torch.cat([case.rollouts.rows_of_prompt(n) for n in range(2)])
    result = case.probe().compute_delta_h1(case.rollouts.select_rows(first_two))
    assert (result.std_error, result.interval(), result.sign_established) == (None, None, None)
    assert "no standard error" in str(result)
    assert "too few prompts" in verdict(result)


def test_two_batches_refuse_blocks() -> None:
    case = lora_case()
    probe = case.probe(mode="blocks", blocks=2)
    with pytest.raises(ConfigError, match="blocks"):
        probe.run_mixed_probe(case.rollouts, with_advantages(case.rollouts, case.rollouts.advantages))
