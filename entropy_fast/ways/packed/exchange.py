"""What stands in for a transformers model's attention while packed sequences go through it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from entropy_fast.ops.attention_inputs import AttentionOptions
from entropy_fast.ways.packed.attention import packed_attention
from entropy_fast.ways.packed.groups import AttentionGroups
from entropy_fast.ways.packed.layout import PackedLayout
from entropy_fast.ways.packed.prefix_states import PrefixStates

__all__ = ["PackedRun"]

# What a layer may pass to its attention that changes nothing here.
_HARMLESS = frozenset({"position_ids", "cache_position", "position_embeddings", "output_attentions", "use_cache"})


class PackedRun:
    """The state of one microbatch's forwards and backwards.

    Args:
        layout: of the microbatch.
        device: where the model is.
        copies: labels for each of which the prefixes stand behind the tails in one row; none for a row of their own.

    Attributes:
        copies: the same.
        states: keys and values of prefixes in a row of their own, by layer, in the order of the forward.
        weights: what the backward of attention wants to know (`packed_attention`), put there before it.
        on_tails: whether the forward or backward under way is that of the tails.
    """

    def __init__(self, layout: PackedLayout, device: torch.device, copies: Sequence[int] = ()) -> None:
        self.states: dict[int, PrefixStates] = {}
        self.weights: list[Tensor] = []
        self.copies = tuple(copies)
        self.on_tails = False
        self._tails = AttentionGroups(layout.groups, tails=True, copies=copies)
        self._prefixes = AttentionGroups(layout.groups, tails=False)

    def copy(self, place: int) -> slice:
        """Where the prefixes of a copy stand in the row of the tails."""
        return self._tails.copy(place)

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """An attention function as transformers calls it.

        Raises:
            NotImplementedError: the layer asks for something that is not implemented here.
        """
        if s_aux is not None and s_aux.requires_grad:
            raise NotImplementedError(f"attention of {type(module).__name__}: sinks that are trained")
        unknown = [name for name, given in others.items() if isinstance(given, Tensor) and name not in _HARMLESS]
        if unknown or dropout or attention_mask is not None or query.shape[0] != 1:
            raise NotImplementedError(
                f"attention of {type(module).__name__}: {', '.join(unknown) or 'mask or dropout'}"
            )
        device = query.device.type
        if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
            # As scaled_dot_product_attention has it; the backward runs outside of autocast.
            query, key, value = (t.to(torch.get_autocast_dtype(device)) for t in (query, key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        options = AttentionOptions(scale, sliding_window, softcap, s_aux)
        groups = self._tails if self.on_tails else self._prefixes
        prefix = self.states.get(id(module)) if self.on_tails else None
        found = packed_attention(query, key, value, groups, prefix, self.weights, options)
        if not self.on_tails:
            # A layer whose activations are computed again in the backward comes here twice.
            self.states.setdefault(id(module), PrefixStates(key, value))
        return found, None
