"""Attention of one padded group and its backward: by torch's fused kernels, or written out where a softcap bends the scores.

Legend: q, k, v queries, keys, values; z scores; p = softmax(z); o = p v.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["AttentionOptions", "attend", "attend_backward", "causal_mask"]

# Scores that are written out at a time.
_AT_ONCE = 2**22


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """What a layer asks of its attention.

    Attributes:
        scale: of the scores.
        window: keys further back than this (counting the query's own) are not seen; None for all.
        softcap: scores are ``softcap * tanh(scores / softcap)``; None for none.
    """

    scale: float
    window: int | None
    softcap: float | None


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, options: AttentionOptions
) -> tuple[Tensor, Tensor | None]:
    """O of every key head's queries, and what the backward of the kernel that was used wants to know.

    Args:
        query: [G, key heads, T, D], T the queries of all heads that share a key head.
        key: [G, key heads, S, D].
        value: [G, key heads, S, D'].
        mask: [T, S], 0 where a query sees a key and -inf elsewhere.
        options: scale and softcap.

    Returns:
        [G, key heads, T, D'], and None where scores are to be computed by other means in the backward.
    """
    if options.softcap is not None:
        output = query.new_empty(*query.shape[:3], value.shape[-1])
        for part in _parts(query, key):
            p, _ = _probabilities(query[part], key[part], mask, options)
            output[part] = p.to(value.dtype) @ value[part]
        return output, None
    if _has_own_backward(query, value):
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output, log_sums = fused(query, key, value, 0.0, False, attn_mask=mask, scale=options.scale)
        return output, log_sums
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=options.scale), None


def attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    options: AttentionOptions,
    above: Tensor,
    output: Tensor | None,
    log_sums: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v for ``above``, the gradient of o; ``output`` and ``log_sums`` are from `attend`."""
    if options.softcap is None and log_sums is not None:
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = fused(above, query, key, value, output, log_sums, 0.0, False, attn_mask=mask, scale=options.scale)
        return dq, dk, dv
    if options.softcap is None:
        with torch.enable_grad():
            q, k, v = (t.detach().requires_grad_() for t in (query, key, value))
            again = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=options.scale)
        dq, dk, dv = torch.autograd.grad(again, (q, k, v), above)
        return dq, dk, dv
    found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    for part in _parts(query, key):
        p, slope = _probabilities(query[part], key[part], mask, options)
        found[2][part] = p.to(above.dtype).transpose(2, 3) @ above[part]
        dp = (above[part] @ value[part].transpose(2, 3)).to(p.dtype)
        dz = torch._softmax_backward_data(dp, p, -1, p.dtype).mul_(slope)
        dz = dz.mul_(options.scale).to(query.dtype)
        found[0][part] = dz @ key[part]
        found[1][part] = dz.transpose(2, 3) @ query[part]
    return found


def _has_own_backward(query: Tensor, value: Tensor) -> bool:
    """Whether torch's fused kernel for CPUs, called by its name, takes these; its backward needs no second forward."""
    known = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward")
    return known and query.device.type == "cpu" and query.dtype != torch.float16 and query.shape[-1] == value.shape[-1]


def _parts(query: Tensor, key: Tensor) -> Iterator[slice]:
    size = max(1, _AT_ONCE // max(1, query.shape[1] * query.shape[2] * key.shape[2]))
    for begin in range(0, query.shape[0], size):
        yield slice(begin, min(begin + size, query.shape[0]))


def _probabilities(query: Tensor, key: Tensor, mask: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """p, and the derivative of the softcap at each score, in fp32 or wider, as transformers has it."""
    assert options.softcap is not None
    wide = torch.promote_types(query.dtype, torch.float32)
    bent = torch.tanh((query @ key.transpose(2, 3)).to(wide) * (options.scale / options.softcap))
    slope = 1 - bent.square()
    return torch.softmax(bent.mul_(options.softcap).add_(mask), -1), slope


def causal_mask(
    prefix: int, width: int, repeat: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[repeat * width, prefix + width] mask of queries that follow ``prefix`` keys, for ``repeat`` heads in a line."""
    query = prefix + torch.arange(width, device=device)[:, None]
    column = torch.arange(prefix + width, device=device)[None]
    hidden = column > query
    if window is not None:
        hidden |= column <= query - window
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -math.inf).repeat(repeat, 1)
