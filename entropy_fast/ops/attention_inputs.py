"""What packed attention works on, and its forward and backward alike begin with."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from entropy_fast.errors import ConfigError
from entropy_fast.ops.registration import described

__all__ = ["AttentionInputs", "AttentionOptions", "PackedSequences", "PrefixSums"]


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """What a layer asks of its attention.

    Attributes:
        scale: of the scores.
        window: keys further back than this (counting the query's own) are not seen; None for all.
        softcap: scores are ``softcap * tanh(scores / softcap)``; None for none.
        sinks: [heads] one more score for every query of a head, of a key without a value: only the softmax's denominator knows
            of it. It is not differentiated. None for none.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


class PackedSequences:
    """Where sequences stand in a packed row, and what is derived from that once for all layers.

    Args:
        table: [S, 5] int64 (CPU): first token of each sequence and the one after its last, the same of the prefix that it
            continues from among the packed prefixes, and the row of its weights. Sequences stand one behind the other, so that
            every token is in one of them, and those of one prefix next to one another; prefixes ascend.

    Attributes:
        table: the same; not to be changed.
        tokens: N, of all sequences.
        prefix_tokens: tokens of prefixes that there are at least.
        rows: rows of weights that there are at least.
        derived: what backends make of it, by a key of theirs.

    Raises:
        ConfigError: the table is not of that form.
    """

    def __init__(self, table: Tensor) -> None:
        if table.dtype != torch.int64 or table.device.type != "cpu" or table.dim() != 2 or table.shape[1] != 5:
            raise ConfigError(
                f"sequences are a table of {table.dtype} {tuple(table.shape)} on {table.device}; expected [S, 5] int64 (CPU).",
                fix="give the span, the span of the prefix and the row of the weights of every sequence.",
            )
        self.table = table.contiguous()
        self.derived: dict[Hashable, Any] = {}
        self.tokens = self.prefix_tokens = self.rows = 0
        before = (0, 0)
        for begin, end, *prefix, row in self.table.tolist():
            first, last = prefix
            fits = self.tokens == begin <= end and 0 <= first <= last and row >= 0
            if not fits or (first < last and before != (first, last) and first < self.prefix_tokens):
                raise ConfigError(
                    f"sequence {[begin, end, first, last, row]} follows token {self.tokens} and prefix {before}; expected "
                    "spans one behind the other, prefixes one after the other, and no negative number.",
                    fix="put the sequences in the order of their tokens, those of one prefix together.",
                )
            self.tokens, self.rows = end, max(self.rows, row + 1)
            if first < last:
                before, self.prefix_tokens = (first, last), last

    @functools.cached_property
    def each(self) -> Tensor:
        """[S + 1] bounds of runs of one sequence."""
        return torch.arange(len(self.table) + 1)

    @functools.cached_property
    def by_prefix(self) -> Tensor:
        """[R + 1] bounds of runs of sequences that have one prefix; those that have none are by themselves."""
        prefixes = [tuple(prefix) for prefix in self.table[:, 2:4].tolist()]
        new = [i for i, (one, two) in enumerate(itertools.pairwise(prefixes), 1) if one != two or two[0] == two[1]]
        return torch.tensor([0, *new, len(prefixes)] if prefixes else [0])


@dataclasses.dataclass(frozen=True)
class AttentionInputs:
    """Queries, keys and values of sequences packed end to end, and of the prefixes that they continue from.

    Attributes:
        query: [heads, N, D].
        key: [key heads, N, D].
        value: [key heads, N, D'].
        prefix_key: [key heads, P, D]; None where no sequence has a prefix.
        prefix_value: [key heads, P, D'], likewise.
        sequences: where they stand.
        options: scale, window, softcap, sinks.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    prefix_key: Tensor | None
    prefix_value: Tensor | None
    sequences: PackedSequences
    options: AttentionOptions

    def check(self) -> None:
        """Compare shapes, dtypes and devices.

        Raises:
            ConfigError: they do not fit together.
        """
        q, k, v, options = self.query, self.key, self.value, self.options
        prefixes = (self.prefix_key, self.prefix_value)
        given = [t for t in (q, k, v, *prefixes) if t is not None]
        fits = all(t.dim() == 3 and t.dtype == q.dtype and t.device == q.device for t in given)
        fits = fits and q.is_floating_point() and 0 not in (len(q), len(k), q.shape[2], v.shape[2])
        fits = fits and len(q) % len(k) == 0 and q.shape[1:] == k.shape[1:] and k.shape[:2] == v.shape[:2]
        fits = fits and q.shape[1] == self.sequences.tokens
        if len(given) == 5:
            before, values = given[3:]
            fits = (
                fits and before.shape == (len(k), before.shape[1], k.shape[2]) and before.shape[:2] == values.shape[:2]
            )
            fits = fits and v.shape[2] == values.shape[2] and before.shape[1] >= self.sequences.prefix_tokens
        else:
            fits = fits and len(given) == 3 and not self.sequences.prefix_tokens
        sinks = options.sinks
        if sinks is not None:
            fits = fits and sinks.shape == (len(q),) and sinks.is_floating_point() and sinks.device == q.device
        if not fits:
            found = ", ".join("None" if t is None else described(t) for t in (q, k, v, *prefixes, sinks))
            raise ConfigError(
                f"packed_attention got {found} (q, k, v, keys and values of prefixes, sinks) for {self.sequences.tokens} "
                f"tokens behind {self.sequences.prefix_tokens}; expected [heads, N, D], [key heads, N, D], "
                "[key heads, N, D'], the same with P for N, and [heads], of one floating dtype on one device.",
                fix="give what the table of sequences speaks of.",
            )
        if (options.window is not None and options.window < 1) or (
            options.softcap is not None and not options.softcap > 0
        ):
            raise ConfigError(
                f"packed_attention got window {options.window} and softcap {options.softcap}.",
                fix="give a window of at least 1 and a positive softcap, or None.",
            )


@dataclasses.dataclass(frozen=True)
class PrefixSums:
    """Where sums over the sequences of every prefix go, for every column of weights.

    Attributes:
        weights: [C, rows] in the dtype of the sums, contiguous.
        key: [C, key heads, P, D] in fp32 or wider, contiguous; written for every prefix that has a sequence.
        value: [C, key heads, P, D'], likewise.
    """

    weights: Tensor
    key: Tensor
    value: Tensor

    def check(self, inputs: AttentionInputs) -> None:
        """Compare with what they are sums for.

        Raises:
            ConfigError: they do not fit.
        """
        states = (inputs.prefix_key, inputs.prefix_value)
        fits = self.weights.dim() == 2 and self.weights.shape[1] >= inputs.sequences.rows
        for total, state in zip((self.key, self.value), states, strict=True):
            fits = fits and state is not None and total.shape == (len(self.weights), *state.shape)
        wide = torch.promote_types(inputs.query.dtype, torch.float32)
        for t in (self.weights, self.key, self.value):
            fits = fits and t.dtype == wide and t.device == inputs.query.device and t.is_contiguous()
        if not fits:
            found = ", ".join(map(described, (self.weights, self.key, self.value)))
            raise ConfigError(
                f"packed_attention_backward got {found} as weights and sums; expected contiguous {wide} [C, rows] for "
                f"{inputs.sequences.rows} rows, and [C, key heads, P, D] like the prefixes' keys and values.",
                fix="make them like the keys and values of the prefixes, which have to be there.",
            )
