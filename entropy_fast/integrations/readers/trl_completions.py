"""TRL's table of completions: ``completions/completions_<step>.parquet``, which `GRPOConfig.log_completions` writes.

Read from trl 1.16.0 (PyPI): ``trl/trainer/grpo_trainer.py``.

Columns: ``step``, ``prompt``, ``completion``, one for every reward function, whatever `log_extra` added, and ``advantage``.
Prompts and completions are texts, or conversations (lists of messages with ``role`` and ``content``). Completions were decoded
without special tokens, so the end-of-sequence token that the policy sampled is not among the tokens made of them.
"""

from __future__ import annotations

from typing import Any

from entropy_fast.errors import RolloutsError
from entropy_fast.integrations.readers.fields import Fields
from entropy_fast.integrations.readers.options import Reader, ReaderOptions, lacking
from entropy_fast.integrations.readers.sequences import assemble
from entropy_fast.integrations.readers.texts import rows_of, single_step, tokenized
from entropy_fast.rollouts import Rollouts

__all__ = ["READER"]

NAME = "trl_completions"


def read(batch: Any, options: ReaderOptions) -> Rollouts:
    """Rollouts of a file, a data frame or rows of one step.

    Conversations become texts through the tokenizer's chat template. Rows with the same prompt are one group, unless the caller
    gives groups.

    Raises:
        RolloutsError: there is no tokenizer, a field is missing or does not fit, or rows are of several steps.
    """
    rows = [Fields(NAME, row) for row in rows_of(NAME, batch)]
    single_step(NAME, rows)
    if options.tokenizer is None:
        raise lacking(NAME, "token ids", "`prompt` and `completion` are texts", "tokenizer")
    prompts = [_prompt(row.need("prompt"), options.tokenizer) for row in rows]
    responses = [_completion(row.need("completion"), number) for number, row in enumerate(rows)]
    advantages = [row.get("advantage") for row in rows]
    return assemble(
        NAME,
        tokenized(NAME, options, prompts, responses),
        options,
        group_ids=prompts,
        group_field="`prompt`",
        advantages=None if any(value is None for value in advantages) else advantages,
        advantage_field="`advantage`",
        prompts=prompts,
        responses=responses,
    )


def _prompt(prompt: Any, tokenizer: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    messages = [dict(message) for message in prompt]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _completion(completion: Any, row: int) -> str:
    if isinstance(completion, str):
        return completion
    messages = [dict(message) for message in completion]
    if len(messages) != 1 or not isinstance(messages[0].get("content"), str):
        raise RolloutsError(
            f"{NAME}: the completion of row {row} is a conversation of {len(messages)} messages; expected one message of "
            "text.",
            fix="which of their tokens the policy sampled is not in the table: use token ids, or leave the row out.",
        )
    return str(messages[0]["content"])


READER = Reader(
    NAME,
    read,
    {"token ids": "tokenizer", "groups other than equal prompts": "groups", "the sampling temperature": "temperature"},
)
