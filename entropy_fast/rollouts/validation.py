"""Checks of the fields of `Rollouts`. Every failure names the field, what was found and what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from entropy_fast.errors import RolloutsError

PADDED_REQUIRED = ("sequences", "attention_masks", "prompt_lens")
PADDED_OPTIONAL = (
    "advantages",
    "rewards",
    "old_logprobs",
    "max_lengths",
    "temperature",
    "top_p",
    "prompts",
    "responses",
)

# Log-probs of tokens that are all but certain come out of 16-bit samplers a little above 0.
LARGEST_LOGPROB = 1e-2


def as_tensor(field: str, value: Any) -> Tensor:
    """``value`` as a tensor autograd can save (a list becomes one, an inference-mode tensor is cloned)."""
    if isinstance(value, Tensor):
        return value.detach().clone() if value.is_inference() else value.detach()
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RolloutsError(
            f"Rollouts: `{field}` cannot be made a tensor ({error}).",
            fix="pass a tensor, or a rectangular list of numbers.",
        ) from error


def token_matrix(field: str, value: Any) -> Tensor:
    """[N, T] int64 token ids."""
    tensor = as_tensor(field, value)
    if tensor.dim() != 2 or tensor.shape[0] == 0 or tensor.shape[1] == 0:
        raise RolloutsError(
            f"Rollouts: `{field}` has shape {list(tensor.shape)}; expected [N, T] with N, T >= 1.",
            fix="flatten prompts and responses to one row per sequence (Rollouts.from_dict takes [B, G, T]).",
        )
    tensor = _integers(field, tensor)
    if bool((tensor < 0).any()):
        raise RolloutsError(
            f"Rollouts: `{field}` holds {int(tensor.min())}; token ids are never negative.",
            fix="pad with the tokenizer's pad id (any valid id will do under the attention mask), not with -100.",
        )
    return tensor


def mask_matrix(field: str, value: Any, shape: torch.Size) -> Tensor:
    """A 0/1 matrix of the given shape, int64."""
    tensor = as_tensor(field, value)
    if tensor.shape != shape:
        raise RolloutsError(
            f"Rollouts: `{field}` has shape {list(tensor.shape)}, but input_ids is {list(shape)}.",
            fix="give one 0/1 entry per token; a per-response mask must be padded with zeros over the prompt.",
        )
    if not bool(((tensor == 0) | (tensor == 1)).all()):
        raise RolloutsError(
            f"Rollouts: `{field}` holds values other than 0 and 1.",
            fix="pass a 0/1 or boolean mask; per-token weights are not supported here.",
        )
    return tensor.to(torch.int64)


def check_masks(attention_mask: Tensor, loss_mask: Tensor) -> None:
    """Loss lies inside attention, no row is empty, no first token is scored."""
    outside = (loss_mask == 1) & (attention_mask == 0)
    if bool(outside.any()):
        row, column = (int(i) for i in outside.nonzero()[0])
        raise RolloutsError(
            f"Rollouts: `loss_mask` is 1 at row {row}, column {column}, where `attention_mask` is 0.",
            fix="response tokens must be attended to: clear loss_mask on padding.",
        )
    nothing = (attention_mask.sum(-1) == 0).nonzero()
    if nothing.numel():
        raise RolloutsError(
            f"Rollouts: row {int(nothing[0])} has no token at all (attention_mask is 0 everywhere).",
            fix="leave the row out.",
        )
    first = (attention_mask.cumsum(-1) == 1) & (attention_mask == 1) & (loss_mask == 1)
    if bool(first.any()):
        raise RolloutsError(
            f"Rollouts: `loss_mask` is 1 on the first token of row {int(first.nonzero()[0, 0])}; no token predicts it.",
            fix="start the prompt with at least one token (a BOS token) outside the loss mask.",
        )


def integer_vector(field: str, value: Any, length: int, meaning: str) -> Tensor:
    """[length] int64."""
    return _integers(field, _vector(field, as_tensor(field, value), length, meaning))


def float_vector(field: str, value: Any, length: int, meaning: str) -> Tensor:
    """[length] finite numbers, fp64 where given as fp64 and fp32 otherwise."""
    tensor = _vector(field, as_tensor(field, value), length, meaning)
    tensor = tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)
    if not bool(torch.isfinite(tensor).all()):
        where = int((~torch.isfinite(tensor)).nonzero()[0])
        raise RolloutsError(
            f"Rollouts: `{field}`[{where}] is {float(tensor[where])}; expected finite numbers.",
            fix="a group with zero reward spread divided by its standard deviation gives NaN: use 0 there.",
        )
    return tensor


def token_logprobs(field: str, value: Any, loss_mask: Tensor) -> Tensor:
    """[N, T] log-probs in fp64, or fp32 where given as fp32 or narrower; 0 outside the loss mask, whatever was there."""
    tensor = as_tensor(field, value)
    if tensor.shape != loss_mask.shape:
        raise RolloutsError(
            f"Rollouts: `{field}` has shape {list(tensor.shape)}, but input_ids is {list(loss_mask.shape)}.",
            fix="give one log-prob per token, in the token's own column: shifted ones [N, T - 1] lack a column in front, those "
            "of responses alone belong in the responses' columns. What stands over prompt and padding is not read.",
        )
    if not tensor.is_floating_point():
        raise RolloutsError(
            f"Rollouts: `{field}` has dtype {tensor.dtype}; expected floating-point log-probs.",
            fix="pass nats, not ids.",
        )
    wide = tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)
    kept = torch.where(loss_mask.to(wide.device) == 1, wide, 0.0)
    bad = ~torch.isfinite(kept) | (kept > LARGEST_LOGPROB)
    if bool(bad.any()):
        row, column = (int(i) for i in bad.nonzero()[0])
        raise RolloutsError(
            f"Rollouts: `{field}` is {float(kept[row, column])} at row {row}, column {column}, a response token; expected a "
            "log-prob: finite, and not above 0.",
            fix="pass log-probs in nats (not probabilities) of the sampled tokens, each in its token's own column.",
        )
    return kept


def max_lengths(value: Any, longest: Tensor, group_order: Sequence[int]) -> Tensor:
    """[B] int64 generation budgets, none below the longest response of its prompt."""
    count = len(group_order)
    if isinstance(value, int) and not isinstance(value, bool):
        value = torch.full((count,), value)
    tensor = integer_vector("max_lengths", value, count, "one budget per prompt").cpu()
    short = ((tensor < longest) | (tensor < 1)).nonzero()
    if short.numel():
        n = int(short[0])
        raise RolloutsError(
            f"Rollouts: `max_lengths` is {int(tensor[n])} for prompt {n} (group {group_order[n]}), whose longest response "
            f"has {int(longest[n])} tokens.",
            fix="pass the generation budget (max new tokens), which no response can exceed.",
        )
    return tensor


def check_sampling(temperature: float | None, top_p: float | None) -> None:
    """Temperature above 0 and top-p in (0, 1], where known."""
    if temperature is not None and not (_is_number(temperature) and math.isfinite(temperature) and temperature > 0):
        raise RolloutsError(
            f"Rollouts: `temperature` is {temperature!r}; expected a number above 0, or None when unknown.",
            fix="record the temperature the sampler used; greedy decoding gives no estimate of entropy gradients.",
        )
    if top_p is not None and not (_is_number(top_p) and 0 < top_p <= 1):
        raise RolloutsError(
            f"Rollouts: `top_p` is {top_p!r}; expected a number in (0, 1], or None when unknown.",
            fix="record the nucleus mass the sampler used (1 means the full distribution).",
        )


def texts(field: str, value: Any, count: int, unit: str) -> tuple[str, ...]:
    """`count` strings."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(item, str) for item in value):
        raise RolloutsError(
            f"Rollouts: `{field}` is not a sequence of strings.", fix=f"pass {count} strings, one per {unit}."
        )
    items = tuple(value)
    if len(items) != count:
        raise RolloutsError(
            f"Rollouts: `{field}` has {len(items)} texts for {count} {unit}s.", fix=f"pass one text per {unit}."
        )
    return items


