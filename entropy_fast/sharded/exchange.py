"""Plain parameters, classes and hooks in a model's modules for a while, and what FSDP2 had there put back."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from entropy_fast.checks.exclusive import undivided
from entropy_fast.libraries import fsdp2_casts, fsdp2_hooks
from entropy_fast.sharded.fsdp2 import ShardedModel
from entropy_fast.sharded.layers import LayersOnDemand, of_outputs

__all__ = ["in_place"]

Undo = list[Callable[[], object]]


@contextlib.contextmanager
def in_place(
    sharded: ShardedModel, model: nn.Module, computed: Mapping[int, nn.Parameter], layers: LayersOnDemand
) -> Iterator[None]:
    """With plain parameters and classes; of FSDP2's hooks the casts alone, and what layers on demand need.

    Args:
        sharded: what FSDP2 made of the model.
        model: the same.
        computed: plain parameters by the identity of the sharded ones.
        layers: that are whole only while they are run.
    """
    undo: Undo = []
    try:
        with undivided():
            for module in model.modules():
                for slot, parameter in module._parameters.items():
                    if id(parameter) in computed:
                        undo.append(functools.partial(module._parameters.__setitem__, slot, parameter))
                        module._parameters[slot] = computed[id(parameter)]
            for module in sharded.modules.values():
                _exchange_hooks(module, layers.before(module), undo, outermost=module is model)
                kind = type(module)
                undo.append(functools.partial(setattr, module, "__class__", kind))
                module.__class__ = kind.__bases__[-1]  # the class that fully_shard has put another in front of
        yield
    finally:
        with undivided():
            for back in reversed(undo):
                back()


def _exchange_hooks(module: Any, have: Callable[[], None] | None, undo: Undo, *, outermost: bool) -> None:
    # The outermost module is given tokens and masks, and what it returns is read in whatever dtype it comes in.
    of_inputs, of_output = (None, None) if outermost else fsdp2_casts(module)
    before = None if of_inputs is None and have is None else _before(have, of_inputs)
    after = None if of_output is None and have is None else _after(have, of_output)
    for held, keys, hook in zip(
        (module._forward_pre_hooks, module._forward_hooks), fsdp2_hooks(module), (before, after), strict=True
    ):
        undo.append(functools.partial(_put_back, held, list(held.items())))
        for key in keys:
            if hook is None:
                del held[key]
            else:
                held[key] = hook


def _put_back(held: Any, items: list[tuple[Any, Any]]) -> None:
    """In the order in which they were."""
    held.clear()
    held.update(items)


def _before(have: Callable[[], None] | None, cast: Callable[[Any, Any], Any] | None) -> Callable[..., Any]:
    def run(_: nn.Module, args: Any, kwargs: Any) -> Any:
        if have is not None:
            have()
        return (args, kwargs) if cast is None else cast(args, kwargs)

    return run


def _after(have: Callable[[], None] | None, cast: Callable[[Any], Any] | None) -> Callable[..., Any]:
    def run(_: nn.Module, args: Any, output: Any) -> Any:
        output = output if cast is None else cast(output)
        if have is not None:
            for found in of_outputs(output):
                found.register_hook(lambda _: have())  # type: ignore[no-untyped-call]
        return output

    return run
