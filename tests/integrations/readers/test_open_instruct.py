"""open-instruct's packs: sequences numbered in the attention mask, responses numbered through the step in the response mask."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reader_cases import ADVANTAGE, OLD, PLAIN, Case, assert_same, cases
from torch.nn.utils.rnn import pad_sequence

from entropy_fast.errors import RolloutsError
from entropy_fast.integrations.readers import rollouts_from

NAN = float("nan")


def packs(case: Case, cut: int) -> dict[str, list[torch.Tensor]]:
    """Two packs, the second from row ``cut``; as `PackedSequences` has them, on-policy advantages by token."""
    found: dict[str, list[torch.Tensor]] = {}
    for rows in (range(cut), range(cut, len(case))):
        if not len(rows):
            continue
        fields = {
            "query_responses": [case.prompts[row] + case.responses[row] for row in rows],
            "attention_masks": [[row - rows[0] + 1] * len(case.prompts[row] + case.responses[row]) for row in rows],
            "response_masks": [[0] * len(case.prompts[row]) + [bit * (row + 1) for bit in case.masks[row]] for row in rows],
            "advantages": [[0.0] * len(case.prompts[row]) + case.numbers(ADVANTAGE)[row] for row in rows],
            "vllm_logprobs": [[NAN] * len(case.prompts[row]) + case.numbers(OLD)[row] for row in rows],
        }  # fmt: skip
        for name, values in fields.items():
            found.setdefault(name, []).append(torch.tensor([number for row in values for number in row]))
    return found


@settings(deadline=None, max_examples=40)
@given(case=cases(), cut=st.integers(0, 4), collated=st.booleans())
def test_every_number_stands_in_the_column_of_its_token(case: Case, cut: int, collated: bool) -> None:
    fields = packs(case, min(cut, len(case)))
    if collated:
        fields = {name: [pad_sequence(rows, batch_first=True)] for name, rows in fields.items()}
    masked = [not any(mask) for mask in case.masks]
    groups = [100 + row if masked[row] else group for row, group in enumerate(case.groups)]  # see the next test
    rollouts = rollouts_from("open_instruct", SimpleNamespace(**fields), groups=groups)
    same = Case(case.prompts, case.responses, case.masks, groups)
    assert_same(rollouts, same, old=case.numbers(OLD), advantages=case.numbers(ADVANTAGE))


def test_groups_follow_the_numbers_of_responses_however_packs_are_shuffled() -> None:
    fields = packs(PLAIN, 1)
    shuffled = {name: rows[::-1] for name, rows in fields.items()}
    rollouts = rollouts_from("open_instruct", shuffled, groups=PLAIN.groups, advantages=[10.0, 20.0, 30.0])
    order = [1, 2, 0]
    expected = Case(
        *([rows[row] for row in order] for rows in (PLAIN.prompts, PLAIN.responses, PLAIN.masks, PLAIN.groups))
    )
    old = [PLAIN.numbers(OLD)[row] for row in order]
    assert_same(rollouts, expected, old=old, advantages=[20.0, 30.0, 10.0])
    assert rollouts.group_ids.tolist() == [9, 4, 4]


def test_a_masked_response_is_found_by_its_neighbours_and_a_filler_is_a_group_of_its_own() -> None:
    case = Case(PLAIN.prompts, PLAIN.responses, [[1, 1], [0, 0, 0, 0], [1, 1, 1]], PLAIN.groups)
    fields = packs(case, 3)
    filler = {
        "query_responses": [0, 2],
        "attention_masks": [1, 1],
        "response_masks": [0, 0],
        "advantages": [0.0, 0.0],
        "vllm_logprobs": [0.0, 0.0],
    }
    more = {name: [*rows, torch.tensor(filler[name])] for name, rows in fields.items()}
    rollouts = rollouts_from("open_instruct", more, groups=PLAIN.groups)
    first, second, third, last = rollouts.group_ids.tolist()
    assert first == third and len({first, second, last}) == 3
    assert rollouts.response_lengths.tolist() == [2, 0, 3, 0]


def test_masks_of_ones_leave_the_order_of_packing() -> None:
    fields = packs(PLAIN, 2)
    fields["response_masks"] = [(rows > 0).long() for rows in fields["response_masks"]]
    rollouts = rollouts_from("open_instruct", fields, groups=PLAIN.uids())
    assert_same(rollouts, PLAIN, old=PLAIN.numbers(OLD), advantages=PLAIN.numbers(ADVANTAGE))


def test_a_list_of_workers_batches_is_one_step() -> None:
    fields = packs(PLAIN, 1)
    workers = [{name: [rows[pack]] for name, rows in fields.items()} for pack in range(2)]
    rollouts = rollouts_from("open_instruct", workers, groups=PLAIN.groups, temperature=1.0, max_lengths=8)
    assert rollouts.length_budgets.tolist() == [8, 8]
    assert_same(rollouts, PLAIN, old=PLAIN.numbers(OLD), advantages=PLAIN.numbers(ADVANTAGE))


def changed(**changes: Any) -> dict[str, Any]:
    return packs(PLAIN, 3) | changes


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (changed(vllm_logprobs=[torch.zeros(3)]), r"`vllm_logprobs` has shape \[3\]"),
        (changed(response_masks=[torch.arange(16) + 1]), "holds tokens of the responses"),
        (changed(advantages=None), "no advantages"),
        (changed(query_responses=None), "has no `query_responses`"),
    ],
)
def test_what_does_not_fit_is_named(batch: dict[str, Any], message: str) -> None:
    with pytest.raises(RolloutsError, match=message):
        rollouts_from("open_instruct", batch, groups=PLAIN.groups)


def test_groups_are_asked_for_and_must_reach_the_last_response() -> None:
    with pytest.raises(RolloutsError, match=r"no group ids .*\n.*`groups`"):
        rollouts_from("open_instruct", packs(PLAIN, 1))
    with pytest.raises(RolloutsError, match="`groups` has 2 entries, and the packs hold response 3"):
        rollouts_from("open_instruct", packs(PLAIN, 1), groups=[0, 1])
