"""prime-rl's packed micro batches, one or a list of them.

Read from PrimeIntellect-ai/prime-rl: ``src/prime_rl/transports/batch/types.py`` at 97d641e9,
``src/prime_rl/transport/types.py`` at e86de6cb, ``src/prime_rl/trainer/rl/data.py`` at 937753c6 and
``src/prime_rl/trainer/batch.py`` at 004274ec (packing, padding).

Everything is by token, [L] in a `MicroBatch` and [1, L] in a `TensorMicroBatch`, in the token's own column: several sequences
one after the other, then padding. ``position_ids`` begin at 0 with every sequence; newer versions have ``sequence_lengths``
too. The trainer shifts its own log-probs to the tokens' columns to compare them (``shift_tensor_right``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from entropy_fast.errors import RolloutsError
from entropy_fast.integrations.readers.fields import Fields, as_list, as_several
from entropy_fast.integrations.readers.options import Reader, ReaderOptions
from entropy_fast.integrations.readers.sequences import SampledSequence, assemble, one_temperature
from entropy_fast.rollouts import Rollouts

__all__ = ["READER"]

NAME = "prime_rl"
PADDING_ID = 1
BY_TOKEN = {
    "advantages": ("advantages",),
    "old_logprobs": ("inference_logprobs",),
    "ref_logprobs": ("ref_logprobs", "teacher_logprobs", "reference_logprobs"),
    "token_weights": ("rl_weights",),
}


def read(batch: Any, options: ReaderOptions) -> Rollouts:
    """Rollouts of the sequences in one micro batch or several, in the order in which they are packed.

    What pads a micro batch (a last sequence of the token 1 alone, outside the loss) is no sequence. A micro batch that only
    evens out the number of micro batches is one like any other: its sequences have no response token.

    Raises:
        RolloutsError: a field is missing or does not fit, or responses were sampled at several temperatures.
    """
    sequences: list[SampledSequence] = []
    temperatures: list[Tensor] = []
    for part in as_several(batch):
        fields = Fields(NAME, part)
        ids = _by_token(fields, "input_ids")
        mask = _by_token(fields, "loss_mask", len(ids)).long()
        # Streams that some micro batches of a step have and others have not are made up for below.
        numbers = {}
        for field, names in BY_TOKEN.items():
            name, value = fields.first(*names)
            if value is not None:
                numbers[field] = _by_token(fields, name, len(ids))
        if fields.get("temperatures") is not None:
            temperatures.append(_by_token(fields, "temperatures", len(ids))[mask == 1].double())
        elif fields.get("temperature") is not None and bool(mask.any()):
            temperatures.append(fields.tensor("temperature").reshape(1).double())
        for begin, end in _spans(fields, ids, mask):
            of_sequence = {field: values[begin:end] for field, values in numbers.items()}
            sequences.append(SampledSequence(ids[begin:end], mask[begin:end], of_sequence))
    temperature = options.temperature
    if temperature is None and temperatures:
        temperature = one_temperature(NAME, "temperatures", torch.cat(temperatures))
    return assemble(
        NAME,
        _with_the_same_fields(sequences),
        options,
        group_field="a micro batch keeps none",
        advantage_field="`advantages`",
        temperature=temperature,
    )


def _by_token(fields: Fields, name: str, length: int | None = None) -> Tensor:
    """[L] the field of a `MicroBatch` [L] or a `TensorMicroBatch` [1, L]."""
    value = fields.need(name)
    if name == "advantages" and isinstance(value, (list, tuple)) and value and hasattr(value[0], "values"):
        raise RolloutsError(
            f"{NAME}: `advantages` are channels by loss ({', '.join(str(getattr(v, 'loss', '?')) for v in value)}).",
            fix="pass a micro batch whose `advantages` are one channel's `values` and whose `loss_mask` is its `mask`.",
        )
    tensor = fields.tensor(name)
    flat = tensor[0] if tensor.dim() == 2 and tensor.shape[0] == 1 else tensor
    if flat.dim() != 1 or length not in (None, len(flat)):
        fields.misshapen(name, tensor.shape, [length or "L"])
    return flat


def _spans(fields: Fields, ids: Tensor, mask: Tensor) -> list[tuple[int, int]]:
    """Where the sequences of a micro batch begin and end."""
    lengths = fields.get("sequence_lengths")
    if lengths is not None:
        sizes = as_list(lengths)
        if sum(sizes) != len(ids) or any(size < 1 for size in sizes):
            raise RolloutsError(
                f"{NAME}: `sequence_lengths` are {sizes}, in all {sum(sizes)}; expected lengths of at least 1, in all "
                f"{len(ids)}, the length of `input_ids`.",
                fix="pass lengths and token ids of one micro batch.",
            )
        begins = [sum(sizes[:n]) for n in range(len(sizes))]
    else:
        positions = _by_token(fields, "position_ids", len(ids))
        begins = (positions == 0).nonzero().squeeze(-1).tolist()
        if not begins or begins[0] != 0:
            raise RolloutsError(
                f"{NAME}: `position_ids` begin with {positions[:3].tolist()}; expected 0 at the first token of every sequence.",
                fix="pass a whole micro batch, not a rank's share of it.",
            )
    spans = list(zip(begins, [*begins[1:], len(ids)], strict=True))
    begin, end = spans[-1]
    padding = not bool(mask[begin:end].any()) and bool((ids[begin:end] == PADDING_ID).all())
    return spans[:-1] if padding else spans


def _with_the_same_fields(sequences: list[SampledSequence]) -> list[SampledSequence]:
    """All of them with the fields that all have; those without a weight stream have weight 1 where others have one.

    Raises:
        RolloutsError: advantages are in some micro batches only.
    """
    everywhere = set.intersection(*(set(sequence.by_token) for sequence in sequences)) if sequences else set()
    somewhere = {name for sequence in sequences for name in sequence.by_token}
    if "advantages" in somewhere - everywhere:
        raise RolloutsError(
            f"{NAME}: some micro batches hold `advantages`, others do not.", fix="pass micro batches of one step."
        )
    if "token_weights" in somewhere - everywhere:
        sequences = [
            SampledSequence(s.tokens, s.loss_mask, {"token_weights": torch.ones(len(s.tokens)), **s.by_token})
            for s in sequences
        ]
        everywhere.add("token_weights")
    return [
        SampledSequence(s.tokens, s.loss_mask, {name: s.by_token[name] for name in s.by_token if name in everywhere})
        for s in sequences
    ]


READER = Reader(NAME, read, {"group ids": "groups", "one temperature, where sequences have several": "temperature"})
