"""The structure of what an optimizer's file holds: groups of settings, and entries of state by parameter.

An optimizer's ``state_dict()`` is found wherever it lies: by itself, beside a model's weights in a training checkpoint, under
the name that a checkpoint gave it, laid flat by parameter, or as one of several whose parameters have names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from entropy_fast.errors import OptimizerStateError
from entropy_fast.step.optimizer_archive import SHARDS, sharded_state
from entropy_fast.step.scalars import real_number, shown, shown_keys

__all__ = ["QUANTIZED_WRAPPING", "SavedOptimizer", "plain_entry", "saved_optimizer"]

# Where bitsandbytes puts state1, state2 and their scales in its state_dict, out of FSDP's sight.
QUANTIZED_WRAPPING = "__bnb_optimizer_quant_state__"
DEEPEST = 3  # containers around a state_dict
FLAT_STATE, FLAT_GROUPS = "state.", "param_groups."


@dataclasses.dataclass(frozen=True)
class SavedOptimizer:
    """The content of an optimizer file, of sound structure; numbers in it are not checked yet.

    Attributes:
        path: where it was read.
        groups: hyperparameters of every group.
        keys: for every group, the keys of its parameters in ``state``: all numbers or all names, no key twice.
        names: for every group, its parameters' names; None where the file has none.
        state: key -> entry, for parameters that were stepped.
        notes: what is to be known about how it was found, one sentence each.
    """

    path: str
    groups: Sequence[Mapping[str, Any]]
    keys: Sequence[Sequence[int | str]]
    names: Sequence[Sequence[str]] | None
    state: Mapping[int | str, Mapping[str, Any]]
    notes: tuple[str, ...] = ()


def saved_optimizer(where: str, content: object) -> SavedOptimizer:
    """Find the optimizer in what was read; several whose parameters have names are taken as one with all their groups.

    Args:
        where: what it is called in messages.
        content: tensors and plain containers.

    Raises:
        OptimizerStateError: there is none, its parts do not belong together, or there are several without names.
    """
    found = list(_states(content, ()))
    if not found:
        raise _something_else(where, content)
    each = [(path, _structure(where, state)) for path, state in found]
    if len(each) == 1:
        return each[0][1]
    if any(one.names is None for _, one in each):
        places = ", ".join(shown(".".join(map(str, path))) for path, _ in each)
        raise OptimizerStateError(
            f"optimizer file {where} holds {len(each)} optimizers, at {places}, that do not all name their parameters.",
            fix="save get_optimizer_state_dict(model, [first, second]) of torch.distributed.checkpoint.state_dict, build them "
            "from named parameters, or save the one that trains the probed parameters by itself.",
        )
    return _together(where, [one for _, one in each])


def plain_entry(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """A parameter's state with what bitsandbytes wraps laid flat."""
    wrapped = entry.get(QUANTIZED_WRAPPING)
    if not isinstance(wrapped, dict):
        return entry
    return {**{key: value for key, value in entry.items() if key != QUANTIZED_WRAPPING}, **wrapped}


def _states(content: object, path: tuple[object, ...]) -> Iterator[tuple[tuple[object, ...], object]]:
    """Paths and contents of all that looks like an optimizer's state_dict."""
    if _is_flat(content) or (isinstance(content, dict) and {"state", "param_groups"} <= content.keys()):
        yield path, content
    elif isinstance(content, (dict, list)) and len(path) < DEEPEST:
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _states(value, (*path, key))


def _is_flat(content: object) -> bool:
    """Whether it is what ``flatten_optimizer_state_dict`` of torch.distributed.checkpoint makes."""
    return (
        isinstance(content, dict)
        and any(isinstance(key, str) and key.startswith(FLAT_GROUPS) for key in content)
        and all(isinstance(key, str) and key.startswith((FLAT_STATE, FLAT_GROUPS)) for key in content)
    )


def _structure(where: str, saved: Any) -> SavedOptimizer:
    if _is_flat(saved):
        return _unflattened(where, saved)
    groups, state = saved["param_groups"], saved["state"]
    keys = []
    for index, group in enumerate(groups if isinstance(groups, list) else ()):
        listed = group.get("params") if isinstance(group, dict) else None
        if not isinstance(listed, list) or not all(type(key) in (int, str) for key in listed):
            raise _broken(where, f"parameter group {index} lists no numbers or names as 'params'")
        if not all(isinstance(key, str) for key in group):
            raise _broken(where, f"parameter group {index} has keys that are no texts")
        keys.append(listed)
    if not keys:
        raise _broken(where, f"'param_groups' is {shown(groups)}, expected a list with at least one group")
    every = [key for listed in keys for key in listed]
    if len({type(key) for key in every}) > 1:
        raise _broken(where, "some parameters are listed by number and others by name")
    if len(set(every)) < len(every):
        twice = next(key for key in every if every.count(key) > 1)
        raise _broken(where, f"parameter {shown(twice)} is listed twice in 'params'")
    if not isinstance(state, dict) or not all(isinstance(entry, dict) for entry in state.values()):
        raise _broken(where, "'state' is not a table of entries")
    state = _numbered(state, every)
    known = set(every)
    strange = [key for key in state if type(key) not in (int, str) or key not in known]
    if strange:
        raise _broken(where, f"'state' has an entry for {shown(strange[0])}, which no parameter group lists")
    for key, entry in state.items():
        for value in plain_entry(entry).values():
            # A tensor of another class may be a piece of one, under the whole's shape.
            if isinstance(value, Tensor) and type(value) not in (Tensor, nn.Parameter):
                kind = type(value).__name__
                raise sharded_state(where) if kind in SHARDS else _broken(where, f"entry {shown(key)} has a {kind}")
    return SavedOptimizer(where, groups, keys, _names(where, groups, keys), state)


