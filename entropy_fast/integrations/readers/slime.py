"""slime's rollout data, before and after the trainer added to it, and its samples.

Read from THUDM/slime: ``slime/ray/rollout.py`` at a51f0714, ``slime/utils/types.py`` at 0d234f3e,
``slime/backends/megatron_utils/loss.py`` at 2fc48831, ``slime/utils/train_dump_utils.py`` at 429eb3df.

Lists of N: ``tokens`` are prompt and response without padding; ``loss_masks``, ``log_probs``, ``ref_log_probs``,
``rollout_log_probs`` and ``advantages`` cover the last ``response_lengths`` tokens of each. ``rewards`` are what the estimator
works with: for GRPO already centred in the group (and divided by its deviation), while ``raw_reward`` are what was given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from entropy_fast.errors import RolloutsError
from entropy_fast.integrations.readers.fields import Fields, as_list, as_several
from entropy_fast.integrations.readers.options import Reader, ReaderOptions
from entropy_fast.integrations.readers.sequences import assemble, join_prompt_and_response
from entropy_fast.rollouts import Rollouts
from entropy_fast.scalars import as_number

__all__ = ["READER"]

NAME = "slime"
BY_RESPONSE = {
    "old_logprobs": ("log_probs", "rollout_log_probs"),
    "ref_logprobs": ("ref_log_probs",),
    "advantages": ("advantages",),
}


def read(batch: Any, options: ReaderOptions) -> Rollouts:
    """Rollouts of a dict of lists, of a list of `Sample`, or of what slime's debug options saved of either.

    Raises:
        RolloutsError: a field is missing or does not fit.
    """
    fields = Fields(NAME, {"samples": batch} if isinstance(batch, (list, tuple)) else batch)
    held = fields.first("samples", "rollout_data")
    if held[1] is not None:
        fields = Fields(NAME, _columns(held[1]) if held[0] == "samples" else held[1])
    tokens = [fields.tensor("tokens", row) for row in as_list(fields.need("tokens"))]
    lengths = as_list(fields.need("response_lengths"))
    longest = [len(row) for row in tokens]
    if len(lengths) != len(tokens) or any(not 0 <= n <= most for n, most in zip(lengths, longest, strict=True)):
        fields.misshapen("response_lengths", lengths, [f"up to {most}" for most in longest])
    masks = (
        [torch.ones(length) for length in lengths]
        if fields.get("loss_masks") is None
        else _of_responses(fields, "loss_masks", lengths)
    )
    by_response: dict[str, list[Tensor]] = {}
    for field, names in BY_RESPONSE.items():
        name, value = fields.first(*names)
        if value is not None:
            by_response[field] = _of_responses(fields, name, lengths)
    rewards, centred = _rewards(fields, len(tokens))
    needed = options.advantages is None and "advantages" not in by_response
    return assemble(
        NAME,
        [
            join_prompt_and_response(tokens[row], masks[row], {name: parts[row] for name, parts in by_response.items()})
            for row in range(len(tokens))
        ],
        options,
        group_ids=fields.get("group_index"),
        group_field="`group_index` of samples; lists for training have none",
        advantages=rewards if centred and needed else None,
        advantage_field="`advantages` or `rewards`",
        rewards=None if centred else rewards,
    )


def _of_responses(fields: Fields, name: str, lengths: list[int]) -> list[Tensor]:
    parts = [fields.tensor(name, row).reshape(-1) for row in fields.need(name)]
    found = [len(part) for part in parts]
    if found != lengths:
        fields.misshapen(name, found, [f"the response lengths {lengths}"])
    return parts


def _rewards(fields: Fields, count: int) -> tuple[Tensor | None, bool]:
    """[N] rewards, and whether they were centred already, so that they are advantages.

    Centring them once more would do no harm to whole groups, but a rank's share holds parts of groups.
    """
    value = fields.get("rewards")
    if value is None or any(as_number(reward) is None for reward in value):
        return None, False
    rewards = torch.tensor([float(reward) for reward in value], dtype=torch.float64)
    if len(rewards) != count:
        fields.misshapen("rewards", rewards.shape, [count])
    raw = fields.get("raw_reward")
    if raw is None or any(as_number(reward) is None for reward in raw):
        return rewards, False
    given = torch.tensor([float(reward) for reward in raw], dtype=torch.float64)
    if len(given) != count:  # a rank's share: raw rewards are of all ranks, in the order before they were shared out
        share = [int(row) for row in fields.get("partition") or []]
        if len(share) != count or max(share) >= len(given):
            fields.misshapen("raw_reward", given.shape, [count])
        given = given[share]
    return rewards, not torch.equal(rewards, given)


def _columns(samples: Any) -> dict[str, list[Any]]:
    """The lists that slime makes of samples; a list that some sample has nothing for is left out."""
    found = [Fields(NAME, sample) for sample in as_several(samples)]
    columns: dict[str, list[Any]] = {
        "tokens": [sample.need("tokens") for sample in found],
        "response_lengths": [sample.need("response_length") for sample in found],
        "loss_masks": [_loss_mask(sample) for sample in found],
    }
    for name, column in (("reward", "rewards"), ("rollout_log_probs",) * 2, ("group_index",) * 2):
        values = [sample.get(name) for sample in found]
        if all(value is not None for value in values):
            columns[column] = values
    if any(isinstance(reward, dict) for reward in columns.get("rewards", [])):
        raise RolloutsError(
            f"{NAME}: the reward of a sample is a dict of several.",
            fix="set `reward` of every sample to the number the update is made of.",
        )
    return columns


def _loss_mask(sample: Fields) -> list[int]:
    length = int(sample.need("response_length"))
    if sample.get("remove_sample"):
        return [0] * length
    mask = sample.get("loss_mask")
    return [1] * length if mask is None else list(mask)


READER = Reader(
    NAME,
    read,
    {
        "group ids, except in samples": "groups",
        "advantages and rewards, where rewards are by token": "advantages",
        "the sampling temperature": "temperature",
    },
)
