"""How ops are made known to torch: one schema, one implementation for every device, a fake one for shapes.

``torch.library.define`` and ``impl`` rather than ``custom_op``, which refuses optional results.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from entropy_fast.errors import ConfigError

__all__ = ["accumulator", "described", "refuse_forward_mode", "register"]


def register(
    name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Define the op ``name`` (``namespace::op``) and give it an implementation.

    Args:
        name: its qualified name.
        schema: arguments and results, in torch's schema language.
        implementation: what runs, on any device; choosing a backend is its business.
        fake: the same for tensors without data.

    Returns:
        The callable op.
    """
    torch.library.define(name, schema)
    torch.library.impl(name, "CompositeExplicitAutograd", _out_of_sight(implementation))
    torch.library.register_fake(name, fake)
    namespace, op = name.split("::")
    callable_op: Callable[..., Any] = getattr(getattr(torch.ops, namespace), op).default
    return callable_op


def _out_of_sight(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation, never traced by torch.compile: addresses and foreign calls are not for it.

    Without importing the compiler where nobody else has, which takes seconds.
    """

    @functools.cache
    def disabled() -> Callable[..., Any]:
        hidden: Callable[..., Any] = torch.compiler.disable(implementation)  # type: ignore[no-untyped-call]
        return hidden

    @functools.wraps(implementation)
    def run(*arguments: Any) -> Any:
        return (disabled() if "torch._dynamo" in sys.modules else implementation)(*arguments)

    return run


def refuse_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """Raise when a tensor carries a tangent: these ops have no forward derivative, and torch would go on with 0.

    Raises:
        ConfigError: one does.
    """
    # Where torch keeps no such number, every tensor is asked.
    if getattr(forward_ad, "_current_level", 0) < 0:
        return
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            raise ConfigError(
                f"{op} got a tensor with a tangent (torch.func.jvp, forward_ad); it has derivatives in reverse mode only.",
                fix="use the function of the same name in entropy_fast.reference, which has both.",
            )


def accumulator(tensor: Tensor) -> torch.dtype:
    """What values of this tensor are summed up in: float32, or float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def described(tensor: Tensor) -> str:
    """Dtype, shape and device of a tensor, for messages."""
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