def _numbered(state: dict[Any, Any], listed: Sequence[int | str]) -> dict[Any, Any]:
    """With numbers for keys where a checkpoint folder has made texts of all of them."""
    texts = all(isinstance(key, str) and key.isascii() and key.isdigit() for key in state)
    if not state or not texts or not all(isinstance(key, int) for key in listed):
        return state
    return {int(key): entry for key, entry in state.items()}


def _names(where: str, groups: list[dict[str, Any]], keys: list[list[int | str]]) -> list[list[str]] | None:
    """The parameters' names: what they are listed by, or ``param_names`` beside the numbers."""
    if all(isinstance(key, str) for listed in keys for key in listed):
        return [[str(key) for key in listed] for listed in keys] if any(keys) else None
    if not any("param_names" in group for group in groups):
        return None
    names = []
    for index, (group, listed) in enumerate(zip(groups, keys, strict=True)):
        found = group.get("param_names")
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found) or len(found) != len(listed):
            raise _broken(
                where,
                f"parameter group {index} has {len(listed)} parameters and as 'param_names' {shown(found)}, no name each",
            )
        names.append(found)
    return names


def _together(where: str, each: Sequence[SavedOptimizer]) -> SavedOptimizer:
    """One with the groups of all: parameters are numbered through, and keep their names."""
    groups: list[Mapping[str, Any]] = []
    keys: list[list[int | str]] = []
    names: list[list[str]] = []
    state: dict[int | str, Mapping[str, Any]] = {}
    count = 0
    for one in each:
        assert one.names is not None
        for group, listed, its_names in zip(one.groups, one.keys, one.names, strict=True):
            numbers = range(count, count + len(listed))
            state.update({n: one.state[key] for n, key in zip(numbers, listed, strict=True) if key in one.state})
            groups.append(group)
            keys.append(list(numbers))
            names.append(list(its_names))
            count += len(listed)
    notes = tuple(dict.fromkeys(note for one in each for note in one.notes))
    return SavedOptimizer(where, groups, keys, names, state, notes)


def _unflattened(where: str, flat: Mapping[str, Any]) -> SavedOptimizer:
    """From settings and state by parameter name: parameters with the same settings are one group."""
    settings: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        if key.startswith(FLAT_GROUPS):
            name, _, setting = key[len(FLAT_GROUPS) :].rpartition(".")
            of_name = settings.setdefault(name, {})
            if setting != "param_names":  # of its group, which is not known
                of_name[setting] = value
    groups: dict[str, dict[str, Any]] = {}
    for name, of_name in settings.items():
        same = groups.setdefault(
            repr(sorted((k, _comparable(v)) for k, v in of_name.items())), {**of_name, "params": []}
        )
        same["params"].append(name)
    state: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        if key.startswith(FLAT_STATE):
            inside, name = key[len(FLAT_STATE) :].split("."), ""
            split = next((n for n in range(len(inside) - 1, 0, -1) if ".".join(inside[:n]) in settings), None)
            if split is None:
                raise _broken(where, f"it has state {shown(key)} of a parameter for which it has no settings")
            name, path = ".".join(inside[:split]), inside[split:]
            place = state.setdefault(name, {})
            for part in path[:-1]:
                place = place.setdefault(part, {})
                if not isinstance(place, dict):
                    raise _broken(where, f"{shown(key)} lies inside of a value")
            place[path[-1]] = value
    found = _structure(where, {"state": state, "param_groups": list(groups.values())})
    if len({repr(_comparable(group.get("lr"))) for group in found.groups}) < 2:
        return found
    note = (
        "the optimizer file keeps settings by parameter and no groups: parameters with the same ones are taken as a group, and "
        f"the first, whose learning rate a given learning_rate is in place of, is that of {shown(found.keys[0][0])}."
    )
    return dataclasses.replace(found, notes=(note,))


def _comparable(value: object) -> object:
    number = real_number(value) if isinstance(value, Tensor) else None
    return value if number is None else ("tensor", number)


def _something_else(where: str, saved: object) -> OptimizerStateError:
    found = f"keys {shown_keys(saved)}" if isinstance(saved, dict) else shown(saved)
    fix = "pass the file written by optimizer.state_dict() (Trainer's optimizer.pt)."
    if isinstance(saved, dict) and "last_epoch" in saved:
        found += ", the state of a learning-rate scheduler"
        fix = "pass the optimizer's file (optimizer.pt beside scheduler.pt)."
    return OptimizerStateError(f"optimizer file {where} holds {found}; expected 'state' and 'param_groups'.", fix=fix)


def _broken(where: str, problem: str) -> OptimizerStateError:
    return OptimizerStateError(
        f"optimizer file {where}: {problem}.", fix="save it again with torch.save(optimizer.state_dict(), path)."
    )
