"""The padded form [B, G, T] that probe scripts keep, as fields of `Rollouts`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from entropy_fast.errors import RolloutsError
from entropy_fast.rollouts.fields import TOKEN_FIELDS
from entropy_fast.rollouts.validation import PAD_LOGPROBS, as_tensor, integer_vector, mask_matrix

__all__ = ["unpack_padded_batch"]

PADDED_REQUIRED = ("sequences", "attention_masks", "prompt_lens")
PADDED_OPTIONAL = (
    "advantages",
    "rewards",
    *TOKEN_FIELDS,
    "max_lengths",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "prompts",
    "responses",
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
    sequences = as_tensor("sequences", batch["sequences"], copy=False)
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
    _check_columns(sequences, masks, starts)
    loss = masks * (torch.arange(t, device=masks.device) >= starts[:, None, None]).to(masks.dtype)
    fields: dict[str, Any] = {
        "input_ids": sequences.reshape(b * g, t),
        "attention_mask": masks.reshape(b * g, t),
        "loss_mask": loss.reshape(b * g, t),
        "group_ids": torch.arange(b).repeat_interleave(g),
    }
    for key in ("advantages", "rewards"):
        if batch.get(key) is not None:
            value = as_tensor(key, batch[key], copy=False)
            if key == "advantages" and value.shape == (b, g, t):
                fields[key] = value.reshape(b * g, t)
                continue
            if value.shape != (b, g):
                raise RolloutsError(
                    f"Rollouts.from_dict: `{key}` has shape {list(value.shape)}; expected [B, G] = [{b}, {g}].",
                    fix="give one number per response.",
                )
            fields[key] = value.reshape(b * g)
    for key in TOKEN_FIELDS:
        if batch.get(key) is None:
            continue
        value = as_tensor(key, batch[key], copy=False)
        if value.shape != (b, g, t):
            raise RolloutsError(
                f"Rollouts.from_dict: `{key}` has shape {list(value.shape)}; expected [B, G, T] = [{b}, {g}, {t}].",
                fix=f"give one number per token, in the token's own column; {PAD_LOGPROBS} (after flattening [B, G] to N).",
            )
        fields[key] = value.reshape(b * g, t)
    others = [key for key in PADDED_OPTIONAL if key not in ("advantages", "rewards", *TOKEN_FIELDS)]
    fields.update({key: batch[key] for key in others if batch.get(key) is not None})
    return fields


def _check_columns(sequences: Tensor, masks: Tensor, starts: Tensor) -> None:
    """Raise where ``prompt_lens`` holds counts of prompt tokens beside left padding, or cuts rows of a prompt differently.

    Without left padding the two are one. With it, counts would take a prompt's last tokens for a response's first. Padders
    bring prompts of different lengths to one width, so columns are the same for all prompts; where they are not, or where all
    prompts are equally long, tokens decide: were they counts, the responses to a prompt would have the tokens in common that
    columns take for responses.
    """
    b, g, t = sequences.shape
    columns = torch.arange(t, device=masks.device)
    padding = torch.where(masks.any(-1), masks.argmax(-1), t)  # [B, G]: columns before the first token
    left = padding.amin(-1)
    attended = (masks == 1) & (columns < starts[:, None, None])
    counts = attended.sum(-1)
    answered = ((masks == 1) & (columns >= starts[:, None, None])).any(-1)
    for n in range(b):
        different = sorted(set(counts[n][answered[n]].tolist()))
        if len(different) > 1:
            raise RolloutsError(
                f"Rollouts.from_dict: `prompt_lens` is {int(starts[n])} for prompt {n}, and before that column its rows have "
                f"{different} tokens; expected one prompt.",
                fix="pad the rows of a prompt alike, or give rows with group ids to Rollouts(...).",
            )
    one_width = bool((starts == starts[0]).all())
    if not bool((left > 0).any()) or (one_width and not bool((left == left[0]).all())):
        return
    ends = left + starts
    one_end = not one_width and bool((ends == ends[0]).all())
    if (
        bool((ends < t).all())
        and (one_end or g > 1)
        and all(_shared_up_to(sequences[n], masks[n], int(left[n]), int(ends[n])) for n in range(b))
    ):
        raise RolloutsError(
            f"Rollouts.from_dict: `prompt_lens` is {starts.tolist()}, which look like counts of prompt tokens: beside left "
            f"padding of {left.tolist()} columns, all responses to a prompt would agree in their first tokens. Expected is the "
            "column at which responses start.",
            fix=f"pass {ends.tolist()} if they are counts (left padding plus count); if they are columns, first drop those "
            "that are padding in every row.",
        )


def _shared_up_to(ids: Tensor, mask: Tensor, begin: int, end: int) -> bool:
    """Whether all rows [G, T] have tokens in columns ``begin`` to ``end``, the same ones."""
    return bool((mask[:, begin:end] == 1).all()) and bool((ids[:, begin:end] == ids[:1, begin:end]).all())
