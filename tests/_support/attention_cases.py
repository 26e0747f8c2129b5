"""Inputs for packed attention, attention written out in float64, and the rule by which a result is judged."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from logprob_cases import accumulator
from torch import Tensor

from entropy_fast.ops.attention_inputs import AttentionInputs, AttentionOptions, PackedSequences
from entropy_fast.reference import packed_attention

# Prefix length, and lengths of the sequences that continue from it.
Shapes = Sequence[tuple[int, Sequence[int]]]


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """One call, forward and backward.

    Attributes:
        inputs: sequences in the order of their groups, those without a token too.
        above: [heads, N, D] gradient of the output.
        weights: [C, S].
    """

    inputs: AttentionInputs
    above: Tensor
    weights: Tensor


@dataclasses.dataclass(frozen=True)
class AttentionOutcome:
    """What an implementation makes of a case, tokens first; sums are [C, key heads, P, D]."""

    output: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    prefix_key: Tensor
    prefix_value: Tensor


def attention_case(
    shapes: Shapes,
    dtype: torch.dtype = torch.float32,
    *,
    heads: int = 4,
    key_heads: int = 2,
    size: int = 16,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    layout: str = "heads first",
    columns: int = 2,
    seed: int = 0,
) -> AttentionCase:
    """Random numbers of the dtype, in memory by heads, by tokens, or by heads with something between heads and tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n_heads: int, tokens: int) -> Tensor:
        values = torch.randn(n_heads, tokens, size, generator=generator, dtype=torch.float64).to(dtype)
        if layout == "tokens first":
            return values.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "apart":
            storage = torch.full((n_heads, tokens + 2, size + 3), torch.nan, dtype=dtype)
            storage[:, 1 : tokens + 1, 2 : size + 2] = values
            return storage[:, 1 : tokens + 1, 2 : size + 2]
        return values

    sequences = []
    n_tail = n_prefix = 0
    for prefix, lengths in shapes:
        for length in lengths:
            sequences.append((n_tail, n_tail + length, n_prefix, n_prefix + prefix, len(sequences)))
            n_tail += length
        n_prefix += prefix
    sunk = torch.randn(heads, generator=generator, dtype=torch.float64).mul(2).to(dtype) if sinks else None
    options = AttentionOptions(0.7 / math.sqrt(size), window, softcap, sunk)
    inputs = AttentionInputs(
        draw(heads, n_tail),
        draw(key_heads, n_tail),
        draw(key_heads, n_tail),
        draw(key_heads, n_prefix) if n_prefix else None,
        draw(key_heads, n_prefix) if n_prefix else None,
        PackedSequences(torch.tensor(sequences, dtype=torch.int64).view(-1, 5)),
        options,
    )
    weights = torch.randn(columns, len(sequences), generator=generator, dtype=torch.float64).to(accumulator(dtype))
    return AttentionCase(inputs, draw(heads, n_tail), weights)


def written_out(case: AttentionCase) -> AttentionOutcome:
    """The reference in float64, a sequence at a time, differentiated by autograd."""
    inputs, options = case.inputs, case.inputs.options
    q, k, v = (t.double().clone().requires_grad_() for t in (inputs.query, inputs.key, inputs.value))
    given = [torch.zeros(len(k), 0, k.shape[2]) if t is None else t for t in (inputs.prefix_key, inputs.prefix_value)]
    prefixes = [t.double().clone().requires_grad_() for t in given]
    outputs = []
    gradients = [torch.zeros_like(t).detach() for t in (q, k, v)]
    sums = [torch.zeros(len(case.weights), *t.shape, dtype=torch.float64) for t in prefixes]
    for row in inputs.sequences.table:
        begin, end, *_, weight = row.tolist()
        found = packed_attention(
            *(q, k, v, row[None]),
            prefix_key=prefixes[0],
            prefix_value=prefixes[1],
            scale=options.scale,
            window=options.window,
            softcap=options.softcap,
            sinks=options.sinks,
        )
        outputs.append(found.detach())
        S = (found.transpose(0, 1) * case.above[:, begin:end].double()).sum()
        back = torch.autograd.grad(S, (q, k, v, *prefixes))
        for total, gradient in zip(gradients, back[:3], strict=True):
            total += gradient
        for total, gradient in zip(sums, back[3:], strict=True):
            total += case.weights[:, weight, None, None, None].double() * gradient
    output = torch.cat([q.new_zeros(0, len(q), v.shape[2]).detach(), *outputs])
    return AttentionOutcome(output, *(t.transpose(0, 1) for t in gradients), *sums)


def written_prefixes(case: AttentionCase) -> Tensor:
    """[P] which tokens of prefixes have a sequence behind them, and so sums."""
    tokens = 0 if case.inputs.prefix_key is None else case.inputs.prefix_key.shape[1]
    found = torch.zeros(tokens, dtype=torch.bool)
    for begin, end in case.inputs.sequences.table[:, 2:4].tolist():
        found[begin:end] = True
    return found


def _longest(vectors: Tensor) -> float:
    return float(vectors.double().norm(dim=-1).max()) if vectors.numel() else 0.0


def assert_attention(outcome: AttentionOutcome, case: AttentionCase) -> None:
    """Within the roundings of a chain of products in the accumulator's dtype, and one in that of the result."""
    expected = written_out(case)
    behind = written_prefixes(case)
    wide = accumulator(case.inputs.query.dtype)
    # Of the terms of ∂/∂q and ∂/∂k, which cancel where nearly all weight is on one key.
    term = case.inputs.options.scale * _longest(case.above) * _longest(case.inputs.value)
    term *= max(_longest(case.inputs.query), _longest(case.inputs.key)) * max(1.0, _longest(case.weights))
    for field in dataclasses.fields(AttentionOutcome):
        found, truth = getattr(outcome, field.name), getattr(expected, field.name)
        if field.name.startswith("prefix"):
            found, truth = found[:, :, behind], truth[:, :, behind]
        assert found.shape == truth.shape, field.name
        if not truth.numel():
            continue
        rounded = found.dtype
        largest = truth.abs().amax()
        allowed = 64 * torch.finfo(wide).eps * largest + 2 * torch.finfo(rounded).eps * truth.abs()
        if field.name in ("query", "key", "prefix_key"):
            allowed = allowed + torch.finfo(wide).eps * term
        excess = (found.double() - truth).abs() - allowed
        assert not (~(excess <= 0)).any(), f"{field.name} is off by {excess.max()} too much"
