"""OpenRLHF's `Experience`, one or a list of them.

Read from OpenRLHF 0.11.2 (PyPI) and OpenRLHF/OpenRLHF at 12bb0364: ``openrlhf/trainer/ppo_utils/experience.py``; at 03912e47:
``samples_generator.py``; ``experience_maker.py`` and ``models/actor.py`` of 0.11.2.

``sequences`` [N, T]; everything by action is [N, A]: A = T - 1, and column j belongs to the token in column j + 1, which the
logits of column j predict. The model takes the last A log-probs whatever A is, so that column j belongs to the token in column
T - A + j. ``index`` is a sample's place in the whole rollout, not its prompt, and is not read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from entropy_fast.errors import RolloutsError
from entropy_fast.integrations.readers.fields import Fields, as_list, as_several
from entropy_fast.integrations.readers.options import Reader, ReaderOptions
from entropy_fast.integrations.readers.sequences import SampledSequence, assemble, in_last_columns, unpadded_rows
from entropy_fast.rollouts import Rollouts

__all__ = ["READER"]

NAME = "openrlhf"
BY_ACTION = {
    "old_logprobs": ("action_log_probs", "rollout_log_probs"),
    "ref_logprobs": ("base_action_log_probs",),
    "advantages": ("advantages",),
}


def read(batch: Any, options: ReaderOptions) -> Rollouts:
    """Rollouts of one Experience or several, one after the other.

    Sequences with the same text in ``prompts`` are one group, unless the caller gives groups.

    Raises:
        RolloutsError: a field is missing or does not fit, or is in some of the experiences only.
    """
    sequences: list[SampledSequence] = []
    prompts: list[Any] = []
    rewards: list[Tensor] = []
    parts = as_several(batch)
    for part in parts:
        fields = Fields(NAME, part)
        found = _sequences(fields)
        if sequences and found and sequences[0].by_token.keys() != found[0].by_token.keys():
            raise RolloutsError(
                f"{NAME}: one experience holds {sorted(sequences[0].by_token)} by token, another {sorted(found[0].by_token)}.",
                fix="pass experiences of one stage of the step.",
            )
        sequences += found
        texts = as_list(fields.get("prompts") or [])
        prompts += texts if len(texts) == len(found) else []
        if fields.get("rewards") is not None:
            numbers = fields.tensor("rewards").reshape(-1)
            if len(numbers) != len(found):
                fields.misshapen("rewards", fields.tensor("rewards").shape, [len(found)])
            rewards.append(numbers)
    known = len(prompts) == len(sequences) and all(isinstance(text, str) and text for text in prompts)
    return assemble(
        NAME,
        sequences,
        options,
        group_ids=prompts if known else None,
        group_field="`prompts`, one text for every sequence",
        advantage_field="`advantages` or `rewards`",
        rewards=torch.cat(rewards) if rewards and len(rewards) == len(parts) else None,
        prompts=prompts if known else None,
    )


def _sequences(fields: Fields) -> list[SampledSequence]:
    def matrix(name: str, rows: int | None = None, columns: int | None = None) -> Tensor:
        value = fields.tensor(name)
        # A replay buffer holds samples one by one, without the dimension of the batch.
        return fields.matrix(name, rows, columns, value=value.unsqueeze(0) if value.dim() == 1 else value)

    ids = matrix("sequences")
    rows, width = ids.shape
    attention = matrix("attention_mask", rows, width)
    actions = matrix("action_mask", rows)
    if actions.shape[1] >= width:
        fields.misshapen("action_mask", actions.shape, [rows, f"at most {width - 1}"])
    by_token = {}
    for field, names in BY_ACTION.items():
        name, value = fields.first(*names)
        if value is not None:
            by_token[field] = in_last_columns(matrix(name, rows, actions.shape[1]), width)
    return unpadded_rows(NAME, ids, attention, in_last_columns(actions.long(), width), by_token)


READER = Reader(
    NAME,
    read,
    {
        "group ids, where `prompts` holds no texts": "groups",
        "advantages, before they are computed": "advantages",
        "the sampling temperature": "temperature",
    },
)
