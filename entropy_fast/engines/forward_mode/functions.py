"""Two of torch's functions whose forward derivative is missing or is not the one that reverse mode has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from entropy_fast.engines.forward_mode.parameters import tangent_of

__all__ = ["FunctionsWithTangents"]

# Of the scores of one block of queries; the math kernel has about seven arrays of this size at once, tangents included.
_SCORE_BYTES = 2**23
# A block has at least as many: with fewer, large batches would go through a kernel launch for every query.
_FEWEST_QUERIES = 64


class FunctionsWithTangents(TorchFunctionMode):
    """Attention and look-ups go by the rules here, everything else as torch has it.

    For use inside a ``dual_level`` and ``sdpa_kernel(SDPBackend.MATH)``.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called by torch in place of its function ``func``."""
        del types
        options = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **options)
        if func is F.embedding:
            return _embedding(*args, **options)
        return func(*args, **options)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """Attention by torch's math kernel, which has a forward derivative, for a few queries at a time.

    The fused kernels have none. The math kernel holds all scores of the queries it is given, ``[..., queries, keys]``, so it is
    given as many as fit `_SCORE_BYTES`, and `_FEWEST_QUERIES` at least.
    """
    n_queries, n_keys = query.shape[-2], key.shape[-2]
    each = max(query.shape[:-2].numel(), 1) * n_keys * max(4, query.element_size())
    step = max(_FEWEST_QUERIES, _SCORE_BYTES // max(each, 1))
    parts = []
    for begin in range(0, n_queries, step):
        end = min(begin + step, n_queries)
        mask, last = attn_mask, n_keys
        if is_causal:
            # Of a block of queries, which the kernel's own causal mask would take for the first ones.
            last = min(end, n_keys)
            places = torch.arange(last, device=query.device)
            mask = places <= torch.arange(begin, end, device=query.device).unsqueeze(1)
        elif mask is not None and mask.shape[-2] != 1:
            mask = mask[..., begin:end, :]
        parts.append(
            F.scaled_dot_product_attention(
                query[..., begin:end, :],
                key[..., :last, :],
                value[..., :last, :],
                attn_mask=mask,
                dropout_p=dropout_p,
                **options,
            )
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def _embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, *arguments: Any, **options: Any
) -> Tensor:
    """A look-up whose padding row is a constant, as it is in reverse mode; torch's forward derivative goes through it."""
    found = F.embedding(input, weight, padding_idx, *arguments, **options)
    primal, tangent = tangent_of(found)
    if padding_idx is None or tangent is None:
        return found
    constant = (input == padding_idx % weight.shape[0]).unsqueeze(-1)
    dual: Tensor = forward_ad.make_dual(primal, tangent.masked_fill(constant, 0.0))  # type: ignore[no-untyped-call]
    return dual
