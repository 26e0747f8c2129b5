"""Every check of `Rollouts`: the message names the field, what was found and what to do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from entropy_fast.errors import EntropyFastError, RolloutsError
from entropy_fast.rollouts.container import Rollouts

NAN = float("nan")


def good() -> dict[str, Any]:
    """Three rows of two groups: [prompt prompt response response], the last row padded on both sides."""
    return {
        "input_ids": torch.tensor([[5, 6, 7, 8], [5, 6, 9, 9], [0, 4, 7, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]]),
        "loss_mask": torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 0]]),
        "group_ids": torch.tensor([7, 7, 3]),
        "advantages": torch.tensor([1.0, -1.0, 0.0]),
    }


def padded() -> dict[str, Any]:
    """Two prompts with two responses each, T = 3, responses from column 1."""
    return {
        "sequences": torch.ones(2, 2, 3, dtype=torch.int64),
        "attention_masks": torch.ones(2, 2, 3),
        "prompt_lens": torch.tensor([1, 1]),
        "advantages": torch.zeros(2, 2),
    }


def check(build: Any, problem: str, fix: str) -> None:
    with pytest.raises(RolloutsError) as caught:
        build()
    assert problem in caught.value.problem
    assert fix in caught.value.fix
    assert caught.value.problem in str(caught.value)
    assert caught.value.fix in str(caught.value)


def test_the_unchanged_fields_are_accepted() -> None:
    assert Rollouts(**good()).n_prompts == 2
    assert Rollouts.from_dict(padded()).n_prompts == 2


def test_the_error_is_a_value_error_of_this_package() -> None:
    with pytest.raises(ValueError, match="attention_mask") as caught:
        Rollouts(**good() | {"attention_mask": torch.ones(2, 2)})
    assert isinstance(caught.value, EntropyFastError)


ONES = torch.ones(3, 4, dtype=torch.int64)
FIELDS: list[tuple[str, Any, str, str]] = [
    ("input_ids", [[1, 2], [3]], "`input_ids` cannot be made a tensor", "rectangular list of numbers"),
    ("input_ids", "text", "`input_ids` cannot be made a tensor", "pass a tensor"),
    ("input_ids", [[2**70]], "`input_ids` cannot be made a tensor", "pass a tensor"),
    ("input_ids", ONES[0], "`input_ids` has shape [4]; expected [N, T]", "one row per sequence"),
    ("input_ids", ONES[None], "`input_ids` has shape [1, 3, 4]", "from_dict takes [B, G, T]"),
    ("input_ids", ONES[:0], "`input_ids` has shape [0, 4]", "one row per sequence"),
    ("input_ids", ONES[:, :0], "`input_ids` has shape [3, 0]", "one row per sequence"),
    ("input_ids", ONES.float(), "`input_ids` has dtype torch.float32; expected integers", "cast it to int64"),
    ("input_ids", ONES.bool(), "`input_ids` has dtype torch.bool", "cast it to int64"),
    ("input_ids", ONES * -100, "`input_ids` holds -100", "not with -100"),
    ("attention_mask", ONES[:, :3], "`attention_mask` has shape [3, 3], but input_ids is [3, 4]", "entry per token"),
    ("attention_mask", ONES * 2, "`attention_mask` holds values other than 0 and 1", "0/1 or boolean mask"),
    ("attention_mask", ONES * NAN, "`attention_mask` holds values other than 0 and 1", "0/1 or boolean mask"),
    ("attention_mask", ONES * 0, "`loss_mask` is 1 at row 0, column 2, where `attention_mask` is 0", "on padding"),
    ("loss_mask", ONES[:, 2:], "`loss_mask` has shape [3, 2]", "padded with zeros over the prompt"),
    ("loss_mask", ONES * 0.5, "`loss_mask` holds values other than 0 and 1", "per-token weights are not supported"),
    (
        "loss_mask",
        ONES,
        "`loss_mask` is 1 at row 2, column 0, where `attention_mask` is 0",
        "clear loss_mask on padding",
    ),
    ("group_ids", torch.tensor([1, 1]), "`group_ids` has shape [2]; expected [3], one id per sequence", "3 entries"),
    ("group_ids", torch.tensor([1.0, 1.0, 2.0]), "`group_ids` has dtype torch.float32", "cast it to int64"),
    ("group_ids", ["a", "a", "b"], "`group_ids` cannot be made a tensor", "pass a tensor"),
    ("group_ids", torch.tensor([7, 3, 7]), "rows 0 and 2 have the same group id but different prompts", "own group id"),
    ("advantages", torch.zeros(2), "`advantages` has shape [2]; expected [3], one number per sequence", "3 entries"),
    ("advantages", torch.zeros(3, 1), "`advantages` has shape [3, 1]", "flat tensor of 3 entries"),
    ("advantages", torch.tensor([0, NAN, 1]), "`advantages`[1] is nan; expected finite", "use 0 there"),
    ("advantages", torch.tensor([0, 0, -float("inf")]), "`advantages`[2] is -inf", "zero reward spread"),
    ("advantages", None, "neither `advantages` nor `rewards` was given", "pass advantages [N], or rewards [N]"),
    ("advantages", torch.tensor([0, 1e38, 1]), "`advantages`[1] is 1e+38 (group 7)", "an exact 0 for none"),
    ("advantages", torch.tensor([0, 0, -1e-37]), "`advantages`[2] is -1e-37 (group 3)", "of the order of 1"),
    ("advantages", torch.tensor([1e-40, 0, 0], dtype=torch.float64), "`advantages`[0] is 1e-40 (group 7)", "exact 0"),
    (
        "rewards",
        torch.tensor([3e38, 0, 0]),
        "`rewards`[0] is 3e+38 (group 7): sums and products",
        "rewards of the order",
    ),
    ("rewards", torch.tensor([0, 0, -1e300], dtype=torch.float64), "`rewards`[2] is -1e+300 (group 3)", "order of 1"),
    ("advantages", torch.tensor([True, False, True]), "`advantages` has dtype torch.bool; expected real", "cast it"),
    ("rewards", torch.tensor([1j, 0, 0]), "`rewards` has dtype torch.complex64; expected real", "cast it"),
    ("input_ids", ONES.to_sparse(), "`input_ids` cannot be made a tensor (it is nested, sparse", "a dense one"),
    ("loss_mask", ONES.to("meta"), "`loss_mask` cannot be made a tensor (it is nested, sparse", "a dense one"),
    ("temperature", torch.tensor([1.0, 1.0]), "`temperature` is tensor([1., 1.])", "temperature the sampler used"),
    ("temperature", np.bool_(True), "`temperature` is", "temperature the sampler used"),
    ("top_p", torch.tensor(True), "`top_p` is tensor(True)", "nucleus mass"),
    ("max_lengths", 2**70, "`max_lengths` cannot be made a tensor", "rectangular"),
    ("rewards", torch.zeros(4), "`rewards` has shape [4]", "flat tensor of 3 entries"),
    ("rewards", torch.tensor([NAN, 0, 1]), "`rewards`[0] is nan", "use 0 there"),
    (
        "max_lengths",
        1,
        "`max_lengths` is 1 for prompt 0 (group 7), whose longest response has 2 tokens",
        "max new tokens",
    ),
    ("max_lengths", torch.tensor([2, 0]), "`max_lengths` is 0 for prompt 1 (group 3)", "no response can exceed"),
    (
        "max_lengths",
        torch.tensor([2, 2, 2]),
        "`max_lengths` has shape [3]; expected [2], one budget per prompt",
        "2 ent",
    ),
    ("max_lengths", torch.tensor([2.0, 2.0]), "`max_lengths` has dtype torch.float32", "cast it to int64"),
    ("max_lengths", True, "`max_lengths` has shape []", "flat tensor of 2 entries"),
    (
        "old_logprobs",
        torch.zeros(3, 2),
        "`old_logprobs` has shape [3, 2], but input_ids is [3, 4]",
        "full[loss_mask.bool()]",
    ),
    ("old_logprobs", torch.zeros(3, 3), "`old_logprobs` has shape [3, 3]", "lack a column in front"),
    ("old_logprobs", ONES, "`old_logprobs` has dtype torch.int64", "pass nats"),
    ("old_logprobs", ONES * 0.5, "`old_logprobs` is 0.5 at row 0, column 2", "not probabilities"),
    ("old_logprobs", ONES * NAN, "`old_logprobs` is nan at row 0, column 2", "in nats"),
    ("old_logprobs", ONES * -float("inf"), "`old_logprobs` is -inf at row 0, column 2", "in nats"),
    ("temperature", 0.0, "`temperature` is 0.0; expected a number above 0", "greedy decoding gives no estimate"),
    ("temperature", -1, "`temperature` is -1", "temperature the sampler used"),
    ("temperature", NAN, "`temperature` is nan", "temperature the sampler used"),
    ("temperature", float("inf"), "`temperature` is inf", "temperature the sampler used"),
    ("temperature", "1.0", "`temperature` is '1.0'", "temperature the sampler used"),
    ("top_p", 0.0, "`top_p` is 0.0; expected a number in (0, 1]", "1 means the full distribution"),
    ("top_p", 1.5, "`top_p` is 1.5", "nucleus mass the sampler used"),
    ("top_p", NAN, "`top_p` is nan", "nucleus mass the sampler used"),
    ("top_p", True, "`top_p` is True", "nucleus mass the sampler used"),
    ("top_k", -2, "`top_k` is -2; expected an integer of at least 1", "0 means all of them"),
    ("top_k", 50.0, "`top_k` is 50.0", "the sampler kept"),
    ("top_k", True, "`top_k` is True", "the sampler kept"),
    ("top_k", "50", "`top_k` is '50'", "the sampler kept"),
    ("top_k", 2**63, "`top_k` is 9223372036854775808", "the sampler kept"),
    ("min_p", 1.0, "`min_p` is 1.0; expected a number in [0, 1)", "0 means all of them"),
    ("min_p", -0.1, "`min_p` is -0.1", "the sampler kept"),
    ("min_p", NAN, "`min_p` is nan", "the sampler kept"),
    ("min_p", torch.tensor(True), "`min_p` is tensor(True)", "the sampler kept"),
    ("prompts", ["one"], "`prompts` has 1 texts for 2 prompts", "one text per prompt"),
    ("prompts", "ab", "`prompts` is not a sequence of strings", "pass 2 strings, one per prompt"),
    ("prompts", 3, "`prompts` is not a sequence of strings", "pass 2 strings"),
    ("responses", ["a", "b"], "`responses` has 2 texts for 3 sequences", "one text per sequence"),
    ("responses", ["a", "b", 3], "`responses` is not a sequence of strings", "pass 3 strings, one per sequence"),
]


@pytest.mark.parametrize(("field", "value", "problem", "fix"), FIELDS)
def test_a_bad_field_is_named_with_the_finding_and_the_fix(field: str, value: Any, problem: str, fix: str) -> None:
    check(lambda: Rollouts(**good() | {field: value}), problem, fix)


def test_rewards_whose_differences_vanish_are_named_as_the_cause() -> None:
    rewards = torch.tensor([1e-40, 0, 0], dtype=torch.float64)
    check(
        lambda: Rollouts(**good() | {"advantages": None, "rewards": rewards}),
        "`advantages`[0] (made from `rewards`) is 5e-41 (group 7)", "give rewards of the order of 1",
    )  # fmt: skip


def test_the_hint_how_to_pad_log_probs_of_responses_is_right() -> None:
    """The code in the message, run."""
    fields = good() | {"old_logprobs": torch.tensor([[-1.0, -2.0], [-3.0, -4.0], [-5.0, 0.0]])}
    with pytest.raises(RolloutsError) as caught:
        Rollouts(**fields)
    code = caught.value.fix.split("of the responses alone: ")[1].rstrip(".")
    names = {"torch": torch, "loss_mask": fields["loss_mask"], "given": fields["old_logprobs"]}
    exec(code, names)
    rollouts = Rollouts(**fields | {"old_logprobs": names["full"]})
    assert rollouts.of_response_tokens("old_logprobs", torch.arange(3)).tolist() == [-1.0, -2.0, -3.0, -4.0, -5.0]


def test_a_row_without_tokens_is_refused() -> None:
    fields = good()
    fields["attention_mask"][1] = 0
    fields["loss_mask"][1] = 0
    check(lambda: Rollouts(**fields), "row 1 has no token at all", "leave the row out")


def test_the_first_token_cannot_be_a_response_token_wherever_the_padding_is() -> None:
    fields = good()
    fields["loss_mask"][2, 1] = 1  # column 1 is the first real token of the left-padded row
    check(lambda: Rollouts(**fields), "`loss_mask` is 1 on the first token of row 2", "BOS token")


def test_prompts_of_a_group_are_compared_without_padding_and_without_empty_rows() -> None:
    fields = good() | {"group_ids": torch.tensor([1, 1, 1])}
    fields["input_ids"][2] = torch.tensor([5, 6, 7, 0])
    fields["attention_mask"][2] = torch.tensor([1, 1, 1, 0])
    assert Rollouts(**fields).n_prompts == 1
    fields["input_ids"][2] = torch.tensor([0, 5, 6, 7])
    fields["attention_mask"][2] = torch.tensor([0, 1, 1, 1])
    fields["loss_mask"][2] = torch.tensor([0, 0, 0, 1])
    assert Rollouts(**fields).n_prompts == 1
    fields["input_ids"][2, 2] = 40
    check(lambda: Rollouts(**fields), "rows 0 and 2 have the same group id but different prompts", "own group id")
    fields["loss_mask"][2] = 0  # without a response token there is no boundary to compare up to
    assert Rollouts(**fields).n_prompts == 1


PADDED: list[tuple[str, Any, str, str]] = [
    ("sequences", torch.ones(4, 3, dtype=torch.int64), "`sequences` has shape [4, 3]; expected [B, G, T]", "ragged"),
    ("sequences", [[[1, 2], [3]]], "`sequences` cannot be made a tensor", "rectangular"),
    ("attention_masks", torch.ones(2, 2), "`attention_masks` has shape [2, 2]", "one 0/1 entry per token"),
    ("attention_masks", torch.full((2, 2, 3), 3), "`attention_masks` holds values other than 0 and 1", "boolean mask"),
    ("prompt_lens", torch.tensor([1]), "`prompt_lens` has shape [1]; expected [2], the column", "flat tensor of 2"),
    ("prompt_lens", torch.tensor([1.0, 1.0]), "`prompt_lens` has dtype torch.float32", "cast it to int64"),
    ("prompt_lens", torch.tensor([0, 1]), "`prompt_lens` is [0, 1]; expected columns from 1 to T = 3", "padded width"),
    ("prompt_lens", torch.tensor([1, 4]), "`prompt_lens` is [1, 4]", "the column at which responses start"),
    ("advantages", torch.zeros(4), "`advantages` has shape [4]; expected [B, G] = [2, 2]", "one number per response"),
    ("rewards", torch.zeros(2, 3), "`rewards` has shape [2, 3]; expected [B, G] = [2, 2]", "one number per response"),
    (
        "old_logprobs",
        torch.zeros(4, 3),
        "`old_logprobs` has shape [4, 3]; expected [B, G, T] = [2, 2, 3]",
        "own column",
    ),
    ("advantages", None, "neither `advantages` nor `rewards`", "rewards [N]"),
    ("reward", torch.zeros(2, 2), "has unknown keys ['reward']", "optional: advantages, rewards, old_logprobs"),
    ("max_lengths", torch.tensor([1, 2]), "`max_lengths` is 1 for prompt 0", "max new tokens"),
]


@pytest.mark.parametrize(("key", "value", "problem", "fix"), PADDED)
def test_a_bad_key_of_the_padded_form_is_named(key: str, value: Any, problem: str, fix: str) -> None:
    check(lambda: Rollouts.from_dict(padded() | {key: value}), problem, fix)


@pytest.mark.parametrize("key", ["sequences", "attention_masks", "prompt_lens"])
def test_a_missing_key_of_the_padded_form_is_named(key: str) -> None:
    batch = padded()
    del batch[key]
    check(lambda: Rollouts.from_dict(batch), f"is missing ['{key}']", "required keys: sequences, attention_masks")
