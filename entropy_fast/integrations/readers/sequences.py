"""Sequences without padding, which every reader makes of its format, and `Rollouts` of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from entropy_fast.errors import RolloutsError
from entropy_fast.integrations.readers.fields import as_list
from entropy_fast.integrations.readers.options import ReaderOptions, lacking
from entropy_fast.rollouts import Rollouts

__all__ = [
    "SampledSequence",
    "assemble",
    "in_last_columns",
    "join_prompt_and_response",
    "one_temperature",
    "unpadded_rows",
]


@dataclasses.dataclass(frozen=True)
class SampledSequence:
    """One prompt and response, L tokens.

    Attributes:
        tokens: [L] token ids.
        loss_mask: [L] 0/1, 1 at response tokens.
        by_token: numbers [L] by field of `Rollouts` (``advantages`` too), each in its token's own column; what stands
            outside the loss mask is not read.
    """

    tokens: Tensor
    loss_mask: Tensor
    by_token: Mapping[str, Tensor]


def in_last_columns(values: Tensor, width: int) -> Tensor:
    """[N, width] with ``values`` [N, A] in the last A columns and zeros before.

    So are all fields laid out that cover the end of a sequence: the A columns of a response, or all tokens but the first.
    """
    return pad(values, (width - values.shape[1], 0))


def unpadded_rows(
    reader: str, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor, by_token: Mapping[str, Tensor]
) -> list[SampledSequence]:
    """The rows of rectangles [N, T] without what the attention mask leaves out.

    Raises:
        RolloutsError: a token counts in the loss and is not attended to.
    """
    kept = attention_mask != 0
    outside = (loss_mask != 0) & ~kept
    if bool(outside.any()):
        row, column = (int(i) for i in outside.nonzero()[0])
        raise RolloutsError(
            f"{reader}: the response mask is set at row {row}, column {column} of the whole sequences, where "
            "`attention_mask` is 0.",
            fix="pass masks and token ids of the same batch.",
        )
    return [
        SampledSequence(ids[keep], mask[keep], {name: numbers[row][keep] for name, numbers in by_token.items()})
        for row, (ids, mask, keep) in enumerate(zip(input_ids, loss_mask, kept, strict=True))
    ]


def join_prompt_and_response(tokens: Tensor, loss_mask: Tensor, by_response: Mapping[str, Tensor]) -> SampledSequence:
    """A sequence of ``tokens`` [L] whose last R are the response; mask and numbers [R] are of those."""
    before = len(tokens) - len(loss_mask)
    return SampledSequence(
        tokens, pad(loss_mask, (before, 0)), {name: pad(numbers, (before, 0)) for name, numbers in by_response.items()}
    )


def one_temperature(reader: str, field: str, temperatures: Tensor) -> float | None:
    """The temperature that all tokens [M] were sampled at; None of no tokens.

    Raises:
        RolloutsError: there are several.
    """
    found = sorted(set(temperatures.tolist()))
    if len(found) > 1:
        raise RolloutsError(
            f"{reader}: `{field}` holds {len(found)} temperatures at response tokens, from {found[0]:g} to {found[-1]:g}; "
            "Rollouts have one.",
            fix="read sequences of one temperature at a time, or pass `temperature`, which is recorded for all of them.",
        )
    return float(found[0]) if found else None


def assemble(
    reader: str,
    sequences: Sequence[SampledSequence],
    options: ReaderOptions,
    *,
    group_ids: Any = None,
    group_field: str,
    advantages: Any = None,
    advantage_field: str,
    rewards: Any = None,
    temperature: float | None = None,
    prompts: Sequence[str] | None = None,
    responses: Sequence[str] | None = None,
) -> Rollouts:
    """Rollouts of N sequences, padded on the right, with what the caller gave in the place of what the batch holds.

    Args:
        reader: the name of the format, for messages.
        sequences: N of them. Advantages may be among their ``by_token``.
        options: what the caller gave.
        group_ids: N integers or texts, where the batch has them.
        group_field: where the format would hold them, for messages.
        advantages: N numbers, where the batch has them by sequence.
        advantage_field: where the format would hold them or rewards, for messages.
        rewards: N numbers, where the batch has them.
        temperature: of the sampler, where the batch says.
        prompts: texts, one per sequence.
        responses: texts, one per sequence.

    Raises:
        RolloutsError: the batch lacks group ids, or advantages and rewards, and so does the caller; or it does not fit.
    """
    if not sequences:
        raise RolloutsError(f"{reader}: the batch holds no sequence.", fix="pass a batch with at least one.")
    if any(len(sequence.tokens) == 0 for sequence in sequences):
        empty = next(row for row, sequence in enumerate(sequences) if len(sequence.tokens) == 0)
        raise RolloutsError(f"{reader}: sequence {empty} has no token at all.", fix="leave it out of the batch.")
    groups = group_ids if options.groups is None else options.groups
    if groups is None:
        raise lacking(reader, "group ids", group_field, "groups")
    fields: dict[str, Any] = {
        "input_ids": _padded([sequence.tokens.to(torch.int64) for sequence in sequences]),
        "attention_mask": _padded([torch.ones(len(sequence.tokens), dtype=torch.int64) for sequence in sequences]),
        "loss_mask": _padded([sequence.loss_mask.to(torch.float64) for sequence in sequences]),
        "group_ids": _group_numbers(reader, groups, len(sequences)),
    }
    for name in sequences[0].by_token:
        fields[name] = _padded([sequence.by_token[name] for sequence in sequences])
    by_token = fields.pop("advantages", None)
    if options.advantages is not None:
        fields["advantages"] = _given_advantages(reader, options.advantages, fields["loss_mask"])
    elif by_token is not None:
        fields["advantages"] = _by_sequence_where_constant(by_token, fields["loss_mask"])
    elif advantages is not None:
        fields["advantages"] = advantages
    elif rewards is None:
        raise lacking(reader, "advantages and no rewards", advantage_field, "advantages")
    fields["rewards"] = rewards
    fields["max_lengths"] = options.max_lengths
    fields["temperature"] = temperature if options.temperature is None else options.temperature
    if prompts is not None:
        ids = fields["group_ids"].tolist()
        fields["prompts"] = [prompts[ids.index(group)] for group in dict.fromkeys(ids)]
    return Rollouts(**fields, responses=responses)


def _padded(rows: list[Tensor]) -> Tensor:
    return pad_sequence(rows, batch_first=True)


def _group_numbers(reader: str, groups: Any, count: int) -> Tensor:
    """[N] int64: integers as they are; texts numbered in order of first appearance."""
    found = [getattr(group, "item", lambda group=group: group)() for group in as_list(groups)]
    if len(found) != count:
        raise RolloutsError(
            f"{reader}: there are {len(found)} group ids for {count} sequences.",
            fix="give every sequence one group id.",
        )
    for row, group in enumerate(found):
        if isinstance(group, bool) or not isinstance(group, (int, str)):
            raise RolloutsError(
                f"{reader}: the group id of sequence {row} is a {type(group).__name__}; expected an integer or a text.",
                fix="pass `groups`: integers or texts, the same for sequences that answer one prompt.",
            )
    if any(isinstance(group, str) for group in found):
        numbers = {group: number for number, group in enumerate(dict.fromkeys(found))}
        found = [numbers[group] for group in found]
    return torch.tensor(found, dtype=torch.int64)


def _given_advantages(reader: str, given: Any, loss_mask: Tensor) -> Tensor:
    """The caller's advantages: [N], or [N, T] of N lists with a number for every response token."""
    values = as_list(given)
    if len(values) != len(loss_mask):
        raise RolloutsError(
            f"{reader}: `advantages` has {len(values)} entries for {len(loss_mask)} sequences.",
            fix="give one number for every sequence, or one list of numbers by response token.",
        )
    if not any(hasattr(value, "__len__") for value in values):
        return torch.tensor(values, dtype=torch.float64)
    by_token = torch.zeros(loss_mask.shape, dtype=torch.float64)
    for row, (value, mask) in enumerate(zip(values, loss_mask == 1, strict=True)):
        numbers = torch.as_tensor(value, dtype=torch.float64)
        if numbers.shape != (int(mask.sum()),):
            raise RolloutsError(
                f"{reader}: `advantages` of sequence {row} has shape {list(numbers.shape)}; expected [{int(mask.sum())}], its "
                "response tokens.",
                fix="give one number for every response token, in order.",
            )
        by_token[row, mask] = numbers
    return _by_sequence_where_constant(by_token, loss_mask)


def _by_sequence_where_constant(by_token: Tensor, loss_mask: Tensor) -> Tensor:
    """[N] where every response has one advantage for all its tokens, 0 for one without tokens; else [N, T]."""
    mask = loss_mask == 1
    numbers = by_token.to(torch.promote_types(by_token.dtype, torch.float32))
    low = torch.where(mask, numbers, torch.inf).amin(-1)
    high = torch.where(mask, numbers, -torch.inf).amax(-1)
    empty = ~mask.any(-1)
    if bool(((low == high) | empty).all()):
        return torch.where(empty, 0.0, high)
    return torch.where(mask, numbers, 0.0)
