"""open-instruct's packs, as `PackedSequences` or as the `CollatedBatchData` of a worker, one or a list of them.

Read from allenai/open-instruct: ``open_instruct/rl_utils.py`` at 00feb3a5, ``open_instruct/data_types.py`` at 0051d7f6;
and a stored ``open_instruct/data_loader.py`` of an unknown commit (advantages, padding, collation).

Lists of packs, [L] each, or [b, L] padded on the right after collation; everything is by token, in the token's own column.
``attention_masks`` number the sequences of a pack from 1, and are 0 at padding. ``response_masks`` hold at response tokens the
number of the response in the step, from 1: collation shuffles packs, and this is what group ids can be given by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from entropy_fast.errors import RolloutsError
from entropy_fast.integrations.readers.fields import Fields, as_list, as_several
from entropy_fast.integrations.readers.options import Reader, ReaderOptions, lacking
from entropy_fast.integrations.readers.sequences import SampledSequence, assemble
from entropy_fast.rollouts import Rollouts

__all__ = ["READER"]

NAME = "open_instruct"
BY_TOKEN = {"advantages": "advantages", "old_logprobs": "vllm_logprobs"}


def read(batch: Any, options: ReaderOptions) -> Rollouts:
    """Rollouts of all sequences, pack by pack.

    Groups and advantages of the caller are those of all responses of the step, in the order before they were packed: the
    response numbers in ``response_masks`` find them. Where masks hold no numbers (but 0 and 1), they are those of the sequences
    in the order in which they are packed. A sequence without response tokens that only fills up a rank is a group of its own.

    Raises:
        RolloutsError: a field is missing or does not fit.
    """
    sequences: list[SampledSequence] = []
    numbers: list[int | None] = []
    for part in as_several(batch):
        fields = Fields(NAME, part)
        for pack in _packs(fields):
            found = _sequences_of_pack(pack)
            sequences += [sequence for sequence, _ in found]
            numbers += _numbers_of_pack([number for _, number in found])
    if options.groups is None:
        raise lacking(NAME, "group ids", "packs keep none", "groups")
    known = [number for number in numbers if number is not None]
    if len(set(known)) < len(known):
        numbers = [row + 1 for row in range(len(sequences))]
    given = as_list(options.groups)
    groups = _of_numbers("groups", given, numbers, lambda row: f"without a response: {row}")
    advantages = None
    if options.advantages is not None:
        values = as_list(options.advantages)
        empty: Any = [] if values and hasattr(values[0], "__len__") else 0.0
        advantages = _of_numbers("advantages", values, numbers, lambda _: empty)
    own = ReaderOptions(groups, advantages, None, options.max_lengths, options.temperature)
    return assemble(NAME, sequences, own, group_field="packs keep none", advantage_field="`advantages`")


def _packs(fields: Fields) -> list[dict[str, Tensor]]:
    """The packs, one [L] tensor by field each."""
    columns: dict[str, list[Tensor]] = {}
    for name in ("query_responses", "attention_masks", "response_masks", *BY_TOKEN.values()):
        if name in BY_TOKEN.values() and fields.get(name) is None:
            continue
        tensors = [fields.tensor(name, value) for value in as_several(fields.need(name))]
        columns[name] = [row for tensor in tensors for row in (tensor if tensor.dim() == 2 else [tensor])]
        found, expected = ([len(row) for row in columns[key]] for key in (name, "query_responses"))
        if found != expected:
            fields.misshapen(name, found, expected)
    return [{name: rows[pack] for name, rows in columns.items()} for pack in range(len(columns["query_responses"]))]


def _sequences_of_pack(pack: dict[str, Tensor]) -> list[tuple[SampledSequence, int | None]]:
    """The sequences of a pack, and the number in the step of the response of each; None without a response token."""
    found = []
    segments = pack["attention_masks"].long()
    for segment in sorted(set(segments[segments > 0].tolist())):
        here = segments == segment
        response = pack["response_masks"][here].long()
        responses = sorted(set(response[response > 0].tolist()))
        if len(responses) > 1:
            raise RolloutsError(
                f"{NAME}: sequence {segment} of a pack holds tokens of the responses {responses}; expected one.",
                fix="pass `attention_masks` and `response_masks` of the same packs.",
            )
        by_token = {field: pack[name][here] for field, name in BY_TOKEN.items() if name in pack}
        sequence = SampledSequence(pack["query_responses"][here], (response > 0).long(), by_token)
        found.append((sequence, responses[0] if responses else None))
    return found


def _numbers_of_pack(numbers: list[int | None]) -> list[int | None]:
    """With those of sequences whose tokens are all masked: responses are packed in the order of their numbers."""
    first = next((number - row for row, number in enumerate(numbers) if number is not None), None)
    return [number if first is None or number is not None else first + row for row, number in enumerate(numbers)]


def _of_numbers(name: str, given: list[Any], numbers: list[int | None], filler: Callable[[int], Any]) -> list[Any]:
    most = max((number for number in numbers if number is not None), default=0)
    if len(given) < most:
        raise RolloutsError(
            f"{NAME}: `{name}` has {len(given)} entries, and the packs hold response {most}.",
            fix="give one for every response of the step, in the order before they were packed.",
        )
    return [filler(row) if number is None else given[number - 1] for row, number in enumerate(numbers)]


READER = Reader(
    NAME,
    read,
    {
        "group ids": "groups",
        "advantages, before they are computed": "advantages",
        "the sampling temperature": "temperature",
    },
)
