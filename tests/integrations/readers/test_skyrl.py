"""SkyRL's batches: everything by response is [N, R] and covers the last R columns, in both layouts it has had."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reader_cases import ADVANTAGE, OLD, PLAIN, REF, Case, assert_same, cases, padded

from entropy_fast.errors import RolloutsError
from entropy_fast.integrations.readers import rollouts_from


class Batch(dict[str, Any]):
    """Like a `TensorBatch`: a dict of tensors with metadata beside."""

    metadata: dict[str, Any] | None = None


def batch(case: Case, *, right_aligned: bool = True, **changes: Any) -> Batch:
    before, size = (max(map(len, rows)) for rows in (case.prompts, case.responses))
    pairs = list(zip(case.prompts, case.responses, strict=True))
    if right_aligned:
        whole = [prompt + response for prompt, response in pairs]
        width, side = max(map(len, whole)), "left"
        sequences, attended = padded(whole, width, "left"), padded([[1] * len(row) for row in whole], width, "left")
    else:
        side = "right"
        sequences, attended = (
            torch.cat([padded(a, before, "left"), padded(b, size, "right")], -1)
            for a, b in (
                (case.prompts, case.responses),
                ([[1] * len(p) for p in case.prompts], [[1] * len(r) for r in case.responses]),
            )
        )
    found = Batch(
        sequences=sequences,
        attention_mask=attended,
        response_mask=padded([[1] * len(r) for r in case.responses], size, side),
        loss_mask=padded(case.masks, size, side).float(),
        action_log_probs=padded(case.numbers(OLD), size, side),
        base_action_log_probs=padded(case.numbers(REF), size, side),
        rollout_logprobs=padded(case.numbers(-0.5), size, side),
        advantages=padded(case.numbers(ADVANTAGE), size, side),
        rewards=padded([[0.0] * (len(r) - 1) + [float(i)] for i, r in enumerate(case.responses)], size, side),
    )
    found.update(changes)
    found.metadata = {"uids": case.uids(), "response_length": size}
    return found


@settings(deadline=None, max_examples=40)
@given(case=cases(), right_aligned=st.booleans())
def test_every_number_stands_in_the_column_of_its_token(case: Case, right_aligned: bool) -> None:
    rollouts = rollouts_from("skyrl", batch(case, right_aligned=right_aligned), temperature=0.5)
    assert rollouts.temperature == 0.5
    assert_same(rollouts, case, old=case.numbers(OLD), ref=case.numbers(REF), advantages=case.numbers(ADVANTAGE))
    assert rollouts.rewards is not None and rollouts.rewards.tolist() == [float(row) for row in range(len(case))]


def test_rows_that_even_out_the_number_stay_as_rows_without_response_tokens() -> None:
    made = batch(PLAIN)
    padding = {name: torch.cat([values, values[:1]]) for name, values in made.items()}
    padding["loss_mask"][-1] = 0
    more = Batch(padding)
    more.metadata = {"uids": [*PLAIN.uids(), "pad0"], "pad_size": 1}
    rollouts = rollouts_from("skyrl", more)
    assert rollouts.response_lengths.tolist() == [2, 3, 3, 0]
    assert rollouts.group_ids.tolist() == [0, 1, 0, 2]
    assert rollouts.without_empty_responses()[0].n_sequences == 3


def test_the_sampler_s_log_probs_and_rewards_where_there_is_nothing_else() -> None:
    made = batch(PLAIN, action_log_probs=None, base_action_log_probs=None, advantages=None)
    rollouts = rollouts_from("skyrl", made)
    assert_same(rollouts, PLAIN, old=PLAIN.numbers(-0.5), advantages=[-1.0, 0.0, 1.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantages": torch.zeros(3, 6)}, r"`advantages` has shape \[3, 6\]; expected \[3, 4\]"),
        ({"loss_mask": torch.ones(3, 4)}, "where `response_mask` is 0"),
        ({"loss_mask": torch.ones(3, 3)}, r"`loss_mask` has shape \[3, 3\]; expected \[3, `response_length` 4\]"),
        ({"loss_mask": None, "response_mask": None}, "has no `loss_mask`"),
        ({"advantages": None, "rewards": None}, "no advantages and no rewards"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RolloutsError, match=message):
        rollouts_from("skyrl", batch(PLAIN, **change))


def test_uids_are_asked_for() -> None:
    made = batch(PLAIN)
    made.metadata = None
    with pytest.raises(RolloutsError, match=r"no group ids \(`metadata\['uids'\]`\).*\n.*`groups`"):
        rollouts_from("skyrl", made)
    assert rollouts_from("skyrl", made, groups=PLAIN.groups).group_ids.tolist() == PLAIN.groups
