"""What other RL trainers hold or write at a step, as `Rollouts`.

Formats are read by the names of their fields: a mapping or an object with attributes will do, and no trainer is imported.
What a format does not hold is asked of the caller. docs/readers.md says what was read and what each reader was tried on.
"""

from __future__ import annotations

from typing import Any

from entropy_fast.errors import RolloutsError
from entropy_fast.integrations.readers import (
    open_instruct,
    open_instruct_records,
    openrlhf,
    prime_rl,
    skyrl,
    slime,
    trl_completions,
    verl,
    verl_jsonl,
)
from entropy_fast.integrations.readers.options import Reader, ReaderOptions
from entropy_fast.rollouts import Rollouts

__all__ = ["READERS", "Reader", "rollouts_from"]

READERS: dict[str, Reader] = {
    module.READER.name: module.READER
    for module in (
        verl,
        verl_jsonl,
        openrlhf,
        prime_rl,
        skyrl,
        slime,
        open_instruct,
        open_instruct_records,
        trl_completions,
    )
}


def rollouts_from(
    name: str,
    batch: Any,
    *,
    groups: Any = None,
    advantages: Any = None,
    tokenizer: Any = None,
    max_lengths: Any = None,
    temperature: float | None = None,
) -> Rollouts:
    """Rollouts of a batch in another trainer's format, on the CPU, padded on the right.

    No sequence is dropped: those outside the loss become rows without response tokens. What is given here takes precedence
    over what the batch holds.

    Args:
        name: the format, a key of `READERS`.
        batch: what the trainer holds at a step, or for formats of files a path or rows.
        groups: N group ids, integers or texts: sequences that answer one prompt have the same.
        advantages: N numbers, one for every sequence; or N lists of one number for every response token.
        tokenizer: needed for formats of texts.
        max_lengths: generation budget in tokens, one number or one for every prompt in order of first appearance.
        temperature: at which the responses were sampled. Log-probs that the trainer computed are those at its own temperature
            (`EstimateOptions.policy_temperature`), and are passed on as they are.

    Raises:
        RolloutsError: the format is unknown; the batch lacks something that no option supplied; or a field does not fit. The
            message names format and field, and the option that supplies what is missing.
    """
    reader = READERS.get(name)
    if reader is None:
        raise RolloutsError(
            f"rollouts_from: there is no format {name!r}.", fix=f"pass one of {', '.join(sorted(READERS))}."
        )
    return reader.read(batch, ReaderOptions(groups, advantages, tokenizer, max_lengths, temperature))
