"""Rollouts in memory: what is derived from them, and that equal content gives equal rollouts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rollouts_tensors import tensors

from entropy_fast.rollouts.container import EmptyResponseReport, Rollouts

VOCABULARY = 50


def build(groups: list[int], lengths: list[int], **fields: Any) -> Rollouts:
    """Rollouts with a two-token prompt made of the group id, and the given response lengths; right padding."""
    width = 2 + max(lengths)
    columns = torch.arange(width)
    ends = 2 + torch.tensor(lengths)[:, None]
    ids = (torch.tensor(groups)[:, None].abs() + columns) % VOCABULARY
    attention_mask = (columns < ends).long()
    loss_mask = attention_mask * (columns >= 2)
    fields = {"advantages": torch.arange(float(len(groups)))} | fields
    return Rollouts(ids, attention_mask, loss_mask, torch.tensor(groups), **fields)


ragged = st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 5)), min_size=1, max_size=12)


@settings(deadline=None)
@given(rows=ragged)
def test_prompts_are_numbered_by_first_appearance_however_groups_interleave(rows: list[tuple[int, int]]) -> None:
    groups, lengths = [group for group, _ in rows], [length for _, length in rows]
    rollouts = build(groups, lengths)
    order: list[int] = []
    for group in groups:
        if group not in order:
            order.append(group)
    assert rollouts.group_order == tuple(order)
    assert (rollouts.n_sequences, rollouts.n_prompts) == (len(rows), len(order))
    assert rollouts.prompt_index.tolist() == [order.index(group) for group in groups]
    assert rollouts.response_lengths.tolist() == lengths
    for index, group in enumerate(order):
        members = [row for row, other in enumerate(groups) if other == group]
        assert rollouts.rows_of_prompt(index).tolist() == members
        assert rollouts.length_budgets[index] == max(lengths[row] for row in members)
    assert not rollouts.max_lengths_given


@settings(deadline=None)
@given(
    rows=ragged,
    rewards=st.lists(st.floats(-1e3, 1e3).filter(lambda r: r == 0 or abs(r) > 1e-30), min_size=12, max_size=12),
    double=st.booleans(),
)
def test_advantages_from_rewards_are_centred_within_each_group(
    rows: list[tuple[int, int]], rewards: list[float], double: bool
) -> None:
    groups = [group for group, _ in rows]
    dtype = torch.float64 if double else torch.float32
    given_rewards = torch.tensor(rewards[: len(rows)], dtype=dtype)
    rollouts = build(groups, [length for _, length in rows], advantages=None, rewards=given_rewards)
    expected = []
    for row, group in enumerate(groups):
        members = [float(given_rewards[other]) for other, name in enumerate(groups) if name == group]
        expected.append(float(given_rewards[row]) - sum(members) / len(members))
    assert isinstance(rollouts.advantages, torch.Tensor)
    assert rollouts.advantages.dtype == dtype
    tolerance = 1e-9 if double else 1e-3
    torch.testing.assert_close(rollouts.advantages, torch.tensor(expected, dtype=dtype), atol=tolerance, rtol=0)
    assert torch.equal(rollouts.rewards, given_rewards)  # type: ignore[arg-type]


def test_given_advantages_are_kept_beside_rewards() -> None:
    rollouts = build([0, 0], [1, 2], advantages=torch.tensor([5.0, 7.0]), rewards=torch.tensor([1.0, 0.0]))
    assert rollouts.advantages.tolist() == [5.0, 7.0]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (torch.tensor([1.0, 2.0], dtype=torch.float64), torch.float64),
        (torch.tensor([1.0, 2.0], dtype=torch.bfloat16), torch.float32),
        (torch.tensor([1, 2]), torch.float32),
        ([1.0, 2.0], torch.float32),
    ],
)
def test_float64_advantages_stay_float64_and_the_rest_become_float32(value: Any, dtype: torch.dtype) -> None:
    advantages = build([0, 0], [1, 1], advantages=value).advantages
    assert isinstance(advantages, torch.Tensor)
    assert advantages.dtype == dtype
    assert advantages.tolist() == [1.0, 2.0]


@settings(deadline=None)
@given(rows=ragged, picks=st.lists(st.integers(0, 11), min_size=1, max_size=8), as_mask=st.booleans())
def test_selected_rows_carry_everything_of_theirs(rows: list[tuple[int, int]], picks: list[int], as_mask: bool) -> None:
    n = len(rows)
    groups, lengths = [group for group, _ in rows], [length for _, length in rows]
    order = list(dict.fromkeys(groups))
    budgets = {group: 6 + index for index, group in enumerate(order)}
    whole = build(
        groups, lengths, rewards=torch.arange(float(n)) * 10, max_lengths=[budgets[group] for group in order],
        prompts=[f"prompt {group}" for group in order], responses=[f"response {row}" for row in range(n)], top_p=0.5,
        top_k=20, min_p=0.125,
        old_logprobs=-torch.rand(n, 2 + max(lengths)),
    )  # fmt: skip
    chosen = [pick % n for pick in picks]
    index = torch.tensor(chosen)
    if as_mask:
        chosen = sorted(set(chosen))
        index = torch.zeros(n, dtype=torch.bool)
        index[chosen] = True
    part = whole.select_rows(index)
    kept = list(dict.fromkeys(groups[row] for row in chosen))
    assert part.group_order == tuple(kept)
    for field in ("input_ids", "attention_mask", "loss_mask", "group_ids", "advantages", "rewards", "old_logprobs"):
        assert torch.equal(getattr(part, field), getattr(whole, field)[chosen]), field
    assert part.length_budgets.tolist() == [budgets[group] for group in kept]
    assert part.max_lengths_given
    assert part.prompts == tuple(f"prompt {group}" for group in kept)
    assert part.responses == tuple(f"response {row}" for row in chosen)
    assert (part.top_p, part.top_k, part.min_p) == (0.5, 20, 0.125)


def test_old_log_probs_are_read_at_response_tokens_alone() -> None:
    """Samplers leave anything over prompt and padding."""
    nan = float("nan")
    rollouts = build(
        [0, 0, 1], [2, 1, 3], old_logprobs=[[nan, nan, -1, -2, nan], [nan, 9, -3, nan, nan], [9, 9, -4, -5, -6]]
    )
    assert rollouts.old_logprobs.dtype == torch.float32
    assert rollouts.of_response_tokens("old_logprobs", torch.tensor([2, 0])).tolist() == [-4, -5, -6, -1, -2]
    assert rollouts.old_logprobs.sum(1).tolist() == [-3, -3, -15]


def test_a_budget_that_was_not_given_is_not_invented_by_selecting() -> None:
    part = build([0, 0, 1], [5, 2, 3]).select_rows(torch.tensor([1, 2]))
    assert not part.max_lengths_given
    assert part.length_budgets.tolist() == [2, 3]


@settings(deadline=None)
@given(rows=ragged.filter(lambda rows: any(length for _, length in rows)))
def test_empty_responses_are_left_out_and_reported(rows: list[tuple[int, int]]) -> None:
    groups, lengths = [group for group, _ in rows], [length for _, length in rows]
    whole = build(groups, lengths, advantages=None, rewards=torch.arange(float(len(rows))))
    kept, report = whole.without_empty_responses()
    full = [row for row, length in enumerate(lengths) if length]
    assert report.sequences == tuple(row for row, length in enumerate(lengths) if not length)
    assert set(report.groups) == set(groups) - {groups[row] for row in full}
    assert len(set(report.groups)) == len(report.groups)
    assert torch.equal(kept.input_ids, whole.input_ids[full])
    assert torch.equal(kept.advantages, whole.advantages[full])  # type: ignore[index, arg-type]
    if not report.sequences:
        assert kept is whole
        assert report == EmptyResponseReport((), ())


def test_without_any_response_token_nothing_can_be_left() -> None:
    with pytest.raises(ValueError, match=r"all 2 sequences have an empty response region.*[\s\S]*set loss_mask to 1"):
        build([0, 1], [0, 0]).without_empty_responses()


@pytest.mark.parametrize("given_budget", [7, torch.tensor([7, 7]), [7, 7]])
def test_one_budget_stands_for_every_prompt(given_budget: Any) -> None:
    rollouts = build([4, 4, 2], [1, 2, 7], max_lengths=given_budget)
    assert rollouts.max_lengths_given
    assert rollouts.length_budgets.tolist() == [7, 7]


def test_budgets_follow_the_order_of_first_appearance() -> None:
    rollouts = build([9, 1, 9], [3, 5, 4], max_lengths=torch.tensor([4, 5]))
    assert rollouts.group_order == (9, 1)
    assert rollouts.length_budgets.tolist() == [4, 5]


def test_inference_mode_tensors_are_cloned_on_the_way_in() -> None:
    with torch.inference_mode():
        ids = torch.tensor([[1, 2, 3]])
        fields: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "loss_mask": torch.tensor([[0, 1, 1]])}
        groups, rewards = torch.tensor([0]), torch.tensor([1.0])
    rollouts = Rollouts(ids, **fields, group_ids=groups, rewards=rewards, max_lengths=torch.tensor([2]))
    assert ids.is_inference()
    assert [name for name, value in tensors(rollouts).items() if value.is_inference()] == []
    assert rollouts.for_autograd() is rollouts


def test_rollouts_built_in_inference_mode_can_be_made_fit_for_autograd() -> None:
    with torch.inference_mode():
        inside = build([0, 0], [1, 3], advantages=None, rewards=torch.tensor([1.0, 0.0]))
        assert inside.input_ids.is_inference()
    outside = inside.for_autograd()
    assert [name for name, value in tensors(outside).items() if value.is_inference()] == []
    assert torch.equal(outside.input_ids, inside.input_ids)
    assert torch.equal(outside.advantages, inside.advantages)  # type: ignore[arg-type]


def test_what_is_cached_in_inference_mode_still_works_under_autograd() -> None:
    rollouts = build([0, 1], [1, 3])
    with torch.inference_mode():
        assert rollouts.response_lengths.tolist() == [1, 3]
        fresh = build([0, 1], [1, 3]).for_autograd()
    weights = torch.ones(2, requires_grad=True)
    (weights * rollouts.response_lengths).sum().backward()  # type: ignore[no-untyped-call]
    assert weights.grad is not None
    assert weights.grad.tolist() == [1.0, 3.0]
    weights.sin()[fresh.prompt_index].sum().backward()  # type: ignore[no-untyped-call]


def test_the_callers_tensors_are_not_changed_and_carry_no_graph_in() -> None:
    rewards = torch.tensor([1.0, 0.0], requires_grad=True)
    rollouts = build([0, 0], [1, 1], advantages=None, rewards=rewards)
    assert rollouts.advantages.tolist() == [0.5, -0.5]  # type: ignore[union-attr]
    assert not rollouts.advantages.requires_grad  # type: ignore[union-attr]
    assert rewards.tolist() == [1.0, 0.0]


def test_what_is_given_is_copied() -> None:
    """Whatever its owner does later, and to whatever it was: tensors of every kind of sharing, arrays, lists."""
    ids, ones = torch.tensor([[5, 6, 7], [5, 6, 8]]), np.ones((2, 3), dtype=np.int64)
    loss = torch.tensor([[0, 1, 1]]).expand(2, 3).clone()
    groups, advantages = torch.tensor([0, 0]), torch.tensor([1.0, -1.0], dtype=torch.float64)
    rewards, budgets = np.array([3.0, 1.0]), torch.tensor([4])
    old = torch.full((2, 3), -1.0, dtype=torch.float64)
    given: list[Any] = [ids, ones, loss, groups, advantages, rewards, budgets, old]
    rollouts = Rollouts(ids, ones, loss, groups, advantages, rewards, budgets, old)  # type: ignore[arg-type]
    before = {name: value.clone() for name, value in tensors(rollouts).items()}
    for value in given:
        value[...] = 1 - value
    after = tensors(rollouts)
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def masked_start(mask: list[list[int]], ids: list[list[int]] | None = None) -> Rollouts:
    tokens = torch.tensor(ids or [[5, 6, 7, 8], [5, 6, 7, 9]])
    return Rollouts(
        tokens, torch.ones_like(tokens), torch.tensor(mask), torch.tensor([3, 3]), torch.tensor([1.0, -1.0])
    )


def test_a_response_may_begin_with_tokens_that_are_not_scored() -> None:
    rollouts = masked_start([[0, 0, 1, 1], [0, 0, 0, 1]])
    assert rollouts.response_lengths.tolist() == [2, 1]
    (note,) = rollouts.notes()
    assert "In 1 groups (3) the loss mask begins at different tokens" in note
    assert masked_start([[0, 0, 1, 1], [0, 0, 1, 0]]).notes() == ()


def test_rows_that_differ_before_every_response_are_other_prompts() -> None:
    for ids in ([[5, 6, 7, 8], [5, 9, 7, 8]], [[5, 6, 7, 8], [4, 6, 7, 8]]):
        with pytest.raises(ValueError, match="rows 0 and 1 have the same group id but different prompts"):
            masked_start([[0, 0, 1, 1], [0, 0, 0, 1]], ids)


@pytest.mark.parametrize(
    ("advantages", "noted"),
    [
        ([1.0, 0.0, 1.0, 1.0], True), ([0.0, 0.0, 1.0, 1.0], True), ([-1.0, -2.0, 0.0, 3.0], True),
        ([1.0, -1.0, 1.0, 1.0], False), ([0.5, -0.5, 0.0, 0.0], False), ([0.0, 0.0, 0.0, 0.0], False),
    ],
)  # fmt: skip
def test_advantages_of_one_sign_within_every_prompt_are_noted(advantages: list[float], noted: bool) -> None:
    notes = build([0, 0, 1, 1], [1, 1, 1, 1], advantages=advantages).notes()
    assert any("of one sign, as raw rewards are" in note for note in notes) == noted
    centred = build([0, 0, 1, 1], [1, 1, 1, 1], advantages=None, rewards=advantages)
    assert centred.notes() == ()


def test_prompts_with_one_response_say_nothing_about_the_sign() -> None:
    assert build([0, 1, 2], [1, 1, 1], advantages=[1.0, 1.0, 1.0]).notes() == ()


def test_large_float32_rewards_are_centred_without_overflow() -> None:
    rewards = torch.full((4,), 9e37)
    rewards[0] = 9.00001e37
    found = build([0] * 4, [1] * 4, advantages=None, rewards=rewards).advantages
    assert found is not None
    expected = rewards.double() - rewards.double().mean()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_numbers_may_be_numpys_and_tensors() -> None:
    rollouts = build(
        [0, 0],
        [1, 1],
        temperature=np.float32(0.5),
        top_p=torch.tensor(0.25),
        top_k=np.int32(20),
        min_p=torch.tensor(0.125),
        max_lengths=np.int64(7),
        advantages=[np.float32(1), -1],
    )
    assert (rollouts.temperature, rollouts.top_p) == (0.5, 0.25)
    assert type(rollouts.temperature) is type(rollouts.top_p) is float
    assert (rollouts.top_k, rollouts.min_p) == (20, 0.125)
    assert (type(rollouts.top_k), type(rollouts.min_p)) == (int, float)
    assert build([0, 0], [1, 1], max_lengths=torch.tensor(7)).length_budgets.tolist() == [7]
    ids = torch.tensor([[5, 6], [5, 7]])
    groups: Any = [np.int32(4), torch.tensor(4)]
    found = Rollouts(ids, torch.ones_like(ids), torch.tensor([[0, 1]] * 2), groups, torch.tensor([1.0, -1.0]))
    assert found.group_order == (4,)


def test_groups_can_be_left_out() -> None:
    whole = build([4, 8, 4, 6], [1, 2, 3, 1])
    assert whole.without_groups([8, 6]).group_ids.tolist() == [4, 4]
    assert whole.without_groups([]).n_sequences == 4
    for ids, message in (([7], "no group 7"), ([4, 6, 8], "all groups")):
        with pytest.raises(ValueError, match=message):
            whole.without_groups(ids)
