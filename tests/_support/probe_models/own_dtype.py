"""Norms and attention of transformers in the model's own dtype, where the library computes in fp32 whatever that is.

Two engines that add in different orders agree only as far as the narrowest step between them. With this, a comparison in fp64
is one in fp64. Rotary embeddings stay as they are: every forward reads the same cosines, whatever their precision.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn


@contextlib.contextmanager
def computing_in_own_dtype(model: nn.Module) -> Iterator[None]:
    """Every RMSNorm class and every eager attention of ``model`` without the detour through fp32, until the context ends."""
    norms = {type(m) for m in model.modules() if type(m).__name__.endswith("RMSNorm")}
    libraries = {type(m).__module__ for m in model.modules() if type(m).__module__.startswith("transformers.models.")}
    with pytest.MonkeyPatch.context() as patch:
        for norm in norms:
            # In gemma the scale is counted from 1.
            shifted = norm.__name__.startswith("Gemma")
            patch.setattr(norm, "forward", _shifted_norm if shifted else _plain_norm)
        for library in libraries:
            if hasattr(sys.modules[library], "eager_attention_forward"):
                patch.setattr(sys.modules[library], "eager_attention_forward", _attention)
        yield


def _plain_norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
    return self.weight * _normalised(hidden_states, self.variance_epsilon)


def _shifted_norm(self: nn.Module, x: Tensor) -> Tensor:
    return (1 + self.weight) * _normalised(x, self.eps)


def _normalised(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Softmax attention ``[N, heads, T, d]`` to ``[N, T, heads, d]``, capped and with sinks where a model asks for them."""
    assert dropout == 0 or not module.training
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    if s_aux is not None:
        sinks = s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    return (torch.softmax(scores, -1)[..., : key.shape[2]] @ value).transpose(1, 2).contiguous(), None
