"""c_i and a_i against loops over the definition.

Legend: S_i sequence log-prob, w_i length weight, G responses of the prompt, c_i = -(w_i S_i - mean of w_j S_j over j ≠ i)/G,
a_i = A_i w_i / G with A_i the advantage.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entropy_fast import EstimateOptions
from entropy_fast.columns import Coefficients, ScoredTokens, SequenceTable, columns_of
from entropy_fast.columns.lengths import check_group_sizes, length_weights
from entropy_fast.errors import GraphDetachedError, RolloutsError
from entropy_fast.rollouts import Rollouts
from entropy_fast.rollouts.units import iter_microbatches

WEIGHTINGS = ("dr_grpo", "per_token", "sequence")


def rollouts_of(groups: list[int], lengths: list[int], advantages: list[float], **fields: Any) -> Rollouts:
    width = 1 + max(lengths)
    columns = torch.arange(width)
    attention = (columns < 1 + torch.tensor(lengths)[:, None]).long()
    return Rollouts(
        input_ids=torch.tensor(groups)[:, None].expand(-1, width),
        attention_mask=attention,
        loss_mask=attention * (columns >= 1),
        group_ids=torch.tensor(groups),
        advantages=torch.tensor(advantages, dtype=torch.float64),
        **fields,
    )


def weighed(rollouts: Rollouts, rows: Tensor, logprobs: Tensor, weighting: Any) -> Coefficients:
    """Of sequence log-probs, which tokens share equally."""
    lengths = rollouts.response_lengths[rows]
    by_token = torch.repeat_interleave(logprobs / lengths, lengths)
    return columns_of(EstimateOptions(weighting=weighting, entropy_estimator="score_function")).weigh(
        ScoredTokens(rollouts, rows, logprobs, by_token, None)
    )


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], list[int], list[float], list[float]]:
    """Groups in any order (2 to 5 rows each), lengths, advantages and log-probs."""
    sizes = draw(st.lists(st.integers(2, 5), min_size=1, max_size=4))
    groups = draw(st.permutations([group for group, size in enumerate(sizes) for _ in range(size)]))
    n = len(groups)
    # Rollouts take no advantage that vanishes in fp32.
    numbers = st.floats(-50, 50).map(lambda number: number if abs(number) > 1e-30 else 0.0)
    lengths = draw(st.lists(st.integers(1, 6), min_size=n, max_size=n))
    advantages, logprobs = (draw(st.lists(numbers, min_size=n, max_size=n)) for _ in range(2))
    return groups, lengths, advantages, logprobs


def by_definition(
    batch: tuple[list[int], list[int], list[float], list[float]], weighting: str, budgets: dict[int, int]
) -> tuple[list[float], list[float]]:
    groups, lengths, advantages, logprobs = batch
    c, a = [], []
    for i, group in enumerate(groups):
        members = [j for j in range(len(groups)) if groups[j] == group]
        budget = budgets.get(group, max(lengths[j] for j in members))
        weight = [{"dr_grpo": 1 / budget, "per_token": 1 / length, "sequence": 1.0}[weighting] for length in lengths]
        others = [weight[j] * logprobs[j] for j in members if j != i]
        c.append(-(weight[i] * logprobs[i] - sum(others) / len(others)) / len(members))
        a.append(advantages[i] * weight[i] / len(members))
    return c, a


@settings(max_examples=80, deadline=None)
@given(batch=batches(), weighting=st.sampled_from(WEIGHTINGS), given_budget=st.booleans(), size=st.integers(1, 4))
def test_against_loops_for_ragged_interleaved_groups_in_microbatches(
    batch: tuple[list[int], list[int], list[float], list[float]], weighting: Any, given_budget: bool, size: int
) -> None:
    groups, lengths, advantages, logprobs = batch
    order = list(dict.fromkeys(groups))
    budgets = {group: 7 + group for group in order} if given_budget else {}
    fields = {"max_lengths": torch.tensor([budgets[g] for g in order])} if given_budget else {}
    rollouts = rollouts_of(groups, lengths, advantages, **fields)
    c, a = by_definition(batch, weighting, budgets)
    seen = []
    for rows in iter_microbatches(rollouts, list(range(rollouts.n_prompts)), size):
        found = weighed(rollouts, rows, torch.tensor(logprobs, dtype=torch.float64)[rows], weighting).by_sequence
        assert found.dtype == torch.float64
        for row, entropy, update in zip(rows.tolist(), *found.tolist(), strict=True):
            assert math.isclose(entropy, c[row], rel_tol=1e-9, abs_tol=1e-12)
            assert math.isclose(update, a[row], rel_tol=1e-12, abs_tol=1e-300)
            seen.append(row)
    assert sorted(seen) == list(range(len(groups)))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_entropy_coefficients_sum_to_zero_within_a_prompt_and_ignore_a_common_shift_of_equal_weights(
    weighting: Any,
) -> None:
    rollouts = rollouts_of([3, 1, 3, 1, 1], [4, 2, 1, 2, 6], [1.0] * 5)
    rows = torch.arange(5)
    logprobs = torch.tensor([-3.0, -1.0, -7.0, -2.0, -5.0], dtype=torch.float64)
    found = weighed(rollouts, rows, logprobs, weighting).by_sequence[0]
    for group in (3, 1):
        assert abs(float(found[rollouts.group_ids == group].sum())) < 1e-14
    if weighting != "per_token":
        shifted = weighed(rollouts, rows, logprobs + 11, weighting).by_sequence[0]
        torch.testing.assert_close(shifted, found, rtol=1e-12, atol=1e-12)


def test_numbers_worked_out_by_hand() -> None:
    rollouts = rollouts_of([5, 9, 5, 9, 5], [1, 2, 4, 2, 2], [1.0, -1.0, 2.0, 3.0, 0.5])
    logprobs = torch.tensor([-2.0, -4.0, -8.0, -6.0, -5.0], dtype=torch.float64)
    entropy, update = weighed(rollouts, torch.arange(5), logprobs, "dr_grpo").by_sequence
    # Group 5: L_max 4, w S = -0.5, -2, -1.25, G = 3; group 9: L_max 2, w S = -2, -3, G = 2.
    c_five = [-(-0.5 + 1.625) / 3, -(-2 + 0.875) / 3, -(-1.25 + 1.25) / 3]
    assert entropy.tolist() == pytest.approx([c_five[0], -0.5, c_five[1], 0.5, c_five[2]], abs=1e-15)
    assert update.tolist() == pytest.approx([1 / 12, -0.25, 2 / 12, 0.75, 0.5 / 12])


def test_coefficients_carry_no_graph() -> None:
    rollouts = rollouts_of([0, 0, 0], [1, 2, 3], [1.0, 2.0, 3.0])
    logprobs = torch.tensor([-1.0, -2.0, -4.0], requires_grad=True)
    found = weighed(rollouts, torch.arange(3), logprobs, "sequence")
    for values in (found.by_sequence, *(column.by_sequence for column in found.columns)):
        assert not values.requires_grad
        assert values.grad_fn is None
    # So the gradient of Σ c_i S_i with respect to S is c itself, without a term for the baseline.
    (gradient,) = torch.autograd.grad((found.by_sequence[0].float() * logprobs).sum(), logprobs)
    torch.testing.assert_close(gradient, found.by_sequence[0].float())


def test_coefficients_are_formed_in_double_from_low_precision_log_probs() -> None:
    rollouts = rollouts_of([0, 0], [3, 3], [1.0, 1.0])
    logprobs = torch.tensor([-1024.0, -1020.0], dtype=torch.bfloat16)
    found = weighed(rollouts, torch.arange(2), logprobs, "dr_grpo").by_sequence[0]
    assert found.tolist() == pytest.approx([2 / 3, -2 / 3], rel=1e-12)


def test_length_weights() -> None:
    rollouts = rollouts_of([0, 1, 0, 1], [1, 2, 4, 5], [0.0] * 4)
    weights: dict[str, Tensor] = {name: length_weights(rollouts, name) for name in WEIGHTINGS}  # type: ignore[arg-type]
    assert weights["dr_grpo"].tolist() == pytest.approx([1 / 4, 1 / 5, 1 / 4, 1 / 5])
    assert weights["per_token"].tolist() == pytest.approx([1, 1 / 2, 1 / 4, 1 / 5])
    assert weights["sequence"].tolist() == [1.0] * 4
    given = rollouts_of([0, 1, 0, 1], [1, 2, 4, 5], [0.0] * 4, max_lengths=torch.tensor([8, 16]))
    assert length_weights(given, "dr_grpo").tolist() == pytest.approx([1 / 8, 1 / 16, 1 / 8, 1 / 16])
    assert all(weight.dtype == torch.float64 for weight in weights.values())


def test_a_single_response_is_refused_and_its_group_named() -> None:
    check_group_sizes(rollouts_of([4, 4, 8, 8], [1] * 4, [0.0] * 4))
    with pytest.raises(RolloutsError, match=r"groups \[8, 6\] have 1 response .*at least 2"):
        check_group_sizes(rollouts_of([4, 8, 4, 6], [1] * 4, [0.0] * 4))


def test_a_group_whose_second_response_is_empty_is_refused_once_that_one_is_left_out() -> None:
    rollouts = rollouts_of([4, 8, 4, 8], [1, 2, 3, 0], [0.0] * 4)
    check_group_sizes(rollouts)
    kept, report = rollouts.without_empty_responses()
    assert report.sequences == (3,)
    with pytest.raises(RolloutsError, match=r"groups \[8\] have 1 response"):
        check_group_sizes(kept)


def test_the_table_of_sequences_knows_what_has_been_put() -> None:
    rollouts = rollouts_of([0, 1, 0, 1], [1, 2, 4, 5], [1.0, 2.0, 3.0, 4.0])
    table = SequenceTable.of(4, columns_of(EstimateOptions(entropy_estimator="score_function")), ratios=False)
    assert table.ratios is None
    rows = rollouts.rows_of_prompt(1)
    logprobs = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    found = weighed(rollouts, rows, logprobs, "sequence")
    table.put(rows, logprobs, found)
    assert table.sequence_logprobs.isnan().tolist() == [True, False, True, False]
    assert table.sequence_logprobs[rows].tolist() == [-1.0, -2.0]
    assert table.entropy_sums.isnan().all()
    assert list(table.coefficients) == ["entropy", "update"]
    assert table.coefficients["entropy"][rows].tolist() == found.by_sequence[0].tolist()
    assert table.coefficients["update"][rows].tolist() == [1.0, 2.0]


def test_log_probs_that_are_not_finite_name_their_token() -> None:
    rollouts, rows = rollouts_of([0, 1, 0, 1], [1, 2, 4, 5], [0.0] * 4), torch.tensor([1, 3])
    logprobs = torch.full((7,), -1.0)
    logprobs[5] = -torch.inf
    with pytest.raises(RolloutsError, match=r"response token 3 of row 3 .*, id 1, has log-prob -inf"):
        ScoredTokens(rollouts, rows, torch.zeros(2), logprobs, None)
    logprobs[0] = torch.nan
    with pytest.raises(GraphDetachedError, match="1 of 7 response-token log-probs are NaN"):
        ScoredTokens(rollouts, rows, torch.zeros(2), logprobs, None)
