"""What has to be alike on all ranks, and is looked at before anything is measured: options, parameters, data, decisions."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from entropy_fast.distributed.collectives import rows_of, texts_of
from entropy_fast.distributed.team import Team
from entropy_fast.errors import DistributedError

__all__ = ["fingerprint", "of_first_rank", "refuse_other_tensors", "refuse_others", "sum_of_bits", "united"]

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_Found = TypeVar("_Found")


def fingerprint(value: Any) -> str:
    """A hash of tensors, numbers, texts, and containers and dataclasses of them; of anything else its type alone."""
    digest = hashlib.blake2b(digest_size=16)
    for piece in _pieces(value):
        digest.update(piece)
    return digest.hexdigest()


def refuse_others(team: Team, own: Mapping[str, str], *, fix: str) -> None:
    """Raise, on all ranks alike, unless every rank says the same.

    Args:
        team: the ranks.
        own: what this rank has, in words or as a `fingerprint`, by what it is of.
        fix: what to do.

    Raises:
        DistributedError: a rank has something else; it names the rank and what.
    """
    if team.size == 1:
        return
    found = [json.loads(text) for text in texts_of(team, json.dumps(dict(own)))]
    for rank, theirs in enumerate(found):
        for name in dict.fromkeys([*found[0], *theirs]):
            if found[0].get(name) != theirs.get(name):
                raise _other(rank, name, fix)


def refuse_other_tensors(team: Team, named: Mapping[str, Tensor], *, fix: str) -> None:
    """Likewise of large tensors, of which the sums of their bits are compared; names have to be alike already.

    Raises:
        DistributedError: a rank has other values; it names the rank and the first of them.
    """
    if team.size == 1 or not named:
        return
    found = rows_of(team, torch.tensor([sum_of_bits(tensor) for tensor in named.values()], dtype=torch.int64))
    for rank, theirs in enumerate(found):
        different = (theirs != found[0]).nonzero().flatten().tolist()
        if different:
            raise _other(rank, f"'{list(named)[different[0]]}' ({len(different)} of {len(named)} differ)", fix)


def of_first_rank(team: Team, found: _Found) -> _Found:
    """What the first rank found, where others' differ in a rounding: numbers are the same bits on all ranks.

    Args:
        team: the ranks.
        found: of this rank: dataclasses, mappings and sequences of tensors on the CPU and numbers, built alike everywhere.
    """
    if team.size == 1 or len(set(texts_of(team, fingerprint(found)))) == 1:
        return found
    numbers: list[Tensor] = []
    _taken_apart(found, numbers)
    refuse_others(team, {"the form of what was found": fingerprint([n.shape for n in numbers])}, fix="report this.")
    whole = torch.cat([number.reshape(-1) for number in numbers])
    team.run(lambda group: dist.broadcast(whole, 0, group=group))
    rest = iter(torch.split(whole, [number.numel() for number in numbers]))
    filled: _Found = _put_together(found, rest)
    return filled


def _other(rank: int, name: str, fix: str) -> DistributedError:
    return DistributedError(f"rank {rank} has other {name} than rank 0.", fix=fix, ranks=(rank,), agreed=True)


def sum_of_bits(tensor: Tensor) -> int:
    """Of a tensor's elements as whole numbers, which a change of any single one changes."""
    plain = tensor.detach().contiguous()
    plain = torch.view_as_real(plain) if plain.is_complex() else plain
    return int(plain.view(_WORDS[plain.element_size()]).sum(dtype=torch.int64))


def _pieces(value: Any) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        yield f"{plain.dtype}{list(plain.shape)}".encode()
        yield plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield type(value).__name__.encode()
        for field in dataclasses.fields(value):
            if field.repr:  # what is only remembered is none of its own
                yield field.name.encode()
                yield from _pieces(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for key, own in value.items():
            yield repr(key).encode()
            yield from _pieces(own)
    elif isinstance(value, (tuple, list)):
        yield f"{len(value)}:".encode()
        for own in value:
            yield from _pieces(own)
    elif value is None or isinstance(value, (str, int, float, enum.Enum, torch.dtype)):
        yield repr(value).encode()
    else:
        yield type(value).__name__.encode()


def _taken_apart(value: Any, into: list[Tensor]) -> None:
    """Append every number of ``value``, fp64, in the order of `_put_together`."""
    if isinstance(value, Tensor) and value.is_floating_point():
        into.append(value.to(torch.float64))
    elif isinstance(value, float):
        into.append(torch.tensor(value, dtype=torch.float64))
    else:
        for _, own in _inside(value):
            _taken_apart(own, into)


def _put_together(value: Any, rest: Iterator[Tensor]) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return next(rest).view(value.shape).to(value.dtype)
    if isinstance(value, float):
        return float(next(rest))
    parts = {key: _put_together(own, rest) for key, own in _inside(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **parts)
    if isinstance(value, Mapping):
        return parts
    if isinstance(value, (tuple, list)):
        return type(value)(parts.values())
    return value


def _inside(value: Any) -> Iterator[tuple[Any, Any]]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    elif isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, (tuple, list)):
        yield from enumerate(value)


def united(team: Team, values: Sequence[str]) -> list[str]:
    """Every text that any rank has, sorted."""
    return sorted({text for texts in texts_of(team, json.dumps(list(values))) for text in json.loads(texts)})
