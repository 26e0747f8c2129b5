"""What a rank keeps of an optimizer's state, and of the parameters that it steps: rows of each, in place of the whole."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from entropy_fast.distributed.team import Team
from entropy_fast.sharded.forms import Form
from entropy_fast.sharded.fsdp2 import is_sharded
from entropy_fast.sharded.gathering import gathered
from entropy_fast.sharded.optimizer import ShardedOptimizer, exchanged, left_out
from entropy_fast.sharded.parted import PartedSums
from entropy_fast.step import AdamState, OptimizerAtHand, optimizer_from_file, read_optimizer

__all__ = ["optimizer_in_pieces"]


def optimizer_in_pieces(
    given: ShardedOptimizer,
    parted: PartedSums,
    model: nn.Module,
    trained: Mapping[str, nn.Parameter],
    team: Team,
    *,
    momentum: bool,
    live: bool,
) -> OptimizerAtHand:
    """An optimizer whose states, and what it steps, are those of this rank's pieces. Matrices are not copied.

    Args:
        given: the optimizer.
        parted: what this rank keeps.
        model: the model.
        trained: its trained parameters, sharded or not, by the names that probes know them by.
        team: the ranks, all of which have to come here.
        momentum: whether Adam's first moments are wanted.
        live: whether gradients are.

    Raises:
        OptimizerStateError, LearningRateError: see `read_optimizer`.
        DistributedError: a rank failed or was lost.
    """
    forms = {form.name: form for form in parted.forms}
    pieces = {name: nn.Parameter(_piece(team, forms[name], p), requires_grad=False) for name, p in trained.items()}
    for name, p in trained.items():
        if live and p.grad is not None:
            pieces[name].grad = _piece(team, forms[name], p.grad)
    optimizer = given.given
    if isinstance(optimizer, AdamState):
        return OptimizerAtHand(_state_in_pieces(optimizer, forms, team.rank), values=pieces)
    if not isinstance(optimizer, torch.optim.Optimizer):
        return OptimizerAtHand(_state_of_file(optimizer, forms, team, model), values=pieces)
    name_of, unwanted = {id(p): name for name, p in trained.items()}, left_out(optimizer, momentum=momentum)
    states = {}
    for p in (p for group in optimizer.param_groups for p in group["params"] if id(p) in name_of):
        form, state = forms[name_of[id(p)]], optimizer.state.get(p, {})
        found = {
            key: own if key == "step" else _piece(team, form, own) for key, own in state.items() if key not in unwanted
        }
        if found and form.elements(team.rank):
            states[id(p)] = found
    stepped = exchanged(optimizer, {id(p): pieces[name] for name, p in trained.items()}, states)
    return dataclasses.replace(read_optimizer(stepped, _Pieces(pieces), any_kind=True), values=pieces)


class _Pieces(nn.Module):
    """A model of which there is nothing but names of parameters and pieces of them."""

    def __init__(self, pieces: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self._pieces = dict(pieces)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """All of them, by their names in the model."""
        yield from self._pieces.items()


def _piece(team: Team, form: Form, tensor: Any) -> Any:
    """What this rank keeps of a parameter, or of something of its shape; anything else as it is."""
    if not isinstance(tensor, Tensor) or tensor.shape != form.shape:
        return tensor
    found: Any = tensor.detach()
    if is_sharded(found):
        if form.divided and found.placements[0].dim == 0:
            local = found.to_local()
            assert local.shape == form.piece(team.rank)  # as FSDP2 deals rows
            return local
        found = gathered(team, found)
    return form.cut(found, team.rank).clone()


def _state_in_pieces(state: AdamState, forms: Mapping[str, Form], rank: int) -> AdamState:
    moments = {}
    for name, own in state.moments.items():
        form = forms.get(name)
        if form is None or not form.elements(rank):
            continue
        second, first, running = (
            None if whole is None else form.cut(whole, rank).clone()
            for whole in (own.second_moment, own.first_moment, own.running_second_moment)
        )
        assert second is not None
        moments[name] = dataclasses.replace(
            own, second_moment=second, first_moment=first, running_second_moment=running
        )
    return dataclasses.replace(state, moments=moments)


def _state_of_file(path: str | os.PathLike[str], forms: Mapping[str, Form], team: Team, model: nn.Module) -> AdamState:
    """Of a folder a few parameters at a time, no more elements than a rank keeps of all, or than the largest has."""
    if not os.path.isdir(path):
        return _state_in_pieces(optimizer_from_file(path, model).state, forms, team.rank)
    most = max(sum(form.shape.numel() for form in forms.values()) // team.size, 1)
    found: list[AdamState] = []
    waiting: list[str] = []
    for place, (name, form) in enumerate(forms.items()):
        waiting.append(name)
        held = sum(forms[own].shape.numel() for own in waiting)
        if place == len(forms) - 1 or held + form.shape.numel() > most:
            state = optimizer_from_file(path, model, waiting).state
            own = {name: state.moments[name] for name in waiting if name in state.moments}
            found.append(_state_in_pieces(dataclasses.replace(state, moments=own), forms, team.rank))
            waiting = []
    moments = {name: own for state in found for name, own in state.moments.items()}
    notes = tuple(dict.fromkeys(note for state in found for note in state.notes))
    return dataclasses.replace(found[0], moments=moments, notes=notes)
