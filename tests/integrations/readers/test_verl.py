"""verl's batches: prompts padded on the left, responses on the right, everything of responses [N, R]; and the jagged forms."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from reader_cases import ADVANTAGE, OLD, PLAIN, REF, WEIGHT, Case, assert_same, cases, padded

from entropy_fast.errors import RolloutsError
from entropy_fast.integrations.readers import rollouts_from


def tensors(case: Case, *, by_token: bool = True) -> dict[str, torch.Tensor]:
    before, size = (max(map(len, rows)) for rows in (case.prompts, case.responses))
    prompts, responses = padded(case.prompts, before, "left"), padded(case.responses, size, "right")
    attended = [[[1] * len(row) for row in rows] for rows in (case.prompts, case.responses)]
    advantages = case.numbers(ADVANTAGE) if by_token else [[2.0 + row] * size for row in range(len(case))]
    return {
        "prompts": prompts,
        "responses": responses,
        "input_ids": torch.cat([prompts, responses], -1),
        "attention_mask": torch.cat([padded(attended[0], before, "left"), padded(attended[1], size, "right")], -1),
        "response_mask": padded(case.masks, size, "right"),
        "old_log_probs": padded(case.numbers(OLD), size, "right", 7.0),
        "ref_log_prob": padded(case.numbers(REF), size, "right", float("nan")),
        "advantages": padded(advantages, size, "right"),
        "token_level_rewards": padded([[0.0] * (len(r) - 1) + [float(i)] for i, r in enumerate(case.responses)], size, "right"),
    }  # fmt: skip


def proto(case: Case, batch: dict[str, torch.Tensor], **meta: Any) -> SimpleNamespace:
    return SimpleNamespace(batch=batch, non_tensor_batch={"uid": np.array(case.uids(), dtype=object)}, meta_info=meta)


@settings(deadline=None, max_examples=40)
@given(case=cases())
def test_every_number_stands_in_the_column_of_its_token(case: Case) -> None:
    rollouts = rollouts_from("verl", proto(case, tensors(case), temperature=0.7))
    assert rollouts.temperature == 0.7
    assert_same(rollouts, case, old=case.numbers(OLD), ref=case.numbers(REF), advantages=case.numbers(ADVANTAGE))
    assert rollouts.rewards is not None
    assert rollouts.rewards.tolist() == [float(row) for row in range(len(case))]


def test_advantages_of_sequences_stay_one_number() -> None:
    rollouts = rollouts_from("verl", proto(PLAIN, tensors(PLAIN, by_token=False)))
    assert rollouts.advantages is not None
    assert rollouts.advantages.tolist() == [2.0, 3.0, 4.0]
    assert rollouts.token_weights is None


def test_weights_of_rollout_correction_are_token_weights() -> None:
    batch = tensors(PLAIN, by_token=False) | {"rollout_is_weights": padded(PLAIN.numbers(WEIGHT), 4, "right")}
    rollouts = rollouts_from("verl", proto(PLAIN, batch))
    assert_same(
        rollouts,
        PLAIN,
        old=PLAIN.numbers(OLD),
        ref=PLAIN.numbers(REF),
        advantages=[2.0, 3.0, 4.0],
        weights=PLAIN.numbers(WEIGHT),
    )


def nested(rows: list[list[Any]]) -> torch.Tensor:
    return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)


@settings(deadline=None, max_examples=25)
@given(case=cases())
def test_the_jagged_form_of_the_trainer(case: Case) -> None:
    batch = {
        "prompts": nested(case.prompts),
        "responses": nested(case.responses),
        "response_mask": nested(case.masks),
        "old_log_probs": nested(case.numbers(OLD)),
        "advantages": nested(case.numbers(ADVANTAGE)),
        "rm_scores": nested(case.numbers(1.0)),
        "uid": case.uids(),
    }
    whole = [prompt + response for prompt, response in zip(case.prompts, case.responses, strict=True)]
    for form in (batch, batch | {"input_ids": nested(whole)}):
        rollouts = rollouts_from("verl", form)
        assert_same(rollouts, case, old=case.numbers(OLD), advantages=case.numbers(ADVANTAGE))
        assert rollouts.rewards is not None
        assert rollouts.rewards.tolist() == [sum(row) for row in case.numbers(1.0)]


@settings(deadline=None, max_examples=25)
@given(case=cases())
def test_the_jagged_form_of_the_workers_keeps_padded_masks(case: Case) -> None:
    batch = tensors(case)
    whole = [prompt + response for prompt, response in zip(case.prompts, case.responses, strict=True)]
    batch["input_ids"] = nested(whole)
    rollouts = rollouts_from("verl", batch | {"loss_mask": batch["response_mask"]}, groups=case.groups, temperature=1.5)
    assert rollouts.temperature == 1.5
    assert_same(rollouts, case, old=case.numbers(OLD), ref=case.numbers(REF), advantages=case.numbers(ADVANTAGE))


def test_without_advantages_they_are_made_of_rewards_and_without_a_mask_of_attention() -> None:
    batch = tensors(PLAIN)
    del batch["advantages"], batch["response_mask"], batch["old_log_probs"], batch["ref_log_prob"]
    batch["rollout_log_probs"] = padded(PLAIN.numbers(REF), 4, "right")
    rollouts = rollouts_from("verl", proto(PLAIN, batch))
    full = Case(PLAIN.prompts, PLAIN.responses, [[1] * len(row) for row in PLAIN.responses], PLAIN.groups)
    assert_same(rollouts, full, old=PLAIN.numbers(REF), advantages=[-1.0, 0.0, 1.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old_log_probs": torch.zeros(3, 3)}, r"verl: `old_log_probs` has shape \[3, 3\]; expected \[3, 4\]"),
        ({"attention_mask": torch.ones(3, 6)}, r"verl: `attention_mask` has shape \[3, 6\]; expected \[3, 7\]"),
        ({"responses": torch.ones(3, 4)}, "not the last 4 columns of `input_ids`"),
        ({"response_mask": torch.ones(3, 9)}, r"`response_mask` has shape \[3, 9\]; expected \[3, at most 7\]"),
        ({"response_mask": torch.ones(3, 4)}, "where `attention_mask` is 0"),
        ({"input_ids": None}, "the batch has no `input_ids`"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RolloutsError, match=message):
        rollouts_from("verl", proto(PLAIN, tensors(PLAIN) | change))


def test_what_is_missing_is_asked_for() -> None:
    batch = tensors(PLAIN)
    with pytest.raises(RolloutsError, match=r"no group ids .*uid.*\n.*`groups`"):
        rollouts_from("verl", batch)
    del batch["advantages"], batch["token_level_rewards"]
    with pytest.raises(RolloutsError, match=r"no advantages and no rewards .*\n.*`advantages`"):
        rollouts_from("verl", proto(PLAIN, batch))
    assert rollouts_from("verl", proto(PLAIN, batch), advantages=[1, 2, 3]).n_sequences == 3


def test_a_jagged_field_of_another_length_is_named() -> None:
    batch = {"prompts": nested(PLAIN.prompts), "responses": nested(PLAIN.responses), "uid": PLAIN.uids()}
    batch["old_log_probs"] = nested([[-1.0] * 5, [-1.0] * 5, [-1.0] * 6])
    with pytest.raises(RolloutsError, match="`old_log_probs` has shape"):
        rollouts_from("verl", batch)
