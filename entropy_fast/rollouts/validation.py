"""Checks of the fields of `Rollouts`. Every failure names the field, what was found and what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from entropy_fast.errors import RolloutsError
from entropy_fast.scalars import as_number

# Log-probs of tokens that are all but certain come out of 16-bit samplers a little above 0.
LARGEST_LOGPROB = 1e-2

# A coefficient times a gradient in fp32 must neither overflow nor vanish.
LARGEST_MAGNITUDE = 1e38
SMALLEST_ADVANTAGE = 1e-37

# What files hold.
LARGEST_TOP_K = 2**63 - 1

# Prompts, responses, tokens.
DEEPEST = 3

PAD_LOGPROBS = (
    "where they are of the responses alone: full = torch.zeros(loss_mask.shape, dtype=torch.float64); full[loss_mask.bool()] = "
    "torch.cat([row[:n] for row, n in zip(given, loss_mask.sum(-1))]).double()"
)


def as_tensor(field: str, value: Any, *, copy: bool = True) -> Tensor:
    """``value`` as a dense tensor without a graph; a copy, so that nothing done to ``value`` later reaches it.

    A copy is also what autograd needs of a tensor made in inference mode.

    Raises:
        RolloutsError: it is not a rectangle of numbers, or holds no values (a meta tensor).
    """
    try:
        if isinstance(value, list) and _depth_passes(value, DEEPEST):
            raise TypeError(f"its lists are nested more than {DEEPEST} deep")
        tensor = value.detach() if isinstance(value, Tensor) else torch.as_tensor(value)
        if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise TypeError("it is nested, sparse, quantised or on the device meta")
        return tensor.clone() if copy else tensor
    except (TypeError, ValueError, RuntimeError, OverflowError, RecursionError) as error:
        raise RolloutsError(
            f"Rollouts: `{field}` cannot be made a tensor ({error}).",
            fix="pass a tensor (a dense one), or a rectangular list of numbers.",
        ) from error


def _depth_passes(value: list[Any], deepest: int) -> bool:
    """Whether lists stand deeper in one another; torch follows one that holds itself until the process ends."""
    inner = [item for item in value if isinstance(item, list)]
    return bool(inner) and (deepest == 1 or any(_depth_passes(item, deepest - 1) for item in inner))


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
    if tensor.is_complex() or not bool(((tensor == 0) | (tensor == 1)).all()):
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
    if tensor.dtype == torch.bool or tensor.is_complex():
        raise RolloutsError(
            f"Rollouts: `{field}` has dtype {tensor.dtype}; expected real numbers.",
            fix="cast it to float32 or float64.",
        )
    tensor = tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)
    if not bool(torch.isfinite(tensor).all()):
        where = int((~torch.isfinite(tensor)).nonzero()[0])
        raise RolloutsError(
            f"Rollouts: `{field}`[{where}] is {float(tensor[where])}; expected finite numbers.",
            fix="a group with zero reward spread divided by its standard deviation gives NaN: use 0 there.",
        )
    return tensor


def check_magnitudes(
    field: str, values: Tensor, group_ids: Tensor, *, smallest: float = 0.0, made_from: str = ""
) -> None:
    """Raise where a number is so large that sums or squares overflow, or (0 aside) so small that products vanish.

    Args:
        field: what the numbers are.
        values: [N] finite numbers.
        group_ids: [N].
        smallest: the largest |number| that counts as too small.
        made_from: the field they come from, where they were not given.
    """
    size = values.abs()
    bad = ((size >= LARGEST_MAGNITUDE) | ((size > 0) & (size <= smallest))).nonzero()
    if bad.numel():
        row = int(bad[0])
        source = f" (made from `{made_from}`)" if made_from else ""
        problem = "overflow" if float(size[row]) >= LARGEST_MAGNITUDE else "vanish in 32-bit floats"
        raise RolloutsError(
            f"Rollouts: `{field}`[{row}]{source} is {float(values[row]):.6g} (group {int(group_ids[row])}): sums and products "
            f"of such numbers {problem}.",
            fix=f"give {made_from or field} of the order of 1, and an exact 0 for none; between {SMALLEST_ADVANTAGE:g} and "
            f"{LARGEST_MAGNITUDE:g} in size is taken.",
        )


def token_logprobs(field: str, value: Any, loss_mask: Tensor) -> Tensor:
    """[N, T] log-probs in fp64, or fp32 where given as fp32 or narrower; 0 outside the loss mask, whatever was there."""
    tensor = as_tensor(field, value)
    if tensor.shape != loss_mask.shape:
        raise RolloutsError(
            f"Rollouts: `{field}` has shape {list(tensor.shape)}, but input_ids is {list(loss_mask.shape)}.",
            fix="give one log-prob per token, in the token's own column (what stands over prompt and padding is not read): "
            f"shifted ones [N, T - 1] lack a column in front; {PAD_LOGPROBS}.",
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


def token_numbers(field: str, value: Any, loss_mask: Tensor) -> Tensor:
    """[N, T] finite numbers, fp64; 0 outside the loss mask, whatever was there."""
    tensor = as_tensor(field, value)
    if tensor.shape != loss_mask.shape or tensor.is_complex():
        raise RolloutsError(
            f"Rollouts: `{field}` has shape {list(tensor.shape)} and dtype {tensor.dtype}; expected real numbers in the shape "
            f"of input_ids, {list(loss_mask.shape)}.",
            fix=f"give one number per token, in the token's own column; {PAD_LOGPROBS}.",
        )
    kept = torch.where(loss_mask.to(tensor.device) == 1, tensor.to(torch.float64), 0.0)
    bad = ~torch.isfinite(kept) | (kept.abs() >= LARGEST_MAGNITUDE)
    if bool(bad.any()):
        row, column = (int(i) for i in bad.nonzero()[0])
        raise RolloutsError(
            f"Rollouts: `{field}` is {float(kept[row, column])} at row {row}, column {column}, a response token.",
            fix=f"pass finite numbers below {LARGEST_MAGNITUDE:g} in size.",
        )
    return kept


def by_token(field: str, value: Any, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
    """[N] the largest |number| of every row, and [N, T] the numbers as shares of it; both fp64."""
    numbers = token_numbers(field, value, loss_mask)
    largest = numbers.abs().amax(-1)
    return largest, numbers / torch.where(largest > 0, largest, 1.0).unsqueeze(-1)


def max_lengths(value: Any, longest: Tensor, group_order: Sequence[int]) -> Tensor:
    """[B] int64 generation budgets, none below the longest response of its prompt."""
    count = len(group_order)
    tensor = as_tensor("max_lengths", value)
    if tensor.dim() == 0 and tensor.dtype != torch.bool:
        tensor = tensor.repeat(count)
    tensor = integer_vector("max_lengths", tensor, count, "one budget per prompt").cpu()
    short = ((tensor < longest) | (tensor < 1)).nonzero()
    if short.numel():
        n = int(short[0])
        raise RolloutsError(
            f"Rollouts: `max_lengths` is {int(tensor[n])} for prompt {n} (group {group_order[n]}), whose longest response "
            f"has {int(longest[n])} tokens.",
            fix="pass the generation budget (max new tokens), which no response can exceed.",
        )
    return tensor


def temperature(value: object) -> float | None:
    """The number above 0; None when unknown."""
    number = as_number(value)
    if value is not None and (number is None or not (math.isfinite(number) and number > 0)):
        raise RolloutsError(
            f"Rollouts: `temperature` is {_shown(value)}; expected a number above 0, or None when unknown.",
            fix="record the temperature the sampler used; greedy decoding gives no estimate of entropy gradients.",
        )
    return None if number is None else float(number)


def top_p(value: object) -> float | None:
    """The number in (0, 1]; None when unknown."""
    number = as_number(value)
    if value is not None and (number is None or not 0 < number <= 1):
        raise RolloutsError(
            f"Rollouts: `top_p` is {_shown(value)}; expected a number in (0, 1], or None when unknown.",
            fix="record the nucleus mass the sampler used (1 means the full distribution).",
        )
    return None if number is None else float(number)


def top_k(value: object) -> int | None:
    """The integer of at least 1; None when unknown, and for 0 and -1, which samplers take for "off"."""
    number = as_number(value)
    if value is not None and (not isinstance(number, int) or not -1 <= number <= LARGEST_TOP_K):
        raise RolloutsError(
            f"Rollouts: `top_k` is {_shown(value)}; expected an integer of at least 1, or None, 0 or -1 when off.",
            fix="record how many of the most probable tokens the sampler kept (0 means all of them).",
        )
    return None if number is None or number < 1 else int(number)


def min_p(value: object) -> float | None:
    """The number in [0, 1); None when unknown."""
    number = as_number(value)
    if value is not None and (number is None or not 0 <= number < 1):
        raise RolloutsError(
            f"Rollouts: `min_p` is {_shown(value)}; expected a number in [0, 1), or None when unknown.",
            fix="record the share of the largest probability that the sampler kept tokens from (0 means all of them).",
        )
    return None if number is None else float(number)


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


def check_shared_prompts(
    ids: Tensor, attention_mask: Tensor, loss_mask: Tensor, prompt_index: Tensor
) -> tuple[int, ...]:
    """Rows of one group must begin with the same tokens, up to the earliest response token of any: the baseline is per prompt.

    A response may begin with tokens that are not scored (a forced beginning, what a tool returned), so the loss mask of one
    row says nothing about where the prompt ends; that of the group says where it ends at the latest. Rows without response
    tokens are not compared.

    Returns:
        Prompt indices of the groups in which the loss mask begins at different places.

    Raises:
        RolloutsError: two rows of a group differ before that.
    """
    scored = loss_mask.any(-1).tolist()
    unscored = ((loss_mask.cumsum(-1) == 0) & (attention_mask == 1)).sum(-1).tolist()
    rows_of: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompt_index.tolist()):
        if scored[row]:
            rows_of.setdefault(prompt, []).append(row)
    uneven = []
    for prompt, rows in rows_of.items():
        length = min(unscored[row] for row in rows)
        if any(unscored[row] != length for row in rows):
            uneven.append(prompt)
        first, *others = rows
        expected = ids[first][attention_mask[first] == 1][:length]
        for row in others:
            if not torch.equal(ids[row][attention_mask[row] == 1][:length], expected):
                raise RolloutsError(
                    f"Rollouts: rows {first} and {row} have the same group id but different prompts (tokens differ before "
                    f"the first response token of the group, the {length + 1}th of its row; {unscored[first]} and "
                    f"{unscored[row]} tokens come before that of these rows).",
                    fix="give every prompt its own group id; for the padded form check `prompt_lens` (a column, not a count).",
                )
    return tuple(uneven)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


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
