"""verl's `DataProto`, and the jagged TensorDict that its workers and its newer trainer hold.

Read from verl 0.9.1 (PyPI): ``verl/protocol.py``, ``verl/trainer/ppo/ray_trainer.py``, ``verl/trainer/ppo/v1/trainer_base.py``,
``verl/workers/utils/padding.py``; and volcengine/verl at 00401103, ``verl/trainer/ppo/ray_trainer.py``.

Padded: ``input_ids`` [N, T] are prompts, padded on the left, and then ``responses`` [N, R], padded on the right; what is of
responses ([N, R]) holds in column j what belongs to the token in column T - R + j. Jagged: nested ``input_ids`` (or ``prompts``
and ``responses``) without padding; what is of responses holds the response tokens alone, nested or padded on the right.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from entropy_fast.errors import RolloutsError
from entropy_fast.integrations.readers.fields import Fields
from entropy_fast.integrations.readers.options import Reader, ReaderOptions
from entropy_fast.integrations.readers.sequences import (
    SampledSequence,
    assemble,
    in_last_columns,
    join_prompt_and_response,
    unpadded_rows,
)
from entropy_fast.rollouts import Rollouts
from entropy_fast.scalars import as_number

__all__ = ["READER"]

NAME = "verl"
REWARDS = ("token_level_rewards", "token_level_scores", "rm_scores")
# By field of Rollouts, the fields that may hold it, the preferred one first.
BY_RESPONSE = {
    "old_logprobs": ("old_log_probs", "rollout_log_probs"),
    "ref_logprobs": ("ref_log_prob",),
    "advantages": ("advantages",),
    "token_weights": ("rollout_is_weights",),
}


def read(batch: Any, options: ReaderOptions) -> Rollouts:
    """Rollouts of a `DataProto` (``batch``, ``non_tensor_batch``, ``meta_info``), or of a mapping with all fields in one.

    Raises:
        RolloutsError: a field is missing or does not fit.
    """
    held = None if hasattr(batch, "keys") else getattr(batch, "batch", None)
    fields = Fields(NAME, batch if held is None else held)
    others = [Fields(NAME, getattr(batch, name, None) or {}) for name in ("non_tensor_batch", "meta_info")]
    uid, temperature = (
        next((value for source in (*others, fields) if (value := source.get(name)) is not None), None)
        for name in ("uid", "temperature")
    )
    jagged = any(getattr(fields.get(name), "is_nested", False) for name in ("input_ids", "responses"))
    sequences, rewards = (_jagged if jagged else _padded)(fields)
    return assemble(
        NAME,
        sequences,
        options,
        group_ids=uid,
        group_field="`non_tensor_batch['uid']`",
        advantage_field="`advantages`, `token_level_rewards`, `token_level_scores` or `rm_scores`",
        rewards=rewards,
        temperature=None if temperature is None else as_number(temperature),
    )


def _padded(fields: Fields) -> tuple[list[SampledSequence], Tensor | None]:
    ids = fields.matrix("input_ids")
    rows, width = ids.shape
    attention = fields.matrix("attention_mask", rows, width)
    name, value = fields.first("response_mask", "responses")
    size = fields.matrix(name, rows, value=value).shape[1]
    if size > width:
        fields.misshapen(name, [rows, size], [rows, f"at most {width}"])
    responses = fields.optional_matrix("responses", rows, size)
    real = attention[:, width - size :] != 0
    if responses is not None and not torch.equal(responses[real], ids[:, width - size :][real]):
        raise RolloutsError(
            f"{NAME}: `responses` [{rows}, {size}] are not the last {size} columns of `input_ids` [{rows}, {width}].",
            fix="pass both of one batch: `input_ids` hold prompts and then responses.",
        )
    # Where a batch has no response mask, verl takes the attention mask's part over responses.
    mask = fields.optional_matrix("response_mask", rows, size)
    mask = real.long() if mask is None else mask
    by_token = {}
    for field, names in BY_RESPONSE.items():
        name, value = fields.first(*names)
        if value is not None:
            by_token[field] = in_last_columns(fields.matrix(name, rows, size), width)
    name, value = fields.first(*REWARDS)
    rewards = None if value is None else fields.matrix(name, rows, size).double().sum(-1)
    return unpadded_rows(NAME, ids, attention, in_last_columns(mask, width), by_token), rewards


def _jagged(fields: Fields) -> tuple[list[SampledSequence], Tensor | None]:
    tokens, lengths = _whole_sequences(fields)

    def of_responses(name: str) -> list[Tensor]:
        value = fields.get(name)
        if getattr(value, "is_nested", False):
            parts = _parts(value)
        else:
            parts = [row[:length] for row, length in zip(fields.matrix(name), lengths, strict=False)]
        found = [len(part) for part in parts]
        if found != lengths:
            fields.misshapen(name, found, [f"the response lengths {lengths}"])
        return parts

    masks = (
        [torch.ones(length, dtype=torch.int64) for length in lengths]
        if fields.get("response_mask") is None
        else of_responses("response_mask")
    )
    by_response: dict[str, list[Tensor]] = {}
    for field, names in BY_RESPONSE.items():
        name, value = fields.first(*names)
        if value is not None:
            by_response[field] = of_responses(name)
    sequences = [
        join_prompt_and_response(tokens[row], masks[row], {name: parts[row] for name, parts in by_response.items()})
        for row in range(len(tokens))
    ]
    name, value = fields.first(*REWARDS)
    rewards = None if value is None else torch.stack([part.double().sum() for part in of_responses(name)])
    return sequences, rewards


def _whole_sequences(fields: Fields) -> tuple[list[Tensor], list[int]]:
    """N tensors of tokens, and how many tokens at the end of each are the response."""
    ids, responses = fields.get("input_ids"), fields.get("responses")
    if getattr(responses, "is_nested", False):
        answers = _parts(responses)
        prompts = None if ids is not None else _parts(fields.need("prompts"))
        tokens = (
            _parts(ids)
            if prompts is None
            else [torch.cat([prompt, answer]) for prompt, answer in zip(prompts, answers, strict=True)]
        )
        for row, (whole, answer) in enumerate(zip(tokens, answers, strict=True)):
            if not torch.equal(whole[len(whole) - len(answer) :], answer):
                raise RolloutsError(
                    f"{NAME}: `responses` of sequence {row} are not the end of its `input_ids`.",
                    fix="pass both of one batch.",
                )
        return tokens, [len(answer) for answer in answers]
    # The form of the workers: `input_ids` lost their padding, masks kept it. Responses are the last columns of the mask.
    tokens = _parts(ids)
    name, value = fields.first("response_mask", "responses")
    size = fields.matrix(name, len(tokens), value=value).shape[1]
    attention = fields.matrix("attention_mask", len(tokens))
    lengths = (attention != 0)[:, attention.shape[1] - size :].sum(-1).tolist()
    found = (attention != 0).sum(-1).tolist()
    if found != [len(whole) for whole in tokens]:
        fields.misshapen("input_ids", [len(whole) for whole in tokens], [f"the attended lengths {found}"])
    return tokens, lengths


def _parts(nested: Tensor) -> list[Tensor]:
    return [part.detach().cpu() for part in nested.unbind()]


READER = Reader(
    NAME, read, {"group ids, where `uid` is not there": "groups", "advantages, before they are computed": "advantages"}
)
