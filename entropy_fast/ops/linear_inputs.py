"""What `linear_token_logprobs` works on, as every backend of it is given it, and whether it fits together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from entropy_fast.errors import ConfigError

__all__ = ["LINEAR_BACKENDS", "LinearInputs", "as_autocast", "check_linear_arguments"]

LINEAR_BACKENDS = ("reference", "native", "triton")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class LinearInputs(NamedTuple):
    """Arguments of the op, in the order of its schema; the dispatcher leaves out trailing ones that have their default.

    They mean what `entropy_fast.ops.linear_token_logprobs` says.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    want_entropy: bool = False
    unit_gradients: bool = False
    ignore_index: int = -100
    backend: str = "auto"

    @property
    def n_units(self) -> int:
        """How many unit gradients are wanted."""
        return self.unit_gradients * (1 + self.want_entropy)


def as_autocast(hidden: Tensor) -> Tensor:
    """Hidden states as ``F.linear`` has them under autocast, which leaves float64 alone."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device) or hidden.dtype == torch.float64 or not hidden.is_floating_point():
        return hidden
    return hidden.to(torch.get_autocast_dtype(device))


def check_linear_arguments(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    *,
    may_be_empty: bool = False,
) -> None:
    """Raise unless shapes, dtypes, devices and softcap fit together; ``weight`` has rows unless it ``may_be_empty``.

    Raises:
        ConfigError: they do not; the message names the op.
    """
    shapes = {"hidden": hidden.dim() == 2, "weight": weight.dim() == 2, "targets": targets.dim() == 1}
    fits = all(shapes.values()) and hidden.shape == (targets.shape[0], weight.shape[1])
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        found = ", ".join(
            f"{name} {tuple(tensor.shape)}"
            for name, tensor in (("hidden", hidden), ("weight", weight), ("targets", targets), ("bias", bias))
            if tensor is not None
        )
        raise ConfigError(
            f"{op} got {found}; expected [rows, H], [vocabulary, H], [rows] and [vocabulary].",
            fix="flatten all leading dimensions into rows; weight is that of the output layer, as nn.Linear keeps it.",
        )
    dtypes = [tensor.dtype for tensor in (hidden, weight, bias) if tensor is not None]
    if any(dtype not in _DTYPES for dtype in dtypes) or targets.dtype != torch.int64:
        raise ConfigError(
            f"{op} got {', '.join(map(str, dtypes))} and {targets.dtype} targets; expected float32, "
            "float64, bfloat16 or float16, and int64.",
            fix="convert them first; a quantised output layer has to be dequantised.",
        )
    if weight.shape[0] == 0 and not may_be_empty:
        raise ConfigError(
            f"{op} got a weight without rows: a vocabulary of 0.",
            fix="pass the output layer's [V, H] weight.",
        )
    devices = {tensor.device for tensor in (hidden, weight, targets, bias) if tensor is not None}
    if len(devices) > 1:
        raise ConfigError(
            f"{op} got tensors on {', '.join(sorted(map(str, devices)))}.",
            fix="move them to one device.",
        )
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ConfigError(f"{op} got softcap={softcap}; expected a positive number.", fix="pass None for no softcap.")
