"""Rows of one batch that a trainer has spread over ranks, brought together: tokens and numbers are exchanged, no gradients."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from entropy_fast.distributed.collectives import most_of, rows_of, texts_of
from entropy_fast.distributed.team import Team, joined
from entropy_fast.errors import DistributedError, RolloutsError
from entropy_fast.rollouts import Rollouts

__all__ = ["GatheredRows", "gather_rows"]

SAMPLING = ("temperature", "top_p", "top_k", "min_p")
_OF_ROWS = ("group_ids", "advantages", "rewards")
_OF_TOKENS = ("input_ids", "attention_mask", "loss_mask", "old_logprobs", "ref_logprobs", "token_weights")
_TABLE, _BUDGET, _ORDER = "table ", "budget", "order"
# What these hold fits less: they are sent as this.
_SENT_AS = {"input_ids": torch.int32, "attention_mask": torch.uint8, "loss_mask": torch.uint8}


@dataclasses.dataclass(frozen=True)
class GatheredRows:
    """The whole batch, the same on all ranks.

    Attributes:
        rollouts: all rows.
        tables: what was given with the rows, by name, ``[N, ...]`` in their order; CPU.
    """

    rollouts: Rollouts
    tables: Mapping[str, Tensor]


def gather_rows(
    own: Rollouts | None,
    tables: Mapping[str, Tensor] | None = None,
    *,
    order: Tensor | None = None,
    seconds: float = 600.0,
    team: Team | None = None,
) -> GatheredRows:
    """The rows of all ranks as one batch, for a forecast by all of them (``RunOptions(ranks="all")``).

    Every rank of the default process group calls it. Group ids have to be global: rows of one id answer one prompt, on
    whatever rank they are. What is by token is padded on the right. Advantages are taken as they are; where they were made from
    rewards, they are made anew, from whole groups. What a rank sends is about its rows' bytes (6 for a token, and those of the
    numbers), times the number of other ranks; all ranks are padded to the one that has most.

    Args:
        own: this rank's rows; None where it has none.
        tables: numbers that belong to the rows, by name, [n] or [n, T]: coefficients, functionals, scores. The same names on
            all ranks that have rows.
        order: [n] the rows' places in the whole batch, integers, all different; None puts ranks one after the other.
        seconds: that ranks wait for one another.
        team: the ranks, where the caller has joined them already.

    Raises:
        ConfigError: there is no process group.
        DistributedError: a rank failed, or did not come; or ranks hold other fields or were sampled differently.
        RolloutsError: no rank has rows, or the rows do not fit together: rows of one group id begin with other tokens.
    """
    with joined("all", seconds, team) as found:
        found.enter("rows")
        parts = _exchanged(found, own, tables or {}, order)
        if not parts:
            raise RolloutsError("gather_rows: no rank has any rows.", fix="pass the rows of at least one rank.")
        fields, texts = [tensors for _, tensors, _ in parts], [told for _, _, told in parts]
        _refuse_mixed(parts)
        wide = max(tensors["input_ids"].shape[1] for tensors in fields)
        whole = {name: torch.cat([_padded(name, own[name], own, wide) for own in fields]) for name in fields[0]}
        if _ORDER in whole:
            places = whole.pop(_ORDER)
            if len(set(places.tolist())) < len(places):
                raise RolloutsError(
                    "gather_rows: `order` gives one place to two rows.",
                    fix="pass every row's place in the whole batch.",
                )
            sort = places.argsort()
            whole = {name: tensor[sort] for name, tensor in whole.items()}
        else:
            sort = torch.arange(len(whole["group_ids"]))
        rest = {name.removeprefix(_TABLE): whole.pop(name) for name in list(whole) if name.startswith(_TABLE)}
        return GatheredRows(Rollouts(**_keywords(whole, texts, sort.tolist())), rest)


def _exchanged(
    team: Team, own: Rollouts | None, tables: Mapping[str, Tensor], order: Tensor | None
) -> list[tuple[int, dict[str, Tensor], dict[str, Any]]]:
    """Rank, tensors by name, and what is no tensor, of every rank that has rows."""
    tensors = {} if own is None else _tensors(own, tables, order)
    data = save(tensors)
    lengths = [0] * team.size
    lengths[team.rank] = len(data)
    lengths = most_of(team, lengths)
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    received = rows_of(team, padded)
    told = [json.loads(text) for text in texts_of(team, json.dumps({} if own is None else _told(own)))]
    found = []
    for rank, (row, length) in enumerate(zip(received, lengths, strict=True)):
        of_rank = load(row[:length].numpy().tobytes())
        if of_rank:
            found.append((rank, of_rank, told[rank]))
    return found


def _tensors(own: Rollouts, tables: Mapping[str, Tensor], order: Tensor | None) -> dict[str, Tensor]:
    found = {}
    for name in (*_OF_TOKENS, *_OF_ROWS):
        value = getattr(own, name)
        if value is not None and not (name == "advantages" and _made_from_rewards(own)):
            found[name] = value.detach().cpu().to(_SENT_AS.get(name, value.dtype)).contiguous()
    if own.max_lengths_given:
        found[_BUDGET] = own.length_budgets[own.prompt_index]
    given = {_TABLE + name: torch.as_tensor(table).detach().cpu().contiguous() for name, table in tables.items()}
    given |= {} if order is None else {_ORDER: torch.as_tensor(order).detach().cpu().to(torch.int64).contiguous()}
    for name, table in given.items():
        if table.dim() == 0 or len(table) != own.n_sequences:
            raise RolloutsError(
                f"gather_rows: {name} has shape {list(table.shape)} for {own.n_sequences} rows.",
                fix="pass one number, or one row of numbers, for every row.",
            )
    # Copies: safetensors writes no two tensors of one memory, and a table may be the rewards themselves.
    return {name: tensor.clone() for name, tensor in (found | given).items()}


def _told(own: Rollouts) -> dict[str, Any]:
    prompts = None if own.prompts is None else [own.prompts[prompt] for prompt in own.prompt_index.tolist()]
    responses = None if own.responses is None else list(own.responses)
    return {name: getattr(own, name) for name in SAMPLING} | {"prompts": prompts, "responses": responses}


def _made_from_rewards(own: Rollouts) -> bool:
    """Whether advantages are the rewards less the mean of the group's rows of this rank."""
    if own.rewards is None or own.advantages is None:
        return False
    without = dataclasses.replace(own, advantages=None).advantages
    assert without is not None
    return torch.equal(without.cpu(), own.advantages.cpu())