def check_shared_prompts(ids: Tensor, attention_mask: Tensor, loss_mask: Tensor, prompt_index: Tensor) -> None:
    """Rows of one group must share the tokens before their first response token: the baseline is per prompt."""
    seen: dict[int, tuple[int, list[int]]] = {}
    before = (loss_mask.cumsum(-1) == 0) & (attention_mask == 1)
    for row, prompt in enumerate(prompt_index.tolist()):
        if not bool(loss_mask[row].any()):
            continue
        tokens = ids[row][before[row]].tolist()
        first, expected = seen.setdefault(prompt, (row, tokens))
        if tokens != expected:
            raise RolloutsError(
                f"Rollouts: rows {first} and {row} have the same group id but different prompts "
                f"({len(expected)} and {len(tokens)} prompt tokens).",
                fix="give every prompt its own group id; for the padded form check `prompt_lens` (a column, not a count).",
            )


def unpack_padded_batch(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The padded [B, G, T] form as keyword arguments of `Rollouts`."""
    missing = [key for key in PADDED_REQUIRED if key not in batch]
    unknown = [key for key in batch if key not in PADDED_REQUIRED + PADDED_OPTIONAL]
    if missing or unknown:
        found = f"is missing {missing}" if missing else f"has unknown keys {unknown}"
        raise RolloutsError(
            f"Rollouts.from_dict: the batch {found}.",
            fix=f"required keys: {', '.join(PADDED_REQUIRED)}; optional: {', '.join(PADDED_OPTIONAL)}.",
        )
    sequences = as_tensor("sequences", batch["sequences"])
    if sequences.dim() != 3:
        raise RolloutsError(
            f"Rollouts.from_dict: `sequences` has shape {list(sequences.shape)}; expected [B, G, T].",
            fix="reshape to prompts x responses x tokens; ragged groups go through Rollouts(...) with group_ids.",
        )
    b, g, t = sequences.shape
    masks = mask_matrix("attention_masks", batch["attention_masks"], sequences.shape)
    starts = integer_vector("prompt_lens", batch["prompt_lens"], b, "the column at which responses start").to(
        masks.device
    )
    if bool(((starts < 1) | (starts > t)).any()):
        raise RolloutsError(
            f"Rollouts.from_dict: `prompt_lens` is {starts.tolist()}; expected columns from 1 to T = {t}.",
            fix="pass the padded width of the prompt part, the column at which responses start.",
        )
    loss = masks * (torch.arange(t, device=masks.device) >= starts[:, None, None]).to(masks.dtype)
    fields: dict[str, Any] = {
        "input_ids": sequences.reshape(b * g, t),
        "attention_mask": masks.reshape(b * g, t),
        "loss_mask": loss.reshape(b * g, t),
        "group_ids": torch.arange(b).repeat_interleave(g),
    }
    for key in ("advantages", "rewards"):
        if batch.get(key) is not None:
            value = as_tensor(key, batch[key])
            if value.shape != (b, g):
                raise RolloutsError(
                    f"Rollouts.from_dict: `{key}` has shape {list(value.shape)}; expected [B, G] = [{b}, {g}].",
                    fix="give one number per response.",
                )
            fields[key] = value.reshape(b * g)
    if batch.get("old_logprobs") is not None:
        value = as_tensor("old_logprobs", batch["old_logprobs"])
        if value.shape != (b, g, t):
            raise RolloutsError(
                f"Rollouts.from_dict: `old_logprobs` has shape {list(value.shape)}; expected [B, G, T] = [{b}, {g}, {t}].",
                fix="give one log-prob per token, in the token's own column.",
            )
        fields["old_logprobs"] = value.reshape(b * g, t)
    others = [key for key in PADDED_OPTIONAL if key not in ("advantages", "rewards", "old_logprobs")]
    fields.update({key: batch[key] for key in others if batch.get(key) is not None})
    return fields


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _vector(field: str, tensor: Tensor, length: int, meaning: str) -> Tensor:
    if tensor.shape != (length,):
        raise RolloutsError(
            f"Rollouts: `{field}` has shape {list(tensor.shape)}; expected [{length}], {meaning}.",
            fix=f"pass a flat tensor of {length} entries.",
        )
    return tensor


def _integers(field: str, tensor: Tensor) -> Tensor:
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise RolloutsError(
            f"Rollouts: `{field}` has dtype {tensor.dtype}; expected integers.", fix="cast it to int64."
        )
    return tensor.to(torch.int64)
