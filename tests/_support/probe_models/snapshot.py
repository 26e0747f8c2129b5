"""Everything about a model, its optimizer and the process that a probe must leave alone."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn


@dataclasses.dataclass
class Snapshot:
    """What was there; identities by reference, values by copy."""

    parameters: dict[str, nn.Parameter]
    values: dict[str, Tensor]
    requires_grad: dict[str, bool]
    gradients: dict[str, Tensor | None]
    gradient_values: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    training: dict[str, bool]
    plain_attributes: dict[str, dict[str, Any]]
    hooks: dict[str, int]
    attention: str | None
    random_state: Tensor
    optimizer: dict[str, Any]
    quant_states: dict[str, dict[str, Any]]


def take_snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> Snapshot:
    named = dict(model.named_parameters())
    return Snapshot(
        parameters=named,
        values={n: p.detach().clone() for n, p in named.items()},
        requires_grad={n: p.requires_grad for n, p in named.items()},
        gradients={n: p.grad for n, p in named.items()},
        gradient_values={n: None if p.grad is None else p.grad.clone() for n, p in named.items()},
        buffers={n: b.clone() for n, b in model.named_buffers()},
        training={n: m.training for n, m in model.named_modules()},
        plain_attributes={
            n: {k: v for k, v in vars(m).items() if isinstance(v, (bool, int, float, str))}
            for n, m in model.named_modules()
        },
        hooks={n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in model.named_modules()},
        attention=getattr(getattr(model, "config", None), "_attn_implementation", None),
        random_state=torch.get_rng_state(),
        optimizer=copy.deepcopy(optimizer.state_dict()),
        quant_states={n: copy.deepcopy(vars(p.quant_state)) for n, p in named.items() if hasattr(p, "quant_state")},
    )


def assert_unchanged(before: Snapshot, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    after = take_snapshot(model, optimizer)
    assert after.parameters.keys() == before.parameters.keys()
    for name, parameter in before.parameters.items():
        assert after.parameters[name] is parameter, f"{name} is another object"
        assert after.gradients[name] is before.gradients[name], f"{name}.grad is another object"
    for field in (
        "values",
        "requires_grad",
        "gradient_values",
        "buffers",
        "training",
        "plain_attributes",
        "hooks",
        "attention",
        "random_state",
        "optimizer",
        "quant_states",
    ):
        was, found = getattr(before, field), getattr(after, field)
        assert _same(was, found), f"{field} changed{_first_difference(was, found)}"


def _first_difference(left: Any, right: Any) -> str:
    if isinstance(left, dict) and isinstance(right, dict):
        for key in left:
            if key not in right or not _same(left[key], right[key]):
                return f" at {key!r}"
    return ""


def _same(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and bool(torch.equal(left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(_same(a, b) for a, b in zip(left, right, strict=True))
    if hasattr(left, "__dict__"):
        return _same(vars(left), vars(right))
    return bool(left == right)
