"""Fold gradients into the sums of a list of tensors: one program per chunk of a table, then one per tensor for the dots.

The mathematics and the layout of the table are those of csrc/precondition_accumulate.h.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["BLOCK", "DOTS_BLOCK", "NUM_WARPS", "precondition_accumulate_kernel", "sum_dots_kernel"]

BLOCK = 1024  # elements at once; divides the chunk
NUM_WARPS = 4
DOTS_BLOCK = 512  # chunks at once


@triton.jit
def _address(entry, column: tl.constexpr, TYPE: tl.constexpr, WHOLE: tl.constexpr):
    """The address in a column of the table as a pointer; WHOLE promises the compiler a multiple of 16 bytes."""
    pointer = tl.load(entry + column).to(tl.pointer_type(TYPE))
    if WHOLE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _float64_of(bits):
    """A float64 from its bit pattern: floats that are passed to a kernel arrive as float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _load(pointers, mask, WHOLE: tl.constexpr):
    """Values, 0 outside the mask, which WHOLE leaves aside."""
    return tl.load(pointers) if WHOLE else tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _chunk(
    entry,
    factors,
    partial_dots,
    begin,
    x_scale,
    g_scale,
    GRADIENT: tl.constexpr,
    MOMENT: tl.constexpr,
    SUM: tl.constexpr,
    WHOLE: tl.constexpr,
    UPDATE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of a tensor, from element ``begin``, whose x and g, v, and sums are stored in these types.

    WHOLE says that all of the chunk is there, v too, at addresses that are multiples of 16: it is then read without masks,
    16 bytes at a time.
    """
    x_from = _address(entry, 0, GRADIENT, WHOLE)
    g_from = _address(entry, 1, GRADIENT, WHOLE)
    v_from = _address(entry, 2, MOMENT, WHOLE)
    x_sum = _address(entry, 3, SUM, WHOLE)
    y_sum = _address(entry, 4, SUM, WHOLE)
    numel = tl.load(entry + 5)
    # Without second moments nothing of g and v is read.
    moved_numel = tl.where(tl.load(entry + 2) != 0, numel, 0)
    bias_correction = tl.load(factors).to(SUM)
    eps = tl.load(factors + 1).to(SUM)
    numerator = (tl.load(factors + 2) * _float64_of(g_scale)).to(SUM)
    factor_of_x = _float64_of(x_scale).to(SUM)
    lanes = tl.arange(0, BLOCK)
    x_y = tl.zeros([BLOCK], tl.float64)
    x_y_sum = tl.zeros([BLOCK], tl.float64)
    y_x_sum = tl.zeros([BLOCK], tl.float64)
    for part in range(0, CHUNK, BLOCK):
        offsets = begin + part + lanes
        inside = offsets < numel
        moved = offsets < moved_numel
        x = _load(x_from + offsets, inside, WHOLE).to(SUM) * factor_of_x
        g = _load(g_from + offsets, moved, WHOLE).to(SUM)
        v = _load(v_from + offsets, moved, WHOLE).to(SUM)
        before_x = _load(x_sum + offsets, inside, WHOLE)
        before_y = _load(y_sum + offsets, inside, WHOLE)
        # sqrt takes numbers below the normal ones for 0; in float64 there is no other, and none needed.
        root = tl.sqrt(v * bias_correction) if tl.float64 == SUM else tl.sqrt_rn(v * bias_correction)
        # A scale of 0, not a y of 0: a gradient that is not finite stays visible.
        y = g * tl.where(root == 0.0, 0.0, numerator / (root + eps))
        wide_x = x.to(tl.float64)
        wide_y = y.to(tl.float64)
        x_y += wide_x * wide_y
        x_y_sum += wide_x * before_y.to(tl.float64)
        y_x_sum += wide_y * before_x.to(tl.float64)
        if UPDATE:
            if WHOLE:
                tl.store(x_sum + offsets, before_x + x)
                tl.store(y_sum + offsets, before_y + y)
            else:
                tl.store(x_sum + offsets, before_x + x, mask=inside)
                tl.store(y_sum + offsets, before_y + y, mask=inside)
    tl.store(partial_dots, tl.sum(x_y, axis=0))
    tl.store(partial_dots + 1, tl.sum(x_y_sum, axis=0))
    tl.store(partial_dots + 2, tl.sum(y_x_sum, axis=0))


@triton.jit
def _chunk_of_kind(
    entry,
    factors,
    partial_dots,
    begin,
    x_scale,
    g_scale,
    kind,
    KIND: tl.constexpr,
    GRADIENT: tl.constexpr,
    MOMENT: tl.constexpr,
    SUM: tl.constexpr,
    UPDATE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The chunk, if it is of this kind."""
    if kind == KIND:
        addresses = tl.load(entry) | tl.load(entry + 1) | tl.load(entry + 2)
        addresses |= tl.load(entry + 3) | tl.load(entry + 4)
        present = (tl.load(entry + 2) != 0) & (begin + CHUNK <= tl.load(entry + 5))
        if present & ((addresses & 15) == 0):
            _chunk(
                entry, factors, partial_dots, begin, x_scale, g_scale,
                GRADIENT, MOMENT, SUM, True, UPDATE, CHUNK, BLOCK,
            )  # fmt: skip
        else:
            _chunk(
                entry, factors, partial_dots, begin, x_scale, g_scale,
                GRADIENT, MOMENT, SUM, False, UPDATE, CHUNK, BLOCK,
            )  # fmt: skip


@triton.jit
def precondition_accumulate_kernel(
    entries,  # [tensors, 8] int64
    factors,  # [tensors, 3] float64
    owners,  # [chunks] int32
    partial_dots,  # [chunks, 3] float64
    x_scale,  # bit pattern of a float64
    g_scale,  # bit pattern of a float64
    KINDS: tl.constexpr,
    UPDATE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk. KINDS has bit k set where a tensor of kind k is in the table: other kinds are not compiled."""
    chunk = tl.program_id(0).to(tl.int64)
    owner = tl.load(owners + chunk).to(tl.int64)
    entry = entries + owner * 8
    begin = (chunk - tl.load(entry + 6)) * CHUNK
    kind = tl.load(entry + 7)
    own_factors = factors + owner * 3
    dots = partial_dots + chunk * 3
    if KINDS & 1:
        _chunk_of_kind(
            entry, own_factors, dots, begin, x_scale, g_scale, kind, 0,
            tl.float32, tl.float32, tl.float32, UPDATE, CHUNK, BLOCK,
        )  # fmt: skip
    if KINDS & 2:
        _chunk_of_kind(
            entry, own_factors, dots, begin, x_scale, g_scale, kind, 1,
            tl.bfloat16, tl.float32, tl.float32, UPDATE, CHUNK, BLOCK,
        )  # fmt: skip
    if KINDS & 4:
        _chunk_of_kind(
            entry, own_factors, dots, begin, x_scale, g_scale, kind, 2,
            tl.float16, tl.float32, tl.float32, UPDATE, CHUNK, BLOCK,
        )  # fmt: skip
    if KINDS & 8:
        _chunk_of_kind(
            entry, own_factors, dots, begin, x_scale, g_scale, kind, 3,
            tl.bfloat16, tl.bfloat16, tl.float32, UPDATE, CHUNK, BLOCK,
        )  # fmt: skip
    if KINDS & 16:
        _chunk_of_kind(
            entry, own_factors, dots, begin, x_scale, g_scale, kind, 4,
            tl.float64, tl.float64, tl.float64, UPDATE, CHUNK, BLOCK,
        )  # fmt: skip


@triton.jit
def sum_dots_kernel(
    entries,  # [tensors, 8] int64
    partial_dots,  # [chunks, 3] float64
    dots,  # [tensors, 3] float64
    tensors,
    chunks,
    BLOCK: tl.constexpr,
):
    """Sum the chunks of one tensor, in an order that depends on how many there are and on nothing else."""
    tensor = tl.program_id(0).to(tl.int64)
    begin = tl.load(entries + tensor * 8 + 6)
    end = tl.load(entries + (tensor + 1) * 8 + 6, mask=tensor + 1 < tensors, other=chunks)
    lanes = tl.arange(0, BLOCK)
    x_y = tl.zeros([BLOCK], tl.float64)
    x_y_sum = tl.zeros([BLOCK], tl.float64)
    y_x_sum = tl.zeros([BLOCK], tl.float64)
    for first in range(begin, end, BLOCK):
        offsets = first + lanes
        inside = offsets < end
        x_y += tl.load(partial_dots + offsets * 3, mask=inside, other=0.0)
        x_y_sum += tl.load(partial_dots + offsets * 3 + 1, mask=inside, other=0.0)
        y_x_sum += tl.load(partial_dots + offsets * 3 + 2, mask=inside, other=0.0)
    own = dots + tensor * 3
    tl.store(own, tl.sum(x_y, axis=0))
    tl.store(own + 1, tl.sum(x_y_sum, axis=0))
    tl.store(own + 2, tl.sum(y_x_sum, axis=0))
