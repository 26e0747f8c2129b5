"""OpenRLHF's Experience: everything by action is [N, T - 1], of the tokens after the first."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reader_cases import ADVANTAGE, OLD, PLAIN, REF, Case, assert_same, cases, padded

from entropy_fast.errors import RolloutsError
from entropy_fast.integrations.readers import rollouts_from


def experience(case: Case, rows: range | None = None, *, actions: int | None = None, **changes: Any) -> SimpleNamespace:
    """The given rows, padded on the right; ``actions`` leaves out columns in front, which hold prompts alone."""
    rows = range(len(case)) if rows is None else rows
    whole = [case.prompts[row] + case.responses[row] for row in rows]
    width = max(map(len, whole))
    keep = width - 1 if actions is None else actions

    def of_actions(values: list[list[Any]], beside: float = 0) -> torch.Tensor:
        full = [[beside] * (len(case.prompts[row]) - 1) + values[row] for row in rows]
        return padded(full, width - 1, "right", beside)[:, width - 1 - keep :]

    fields = {
        "sequences": padded(whole, width, "right"),
        "attention_mask": padded([[1] * len(row) for row in whole], width, "right"),
        "action_mask": of_actions(case.masks).bool(),
        "action_log_probs": of_actions(case.numbers(OLD), 3.0),
        "base_action_log_probs": of_actions(case.numbers(REF), 3.0),
        "rollout_log_probs": of_actions(case.numbers(-0.5), 3.0),
        "advantages": of_actions(case.numbers(ADVANTAGE)),
        "rewards": torch.tensor([float(row) for row in rows]),
        "index": None,
        "prompts": [f"text {case.groups[row]}" for row in rows],
        "info": {},
    }
    return SimpleNamespace(**(fields | changes))


@settings(deadline=None, max_examples=40)
@given(case=cases(), cut=st.integers(0, 4))
def test_every_number_stands_in_the_column_of_its_token(case: Case, cut: int) -> None:
    cut = min(cut, len(case))
    parts = [experience(case, rows) for rows in (range(cut), range(cut, len(case))) if len(rows)]
    rollouts = rollouts_from("openrlhf", parts if len(parts) > 1 else parts[0])
    assert_same(rollouts, case, old=case.numbers(OLD), ref=case.numbers(REF), advantages=case.numbers(ADVANTAGE))
    assert rollouts.rewards is not None and rollouts.rewards.tolist() == [float(row) for row in range(len(case))]


def test_fewer_actions_than_tokens_are_the_last_ones() -> None:
    case = Case([[5, 6, 7], [8, 9, 10]], [[11, 12], [13, 14]], [[1, 1], [1, 1]], [0, 1])
    rollouts = rollouts_from("openrlhf", experience(case, actions=2))
    assert_same(rollouts, case, old=case.numbers(OLD), ref=case.numbers(REF), advantages=case.numbers(ADVANTAGE))


def test_samples_of_a_replay_buffer_have_no_dimension_of_the_batch() -> None:
    items = []
    for row in range(len(PLAIN)):
        one = experience(PLAIN, range(row, row + 1))
        flat = {k: v[0] if isinstance(v, torch.Tensor) else v for k, v in vars(one).items()}
        items.append(SimpleNamespace(**flat))
    rollouts = rollouts_from("openrlhf", items, temperature=1.0)
    assert rollouts.temperature == 1.0
    assert_same(rollouts, PLAIN, old=PLAIN.numbers(OLD), ref=PLAIN.numbers(REF), advantages=PLAIN.numbers(ADVANTAGE))


def test_the_caller_s_groups_and_the_sampler_s_log_probs_where_there_are_no_others() -> None:
    batch = experience(PLAIN, action_log_probs=None, base_action_log_probs=None, prompts=[])
    with pytest.raises(RolloutsError, match=r"no group ids \(`prompts`.*\n.*`groups`"):
        rollouts_from("openrlhf", batch)
    rollouts = rollouts_from("openrlhf", batch, groups=PLAIN.groups)
    assert rollouts.group_ids.tolist() == PLAIN.groups
    assert_same(rollouts, PLAIN, old=PLAIN.numbers(-0.5), advantages=PLAIN.numbers(ADVANTAGE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action_mask": torch.ones(3, 6)}, r"`action_mask` has shape \[3, 6\]; expected \[3, at most 5\]"),
        ({"action_log_probs": torch.zeros(3, 4)}, r"`action_log_probs` has shape \[3, 4\]; expected \[3, 5\]"),
        ({"action_mask": torch.ones(3, 5)}, "where `attention_mask` is 0"),
        ({"rewards": torch.zeros(2)}, r"`rewards` has shape \[2\]; expected \[3\]"),
        ({"sequences": None}, "has no `sequences`"),
        ({"advantages": None, "rewards": None}, "no advantages and no rewards"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RolloutsError, match=message):
        rollouts_from("openrlhf", experience(PLAIN, **change))


def test_experiences_of_different_stages_are_refused() -> None:
    parts = [experience(PLAIN, range(2)), experience(PLAIN, range(2, 3), advantages=None)]
    with pytest.raises(RolloutsError, match="one experience holds"):
        rollouts_from("openrlhf", parts)