def _refuse_mixed(parts: Sequence[tuple[int, dict[str, Tensor], dict[str, Any]]]) -> None:
    """Raise, on all ranks alike, where ranks have other fields."""
    first, tensors, told = parts[0]
    for rank, others, said in parts[1:]:
        different = sorted(set(tensors) ^ set(others))
        different += [name for name in SAMPLING if told[name] != said[name]]
        different += [name for name in ("prompts", "responses") if (told[name] is None) != (said[name] is None)]
        if different:
            raise DistributedError(
                f"gather_rows: `{different[0]}` of rank {rank} is not as on rank {first} (given on one of them alone, or "
                "another value).",
                fix="pass the same fields on all ranks, of responses that were sampled alike.",
                ranks=(rank,),
                agreed=True,
            )


def _padded(name: str, tensor: Tensor, own: Mapping[str, Tensor], wide: int) -> Tensor:
    """By token, as wide as the widest."""
    if tensor.dim() < 2 or tensor.shape[1] != own["input_ids"].shape[1]:
        return tensor
    return torch.nn.functional.pad(tensor, (0, wide - tensor.shape[1]))


def _keywords(whole: dict[str, Tensor], texts: Sequence[Mapping[str, Any]], sort: Sequence[int]) -> dict[str, Any]:
    """Of `Rollouts`, from rows in their final order; texts are in the order of ranks."""
    found: dict[str, Any] = {name: whole[name] for name in whole if name != _BUDGET}
    for name in _SENT_AS:
        found[name] = found[name].to(torch.int64)
    groups = whole["group_ids"].tolist()
    first = {group: place for place, group in reversed(list(enumerate(groups)))}
    order = [first[group] for group in dict.fromkeys(groups)]
    if _BUDGET in whole:
        budgets = whole[_BUDGET]
        if not torch.equal(budgets, budgets[[first[group] for group in groups]]):
            raise RolloutsError(
                "gather_rows: rows of one group have different generation budgets on different ranks.",
                fix="pass the same `max_lengths` for a prompt on all ranks.",
            )
        found["max_lengths"] = budgets[order]
    for name in ("prompts", "responses"):
        if texts[0][name] is not None:
            flat = [text for told in texts for text in told[name]]
            rows = [flat[place] for place in sort]
            found[name] = [rows[place] for place in order] if name == "prompts" else rows
    return found | {name: texts[0][name] for name in SAMPLING}
