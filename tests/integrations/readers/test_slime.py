"""slime's lists: tokens without padding, everything else of the last `response_lengths` of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from reader_cases import ADVANTAGE, OLD, PLAIN, REF, Case, assert_same, cases

from entropy_fast.errors import RolloutsError
from entropy_fast.integrations.readers import rollouts_from


def rollout_data(case: Case) -> dict[str, Any]:
    """What training starts from."""
    return {
        "tokens": [prompt + response for prompt, response in zip(case.prompts, case.responses, strict=True)],
        "response_lengths": [len(response) for response in case.responses],
        "loss_masks": case.masks,
        "rewards": [float(row) for row in range(len(case))],
        "raw_reward": [float(row) for row in range(len(case))],
        "truncated": [0] * len(case),
        "sample_indices": list(range(len(case))),
        "rollout_log_probs": case.numbers(-0.5),
    }


def trained(case: Case) -> dict[str, Any]:
    """What the trainer has made of it before a step."""
    added = {"log_probs": OLD, "ref_log_probs": REF, "advantages": ADVANTAGE}
    return rollout_data(case) | {
        name: [torch.tensor(row) for row in case.numbers(scale)] for name, scale in added.items()
    }


@settings(deadline=None, max_examples=40)
@given(case=cases())
def test_every_number_stands_in_the_column_of_its_token(case: Case) -> None:
    for data in (trained(case), {"rollout_id": 3, "rank": 0, "rollout_data": trained(case)}):
        rollouts = rollouts_from("slime", data, groups=case.uids())
        assert_same(rollouts, case, old=case.numbers(OLD), ref=case.numbers(REF), advantages=case.numbers(ADVANTAGE))


def test_a_response_may_be_empty() -> None:
    case = Case([[5, 6], [7, 8]], [[9], []], [[1], []], [0, 1])
    rollouts = rollouts_from("slime", trained(case), groups=case.groups)
    assert rollouts.response_lengths.tolist() == [1, 0]


def sample(case: Case, row: int, **changes: Any) -> dict[str, Any]:
    fields = {
        "group_index": case.groups[row],
        "index": row,
        "tokens": case.prompts[row] + case.responses[row],
        "response_length": len(case.responses[row]),
        "loss_mask": case.masks[row],
        "reward": float(row),
        "rollout_log_probs": case.numbers(OLD)[row],
        "remove_sample": False,
    }
    return fields | changes


@settings(deadline=None, max_examples=25)
@given(case=cases())
def test_samples_know_their_groups(case: Case) -> None:
    dicts = [sample(case, row) for row in range(len(case))]
    objects = [SimpleNamespace(**fields) for fields in dicts]
    for batch in (dicts, objects, {"rollout_id": 0, "samples": dicts}):
        rollouts = rollouts_from("slime", batch)
        assert_same(rollouts, case, old=case.numbers(OLD))
        assert rollouts.group_ids.tolist() == case.groups
        assert rollouts.rewards is not None and rollouts.rewards.tolist() == [float(row) for row in range(len(case))]


def test_samples_without_a_mask_are_whole_and_removed_ones_are_masked() -> None:
    dicts = [sample(PLAIN, 0, loss_mask=None), sample(PLAIN, 1, remove_sample=True), sample(PLAIN, 2)]
    assert rollouts_from("slime", dicts).response_lengths.tolist() == [2, 0, 3]
    with pytest.raises(RolloutsError, match="a dict of several"):
        rollouts_from("slime", [sample(PLAIN, 0, reward={"a": 1.0})])


def test_rewards_that_were_normalised_are_advantages() -> None:
    data = rollout_data(PLAIN) | {"rewards": [-0.7, 0.0, 0.7], "raw_reward": [0.0, 1.0, 2.0]}
    rollouts = rollouts_from("slime", data, groups=PLAIN.groups)
    assert rollouts.rewards is None
    assert_same(rollouts, PLAIN, old=PLAIN.numbers(-0.5), advantages=[-0.7, 0.0, 0.7])


def test_a_rank_s_share_holds_raw_rewards_of_all_ranks() -> None:
    # One of the two responses to a prompt: centring within the share would take its advantage away.
    case = Case([[5]], [[6, 7]], [[1, 1]], [0])
    data = rollout_data(case) | {"rewards": [0.7], "raw_reward": [0.0, 2.0], "partition": range(1, 2)}
    assert_same(rollouts_from("slime", data, groups=[0]), case, old=case.numbers(-0.5), advantages=[0.7])
    raw = rollouts_from("slime", data | {"rewards": [2.0]}, groups=[0])
    assert raw.rewards is not None and raw.rewards.tolist() == [2.0]
    with pytest.raises(RolloutsError, match="`raw_reward` has shape"):
        rollouts_from("slime", {key: value for key, value in data.items() if key != "partition"}, groups=[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"response_lengths": [2, 9, 3]}, r"`response_lengths` has shape \[2, 9, 3\]"),
        ({"loss_masks": [[1, 1], [1, 1, 1], [1, 1, 1]]}, r"`loss_masks` has shape \[2, 3, 3\]; expected"),
        ({"log_probs": [[-1.0], [-1.0], [-1.0]]}, r"`log_probs` has shape \[1, 1, 1\]"),
        ({"rewards": [1.0], "advantages": None}, r"`rewards` has shape \[1\]"),
        ({"rewards": [[1.0]] * 3, "advantages": None}, "no advantages and no rewards"),
        ({"tokens": None}, "has no `tokens`"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RolloutsError, match=message):
        rollouts_from("slime", trained(PLAIN) | change, groups=PLAIN.groups)


def test_groups_are_asked_for() -> None:
    with pytest.raises(RolloutsError, match=r"slime: the batch holds no group ids .*\n.*`groups`"):
        rollouts_from("slime", trained(PLAIN))
