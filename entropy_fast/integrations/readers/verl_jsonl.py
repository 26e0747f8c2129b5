"""verl's dump of a step: ``<step>.jsonl`` in the folder ``trainer.rollout_data_dir``.

Read from verl 0.9.1 (PyPI) and volcengine/verl at 00401103: ``verl/trainer/ppo/ray_trainer.py``.

Keys: ``input``, ``output``, ``gts``, ``score`` (the sum of the response's token scores), ``step``, and what the reward function
returned beside. Both texts were decoded without special tokens: those of the chat template are gone from prompts, and the
end-of-sequence token from responses, so the tokens made of them are not quite those that were sampled.
"""

from __future__ import annotations

from typing import Any

from entropy_fast.integrations.readers.fields import Fields
from entropy_fast.integrations.readers.options import Reader, ReaderOptions
from entropy_fast.integrations.readers.sequences import assemble
from entropy_fast.integrations.readers.texts import rows_of, single_step, tokenized
from entropy_fast.rollouts import Rollouts

__all__ = ["READER"]

NAME = "verl_jsonl"


def read(batch: Any, options: ReaderOptions) -> Rollouts:
    """Rollouts of a file or of rows of one step; advantages are the scores less their group's mean, unless they are given.

    Rows with the same ``input`` are one group, unless the caller gives groups.

    Raises:
        RolloutsError: there is no tokenizer, a field is missing or does not fit, or rows are of several steps.
    """
    rows = [Fields(NAME, row) for row in rows_of(NAME, batch)]
    single_step(NAME, rows)
    prompts, responses = ([str(row.need(name)) for row in rows] for name in ("input", "output"))
    scores = [row.get("score") for row in rows]
    return assemble(
        NAME,
        tokenized(NAME, options, prompts, responses),
        options,
        group_ids=prompts,
        group_field="`input`",
        advantage_field="`score`",
        rewards=None if any(score is None for score in scores) else scores,
        prompts=prompts,
        responses=responses,
    )


READER = Reader(
    NAME,
    read,
    {
        "token ids": "tokenizer",
        "groups other than equal inputs": "groups",
        "advantages other than centred scores": "advantages",
        "the sampling temperature": "temperature",
    },
)
