"""What holds for all formats: the table, the caller's options, and that no trainer is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from reader_cases import PLAIN

from entropy_fast.errors import RolloutsError
from entropy_fast.integrations.readers import READERS, Reader, rollouts_from

# A format with little around it stands for all that `rollouts_from` does with options.
DATA = {
    "tokens": [prompt + response for prompt, response in zip(PLAIN.prompts, PLAIN.responses, strict=True)],
    "response_lengths": [len(response) for response in PLAIN.responses],
    "loss_masks": PLAIN.masks,
    "rewards": [0.0, 1.0, 2.0],
}


def test_the_table_says_what_is_lacking_and_which_option_supplies_it() -> None:
    options = {"groups", "advantages", "tokenizer", "max_lengths", "temperature"}
    for name, reader in READERS.items():
        assert isinstance(reader, Reader) and reader.name == name
        assert reader.lacks and set(reader.lacks.values()) <= options


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(RolloutsError, match=r"no format 'trlx'.\n.*open_instruct, .*verl"):
        rollouts_from("trlx", {})


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("batch", [None, 3, [], {}])
def test_what_is_no_batch_is_refused_by_every_reader(name: str, batch: object) -> None:
    with pytest.raises(RolloutsError):
        rollouts_from(name, batch, groups=[], tokenizer=object())


@pytest.mark.parametrize("groups", [[4, 9, 4], torch.tensor([4, 9, 4]), torch.tensor([4, 9, 4]).numpy()])
def test_integer_groups_are_kept(groups: object) -> None:
    assert rollouts_from("slime", DATA, groups=groups).group_ids.tolist() == [4, 9, 4]


def test_text_groups_are_numbered_in_order() -> None:
    assert rollouts_from("slime", DATA, groups=("b", "a", "b")).group_ids.tolist() == [0, 1, 0]


@pytest.mark.parametrize("groups", [[None, 1, 1], [1.5, 1, 1], [True, False, True]])
def test_groups_of_other_types_are_refused(groups: list[object]) -> None:
    with pytest.raises(RolloutsError, match="the group id of sequence 0 is a"):
        rollouts_from("slime", DATA, groups=groups)


def test_advantages_by_token_that_are_the_same_stay_one_number() -> None:
    rollouts = rollouts_from("slime", DATA, groups=PLAIN.groups, advantages=[[1.0] * 2, [2.0] * 3, [3.0] * 3])
    assert rollouts.token_weights is None
    assert rollouts.advantages is not None and rollouts.advantages.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("advantages", "message"),
    [
        ([1.0, 2.0], "`advantages` has 2 entries for 3 sequences"),
        ([[1.0], [1.0], [1.0]], r"`advantages` of sequence 0 has shape \[1\]; expected \[2\]"),
    ],
)
def test_advantages_that_do_not_fit_are_refused(advantages: list[object], message: str) -> None:
    with pytest.raises(RolloutsError, match=message):
        rollouts_from("slime", DATA, groups=PLAIN.groups, advantages=advantages)


def test_no_trainer_is_imported_and_integrations_alone_import_nothing() -> None:
    light = "import entropy_fast.integrations, sys; assert 'torch' not in sys.modules"
    trainers = ("verl", "openrlhf", "prime_rl", "skyrl", "slime", "open_instruct", "trl", "tensordict")
    whole = f"import entropy_fast.integrations.readers, sys; assert not set({trainers}) & set(sys.modules)"
    for script in (light, whole):
        subprocess.run([sys.executable, "-c", script], check=True)
