"""An Adam's state in the form of ``optimizer.pt``, with the name of every parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from entropy_fast.checks.parameter_registry import unwrap_model
from entropy_fast.errors import OptimizerStateError
from entropy_fast.step.adam_state import AdamState, innermost

__all__ = ["named_state"]


def named_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """What `torch.save` is given, so that `adam_state_from_file` matches every entry by name.

    Tensors are the optimizer's own, not copies.

    Args:
        optimizer: ``torch.optim.Adam`` or ``AdamW`` (also wrapped by accelerate).
        model: the model it steps, possibly wrapped. Parameters of other models are left out.

    Raises:
        OptimizerStateError: another kind of optimizer, whose state cannot be read from a file; or one with unusable state.
        LearningRateError: a learning rate that no step can be taken with.
    """
    inner = innermost(optimizer)
    if type(inner) not in (torch.optim.Adam, torch.optim.AdamW):
        kind = type(inner)
        raise OptimizerStateError(
            f"the optimizer is a {kind.__module__}.{kind.__qualname__}; a step is kept with the state of torch.optim.Adam or "
            "AdamW alone.",
            fix="train with torch.optim.AdamW to keep steps, or forecast online with the live optimizer.",
        )
    AdamState.from_optimizer(inner, model)  # says what is wrong with its state
    name_of = {id(parameter): name for name, parameter in unwrap_model(model).named_parameters()}
    saved = inner.state_dict()
    decoupled = isinstance(inner, torch.optim.AdamW)
    groups, kept = [], set()
    for live, group in zip(inner.param_groups, saved["param_groups"], strict=True):
        own = [(key, name_of.get(id(p))) for key, p in zip(group["params"], live["params"], strict=True)]
        keys = [key for key, name in own if name is not None]
        names = [name for _, name in own if name is not None]
        kept.update(keys)
        groups.append({"decoupled_weight_decay": decoupled, **group, "params": keys, "param_names": names})
    return {"state": {key: entry for key, entry in saved["state"].items() if key in kept}, "param_groups": groups}
