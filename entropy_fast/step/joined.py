"""Several optimizers of one model's parameters as one, such as Muon for matrices and AdamW for the rest."""

from __future__ import annotations

import collections
import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from entropy_fast.errors import OptimizerStateError

__all__ = ["JoinedOptimizer", "bare_copy", "kind_name"]

PART = "joined_part"  # in a group's settings: whose group it is


class JoinedOptimizer(torch.optim.Optimizer):
    """Optimizers whose steps are taken one after the other, each with its own groups.

    The optimizers themselves are left as they are: groups are copies, and the state is theirs as it stands.

    Args:
        parts: in the order in which they step.

    Raises:
        OptimizerStateError: there is none, or two hold the same parameter.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        held = [id(p) for part in parts for group in part.param_groups for p in group["params"]]
        if not held or len(set(held)) < len(held):
            raise OptimizerStateError(
                f"{len(parts)} optimizers with {len(held)} parameters, {len(held) - len(set(held))} of them held twice.",
                fix="pass the optimizers that train the model, each parameter in one of them.",
            )
        # A tuple: copies for dry runs share it, and copy lists.
        self.parts = tuple(parts)
        groups = [{**group, PART: index} for index, part in enumerate(parts) for group in part.param_groups]
        super().__init__(groups, {})
        self.state = collections.defaultdict(dict, {p: own for part in parts for p, own in part.state.items()})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step every optimizer on its groups here."""
        for index, part in enumerate(self.parts):
            scratch = bare_copy(part)
            scratch.param_groups = [group for group in self.param_groups if group[PART] == index]
            scratch.state = self.state
            if scratch.param_groups:
                type(scratch).step(scratch)


def bare_copy(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Another optimizer of the same class with the same attributes, without hooks, groups and state.

    Args:
        optimizer: what a step changes in it besides groups and state is copied.
    """
    scratch = object.__new__(type(optimizer))
    # Not a scheduler's wrapped step, and no hooks of the user's.
    left_out = {"step", "state", "param_groups"}
    kept = {
        key: copy.deepcopy(value) if isinstance(value, (dict, list, set, Tensor)) else value
        for key, value in optimizer.__dict__.items()
        if key not in left_out and "_hooks" not in key
    }
    hooks: dict[str, Any] = {key: collections.OrderedDict() for key in optimizer.__dict__ if "_hooks" in key}
    scratch.__dict__.update(kept, **hooks)
    return scratch


def kind_name(optimizer: object) -> str:
    """What to call an optimizer in a message: its class, or those of what is joined."""
    if isinstance(optimizer, JoinedOptimizer):
        return " beside ".join(kind_name(part) for part in optimizer.parts)
    kind = type(optimizer)
    return f"{kind.__module__}.{kind.__qualname__}"
