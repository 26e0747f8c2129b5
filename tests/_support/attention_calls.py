"""Cases of packed attention as call files (tests/ops/drivers/call_file.h): forward, then backward."""

from __future__ import annotations

import dataclasses

import torch
from attention_cases import AttentionCase, AttentionOutcome, assert_attention, written_prefixes
from kernel_drivers import ELEMENT_TYPES, CallImage, CallResults, Place
from logprob_cases import accumulator
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class AttentionCalls:
    """One case in an image, and where its results are, in the order of `AttentionOutcome`."""

    case: AttentionCase
    places: list[Place]
    shapes: list[tuple[int, ...]]
    dtypes: list[torch.dtype]


def _operand(tensor: Tensor | None, image: CallImage) -> tuple[Place | int | None, ...]:
    """Address and strides of a copy that has what stands between its elements too, and ends with the last of them."""
    if tensor is None:
        return (None, 0, 0)
    size = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    span = tensor.as_strided((size if tensor.numel() else 0,), (1,))
    return (image.add(span), tensor.stride(0), tensor.stride(1))


def attention_calls(case: AttentionCase, image: CallImage) -> AttentionCalls:
    """The case's two calls, with sums of the prefixes where there are any."""
    inputs = case.inputs
    dtype, wide = inputs.query.dtype, accumulator(inputs.query.dtype)
    (heads, tokens, size), key_heads = inputs.query.shape, len(inputs.key)
    prefix_tokens = 0 if inputs.prefix_key is None else inputs.prefix_key.shape[1]
    operands = (inputs.query, inputs.key, inputs.value, inputs.prefix_key, inputs.prefix_value)
    options, table = inputs.options, inputs.sequences.table
    window = 2**62 if options.window is None else options.window
    first = [field for operand in operands for field in _operand(operand, image)]
    sinks = None if options.sinks is None else image.add(options.sinks.to(wide))
    first += [image.add(table), sinks, len(table), tokens, prefix_tokens, heads, key_heads, size, window, options.scale]
    own, sums = (tokens, key_heads, size), (len(case.weights), key_heads, prefix_tokens, size)
    shapes = [(tokens, heads, size), (tokens, heads, size), own, own, sums, sums]
    dtypes = [dtype, dtype, wide, wide, wide, wide]
    places = [image.poison(torch.Size(shape).numel() * of.itemsize) for shape, of in zip(shapes, dtypes, strict=True)]
    image.call("packed_attention_forward", *first, places[0], ELEMENT_TYPES[dtype])
    wanted = [image.add(case.weights), *places[1:]] if prefix_tokens else [None, *places[1:4], None, None]
    runs = inputs.sequences.by_prefix
    last = (len(runs) - 1, *case.weights.shape, ELEMENT_TYPES[dtype])
    above = _operand(case.above, image)
    image.call("packed_attention_backward", *first, *above, image.add(runs), *wanted, *last)
    return AttentionCalls(case, places, shapes, dtypes)


def assert_attention_calls(calls: AttentionCalls, results: CallResults) -> None:
    """Against attention written out; prefixes that nothing continues from are left alone."""
    described = zip(calls.places, calls.dtypes, calls.shapes, strict=True)
    outcome = AttentionOutcome(*(results.tensor(place, dtype, *shape) for place, dtype, shape in described))
    assert_attention(outcome, calls.case)
    untouched = ~written_prefixes(calls.case)
    assert outcome.prefix_key[:, :, untouched].isnan().all()
    assert outcome.prefix_value[:, :, untouched].isnan().all()
