"""Forward derivatives of bitsandbytes' frozen 4-bit and 8-bit linear maps.

The value comes from the module's own forward. The derivative of W x + b is W x' + b' with W dequantised for the moment, which
is also what bitsandbytes' backward multiplies by. 8-bit maps round their inputs too; the derivative goes straight through that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from entropy_fast.engines.forward_mode.parameters import tangent_of

__all__ = ["quantized_modules", "quantized_with_tangents"]


def quantized_modules(module: nn.Module) -> list[nn.Module]:
    """The modules of ``module`` that are linear maps of bitsandbytes."""
    return [m for m in module.modules() if _dequantize(m) is not None]


@contextlib.contextmanager
def quantized_with_tangents(modules: list[nn.Module], tangents: Mapping[int, Tensor]) -> Iterator[None]:
    """Inside a ``dual_level``: these modules pass tangents on.

    Args:
        modules: from `quantized_modules`.
        tangents: of trainable parameters, by the parameter's id; a bias may be among them.
    """
    exchanged: list[tuple[nn.Module, Any]] = []
    try:
        for module in modules:
            # A forward of the instance's own (some libraries place one) is what gives the value, and comes back.
            exchanged.append((module, vars(module).get("forward")))
            module.forward = _with_tangent(module, module.forward, tangents)
        yield
    finally:
        for module, own in exchanged:
            if own is None:
                del module.forward
            else:
                module.forward = own


def _with_tangent(
    module: nn.Module, forward: Callable[..., Tensor], tangents: Mapping[int, Tensor]
) -> Callable[..., Tensor]:
    def run(x: Tensor) -> Tensor:
        primal, tangent = tangent_of(x)
        output = forward(primal)
        of_bias = tangents.get(id(module.bias))
        if tangent is None and of_bias is None:
            return output
        total = torch.zeros_like(output)
        # What the library computes is not subject to autocast, and neither is its backward.
        with torch.autocast(x.device.type, enabled=False):
            if tangent is not None:
                dtype = getattr(module, "compute_dtype", None) or x.dtype
                dequantize = _dequantize(module)
                assert dequantize is not None
                total = F.linear(tangent.to(dtype), dequantize(dtype)).to(output.dtype)
            if of_bias is not None:
                total = total + of_bias.to(output.dtype)
        dual: Tensor = forward_ad.make_dual(output, total)  # type: ignore[no-untyped-call]
        return dual

    return run


def _dequantize(module: Any) -> Callable[[torch.dtype], Tensor] | None:
    """What gives a module's weight [out, in] in a dtype; None for modules of other kinds."""
    if not type(module).__module__.startswith("bitsandbytes.nn"):
        return None
    kinds = {kind.__name__ for kind in type(module).__mro__}
    if "Linear4bit" in kinds:
        return lambda dtype: _four_bits(module, dtype)
    return (lambda dtype: _eight_bits(module, dtype)) if "Linear8bitLt" in kinds else None


def _four_bits(module: Any, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(module.weight.data, module.weight.quant_state)
    return weight.to(dtype)


def _eight_bits(module: Any, dtype: torch.dtype) -> Tensor:
    # After a forward, which has put them there.
    codes, scale = module.state.CB, module.state.SCB
    weight: Tensor = codes.to(dtype) * (scale.unsqueeze(1) / 127.0).to(dtype)
    return weight
