"""What a competent user would write, in ten minutes or fewer, instead of calling this package."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ROWS = 128


def logprobs_and_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """``log_softmax`` in float32 (float64 for float64), ``gather`` of the target, entropy as ``-(p * logp).sum()``."""
    logp = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
    return logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)


def logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """``log_softmax`` in float32 and ``gather`` of the target."""
    logp = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
    return logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """``F.cross_entropy`` of float32 logits with ``reduction="none"``; no entropy."""
    return -F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets, reduction="none")


def linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """``F.linear`` in the dtype of its inputs, then :func:`logprobs`."""
    return logprobs(F.linear(hidden, weight), targets)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """``F.linear`` in the dtype of its inputs, then :func:`cross_entropy`."""
    return cross_entropy(F.linear(hidden, weight), targets)


def linear_logprobs_and_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """``F.linear`` in the dtype of its inputs, then :func:`logprobs_and_entropy`."""
    return logprobs_and_entropy(F.linear(hidden, weight), targets)


def with_gradient(
    function: Callable[..., Any], hidden: Tensor, weight: Tensor, targets: Tensor
) -> dict[str, Tensor | list[Tensor]]:
    """Forward, and one backward of the sum of each result to ``hidden``; the output layer is frozen."""
    leaf = hidden.detach().requires_grad_()
    with torch.enable_grad():
        results = function(leaf, weight, targets)
        if isinstance(results, Tensor):
            return {"logprob": results.detach(), "unit_logprob": torch.autograd.grad(results.sum(), leaf)[0]}
        logprob, entropy = results
        of_logprob = torch.autograd.grad(logprob.sum(), leaf, retain_graph=True)[0]
        of_entropy = torch.autograd.grad(entropy.sum(), leaf)[0]
    return {
        "logprob": logprob.detach(),
        "entropy": entropy.detach(),
        "unit_logprob": of_logprob,
        "unit_entropy": of_entropy,
    }


def with_gradient_in_chunks(
    function: Callable[..., Any], hidden: Tensor, weight: Tensor, targets: Tensor
) -> dict[str, Tensor | list[Tensor]]:
    """:func:`with_gradient` for 128 rows at a time: what one does when memory runs out."""
    parts = [
        with_gradient(function, h, weight, t)
        for h, t in zip(hidden.split(CHUNK_ROWS), targets.split(CHUNK_ROWS), strict=True)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def fold(x: Tensor, g: Tensor, v: Tensor, x_sum: Tensor, y_sum: Tensor, correction: float, eps: float) -> Tensor:
    """``y = g / ((v * bc).sqrt() + eps)``, ``torch.dot`` of three pairs in float64, ``X += x``, ``Y += y``."""
    y = g / ((v * correction).sqrt() + eps)
    x64, y64, x_sum64, y_sum64 = (t.double().flatten() for t in (x, y, x_sum, y_sum))
    dots = torch.stack([torch.dot(x64, y64), torch.dot(x64, y_sum64), torch.dot(y64, x_sum64)])
    x_sum += x
    y_sum += y
    return dots


def fold_by_sums(
    x: Tensor, g: Tensor, v: Tensor, x_sum: Tensor, y_sum: Tensor, correction: float, eps: float
) -> Tensor:
    """:func:`fold` with each dot as ``(a.double() * b.double()).sum()``, as it is often written."""
    y = g / ((v * correction).sqrt() + eps)
    dots = torch.stack([(a.double() * b.double()).sum() for a, b in ((x, y), (x, y_sum), (y, x_sum))])
    x_sum += x
    y_sum += y
    return dots


def fold_foreach(
    x: list[Tensor],
    g: list[Tensor],
    v: list[Tensor],
    x_sum: list[Tensor],
    y_sum: list[Tensor],
    correction: float,
    eps: float,
) -> Tensor:
    """:func:`fold` with ``torch._foreach_*`` for all tensors at once; the dots stay per tensor, for there is no such call."""
    scale = torch._foreach_mul(v, correction)
    torch._foreach_sqrt_(scale)
    torch._foreach_add_(scale, eps)
    y = torch._foreach_div(g, scale)
    dots = []
    for parts in zip(x, y, x_sum, y_sum, strict=True):
        x64, y64, x_sum64, y_sum64 = (t.double().flatten() for t in parts)
        dots.append(torch.stack([torch.dot(x64, y64), torch.dot(x64, y_sum64), torch.dot(y64, x_sum64)]))
    torch._foreach_add_(x_sum, x)
    torch._foreach_add_(y_sum, y)
    return torch.stack(dots)


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` for the shapes at hand, one compilation for each."""
    return torch.compile(function, dynamic=False)
