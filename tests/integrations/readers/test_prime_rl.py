"""prime-rl's micro batches: sequences one after the other, everything by token, padding at the end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reader_cases import ADVANTAGE, OLD, PLAIN, REF, WEIGHT, Case, assert_same, cases

from entropy_fast.errors import RolloutsError
from entropy_fast.integrations.readers import rollouts_from


def micro_batch(case: Case, rows: range, padding: int = 0, *, lengths: bool = True, **changes: Any) -> SimpleNamespace:
    def flat(prompt: float, values: list[list[Any]], pad: float) -> list[Any]:
        packed = [number for row in rows for number in [prompt] * len(case.prompts[row]) + values[row]]
        return packed + [pad] * padding

    sizes = [len(case.prompts[row]) + len(case.responses[row]) for row in rows] + [padding] * (padding > 0)
    fields = {
        "input_ids": [t for row in rows for t in case.prompts[row] + case.responses[row]] + [1] * padding,
        "loss_mask": [bool(bit) for bit in flat(0, case.masks, 0)],
        "advantages": flat(77.0, case.numbers(ADVANTAGE), 0.0),
        "inference_logprobs": flat(0.0, case.numbers(OLD), 0.0),
        "ref_logprobs": flat(0.0, case.numbers(REF), 0.0),
        "rl_weights": None,
        "position_ids": [position for size in sizes for position in range(size)],
        "temperatures": flat(0.9, [[0.9] * len(r) for r in case.responses], 1.0),
        "sequence_lengths": sizes if lengths else None,
    }
    return SimpleNamespace(**(fields | changes))


@settings(deadline=None, max_examples=40)
@given(case=cases(), cut=st.integers(0, 4), padding=st.integers(0, 3), lengths=st.booleans())
def test_every_number_stands_in_the_column_of_its_token(case: Case, cut: int, padding: int, lengths: bool) -> None:
    cut = min(cut, len(case))
    parts = [
        micro_batch(case, rows, padding, lengths=lengths) for rows in (range(cut), range(cut, len(case))) if len(rows)
    ]
    rollouts = rollouts_from("prime_rl", parts if len(parts) > 1 else parts[0], groups=case.groups)
    assert_same(rollouts, case, old=case.numbers(OLD), ref=case.numbers(REF), advantages=case.numbers(ADVANTAGE))
    assert rollouts.temperature == (0.9 if any(map(any, case.masks)) else None)


def test_the_tensors_of_the_trainer() -> None:
    made = vars(micro_batch(PLAIN, range(3), 2))
    tensors = {name: torch.tensor(value).unsqueeze(0) for name, value in made.items() if name.endswith(("s", "k"))
               and value is not None and name != "sequence_lengths"}  # fmt: skip
    rollouts = rollouts_from("prime_rl", tensors, groups=PLAIN.uids())
    assert_same(rollouts, PLAIN, old=PLAIN.numbers(OLD), ref=PLAIN.numbers(REF), advantages=PLAIN.numbers(ADVANTAGE))


def test_the_older_form_has_one_temperature_and_a_teacher() -> None:
    made = vars(micro_batch(PLAIN, range(3), lengths=False))
    older = {name: value for name, value in made.items() if name not in ("temperatures", "ref_logprobs", "rl_weights")}
    rollouts = rollouts_from(
        "prime_rl", older | {"temperature": 0.6, "teacher_logprobs": made["ref_logprobs"]}, groups=PLAIN.groups
    )
    assert rollouts.temperature == 0.6
    assert_same(rollouts, PLAIN, old=PLAIN.numbers(OLD), ref=PLAIN.numbers(REF), advantages=PLAIN.numbers(ADVANTAGE))


def test_a_weight_stream_in_one_micro_batch_only_is_one_in_the_other() -> None:
    first, second = micro_batch(PLAIN, range(2)), micro_batch(PLAIN, range(2, 3))
    ones = [[1.0] * len(row) for row in PLAIN.responses]
    weights = [*PLAIN.numbers(WEIGHT)[:2], ones[2]]
    first.rl_weights = [
        number for row in range(2) for number in [0.0] * len(PLAIN.prompts[row]) + PLAIN.numbers(WEIGHT)[row]
    ]
    rollouts = rollouts_from("prime_rl", [first, second], groups=PLAIN.groups)
    assert_same(
        rollouts, PLAIN, old=PLAIN.numbers(OLD), ref=PLAIN.numbers(REF), advantages=PLAIN.numbers(ADVANTAGE),
        weights=weights,
    )  # fmt: skip


def test_several_temperatures_are_named_and_the_caller_may_say_one() -> None:
    made = micro_batch(PLAIN, range(3))
    made.temperatures[-1] = 1.1
    with pytest.raises(RolloutsError, match=r"prime_rl: `temperatures` holds 2 temperatures .* from 0.9 to 1.1"):
        rollouts_from("prime_rl", made, groups=PLAIN.groups)
    assert rollouts_from("prime_rl", made, groups=PLAIN.groups, temperature=1.0).temperature == 1.0


def test_groups_are_asked_for() -> None:
    with pytest.raises(RolloutsError, match=r"prime_rl: the batch holds no group ids .*\n.*`groups`"):
        rollouts_from("prime_rl", micro_batch(PLAIN, range(3)))
    with pytest.raises(RolloutsError, match="there are 2 group ids for 3 sequences"):
        rollouts_from("prime_rl", micro_batch(PLAIN, range(3), 2), groups=[0, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inference_logprobs": [0.0] * 4}, r"`inference_logprobs` has shape \[4\]; expected \[16\]"),
        ({"sequence_lengths": [5, 5]}, r"`sequence_lengths` are \[5, 5\], in all 10"),
        ({"sequence_lengths": None, "position_ids": list(range(3, 19))}, "`position_ids` begin with"),
        ({"advantages": [SimpleNamespace(loss="rl", values=[], mask=[])]}, r"are channels by loss \(rl\)"),
        ({"loss_mask": None}, "has no `loss_mask`"),
        ({"advantages": None}, "no advantages"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RolloutsError, match=message):
        rollouts_from("prime_rl", micro_batch(PLAIN, range(3), **change), groups=PLAIN.groups)
