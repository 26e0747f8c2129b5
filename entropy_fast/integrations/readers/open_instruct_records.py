"""open-instruct's saved rollouts: JSON Lines of `RolloutRecord`, or the records themselves.

Read from allenai/open-instruct: ``open_instruct/rl_utils.py`` at 00feb3a5.

A record has ``prompt_tokens``, ``response_tokens``, ``logprobs`` (one for every response token, or null), ``reward``,
``advantage``, ``step`` and ``prompt_idx``. It does not say which response tokens a tool wrote: all are taken for the policy's.
"""

from __future__ import annotations

from typing import Any

import torch

from entropy_fast.integrations.readers.fields import Fields
from entropy_fast.integrations.readers.options import Reader, ReaderOptions
from entropy_fast.integrations.readers.sequences import assemble, join_prompt_and_response
from entropy_fast.integrations.readers.texts import rows_of, single_step
from entropy_fast.rollouts import Rollouts

__all__ = ["READER"]

NAME = "open_instruct_records"


def read(batch: Any, options: ReaderOptions) -> Rollouts:
    """Rollouts of the records of one step, or of a ``.jsonl`` file that holds one step.

    Raises:
        RolloutsError: a field is missing or does not fit, or records are of several steps.
    """
    records = [Fields(NAME, row) for row in rows_of(NAME, batch)]
    single_step(NAME, records)
    logprobs = [record.get("logprobs") for record in records]
    sequences = []
    for record, given in zip(records, logprobs, strict=True):
        prompt, response = (record.tensor(name).long() for name in ("prompt_tokens", "response_tokens"))
        by_response = {}
        if all(value is not None for value in logprobs):
            by_response["old_logprobs"] = record.tensor("logprobs", given).double()
            if len(by_response["old_logprobs"]) != len(response):
                record.misshapen("logprobs", by_response["old_logprobs"].shape, [len(response)])
        sequences.append(
            join_prompt_and_response(torch.cat([prompt, response]), torch.ones(len(response)), by_response)
        )
    numbers = {name: [record.get(name) for record in records] for name in ("advantage", "reward", "prompt_idx")}
    known: dict[str, Any] = {
        name: values if all(value is not None for value in values) else None for name, values in numbers.items()
    }
    return assemble(
        NAME,
        sequences,
        options,
        group_ids=known["prompt_idx"],
        group_field="`prompt_idx`",
        advantages=known["advantage"],
        advantage_field="`advantage` or `reward`",
        rewards=known["reward"],
    )


READER = Reader(NAME, read, {"the sampling temperature": "temperature"})
