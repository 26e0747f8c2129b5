"""Log-probabilities and unit gradients from hidden states: logits of some rows, their softmax, and products with p.

Three kernels work on a workspace with the logits of a few rows: one fills it by matrix products and keeps three numbers
of every tile, one combines these numbers row by row, and one multiplies the softmax weights with the output layer.

Legend: h hidden state, W output layer, y the target, z logits, s_v the softcap's derivative at z_v (1 without softcap),
H the row's entropy. Unit gradients are
    d logprob / d h = (1 - p_y) s_y W_y - sum_{v != y} p_v s_v W_v
    d entropy / d h = -sum_v p_v (log p_v + H) s_v W_v
The target is kept out of all sums, for 1 - p_y of a likely token would cancel; it joins in float64.

Everything but the factors of the matrix products is in ``ACCUMULATOR``: float32, or float64 for float64 hidden states. The
factors have the type of the hidden states, unless ``UPCAST`` converts them first.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from entropy_fast.kernels.token_logprobs import shift_of, times_log_weight

__all__ = [
    "ROW_STATE",
    "TILES_BLOCK",
    "Tiles",
    "logits_kernel",
    "row_kernel",
    "tiles_for",
    "unit_gradients_kernel",
]

TILES_BLOCK = 1024  # tiles of the vocabulary at once
# What row_kernel leaves for unit_gradients_kernel, in float64: the maximum; maximum - E_p[z]; 1 / sum; the coefficient of
# W_y in the gradient of the logprob, and in that of the entropy.
ROW_STATE = 5


class Tiles(NamedTuple):
    """Tile sizes of one element type.

    A row's result depends on them, and so on its type, but not on how many rows there are.

    Attributes:
        rows: rows of a tile of the workspace.
        tokens: tokens of a tile of the workspace.
        depth: hidden units at once in the product that fills it.
        units: hidden units of a tile of the unit gradients.
        unit_depth: tokens at once in their product.
        warps: warps of a program.
        stages: how many loads are under way.
    """

    rows: int
    tokens: int
    depth: int
    units: int
    unit_depth: int
    warps: int
    stages: int


_HALF = Tiles(rows=64, tokens=128, depth=64, units=128, unit_depth=32, warps=8, stages=3)
_SINGLE = Tiles(rows=64, tokens=64, depth=16, units=64, unit_depth=16, warps=8, stages=2)
_DOUBLE = Tiles(rows=64, tokens=32, depth=16, units=32, unit_depth=16, warps=8, stages=2)


def tiles_for(bits: int) -> Tiles:
    """The tile sizes for hidden states of this many bits."""
    return {16: _HALF, 32: _SINGLE, 64: _DOUBLE}[bits]


@triton.jit
def _tanh(x):
    """Tanh without cancellation near 0, where it is a ratio of polynomials."""
    square = x * x
    above = 135135.0 + square * (17325.0 + square * (378.0 + square))
    below = 135135.0 + square * (62370.0 + square * (3150.0 + square * 28.0))
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.5, x * (above / below), tl.where(x < 0, -far, far))


# The number of rows is another in every batch: kernels that are compiled for special values of it would be many.
@triton.jit(do_not_specialize=["rows"])
def logits_kernel(
    hidden,  # [N, units], rows hidden_stride elements apart
    weight,  # [vocabulary, units], rows weight_stride elements apart, any floating type
    bias,  # [vocabulary], any floating type, or None
    targets,  # [N] int64
    chosen,  # [rows] int64: which of the N rows these are
    workspace,  # [whole tiles of rows, whole tiles of the vocabulary] of ACCUMULATOR
    partial,  # 3 parts of [rows, tiles of the vocabulary] of ACCUMULATOR, part_stride elements apart
    rows,
    units,
    vocabulary,
    hidden_stride,
    weight_stride,
    part_stride,
    ACCUMULATOR: tl.constexpr,
    UPCAST: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile of logits, -inf beyond the vocabulary.

    And three numbers of every row of it, with the target left out: the maximum m, sum e^(z - m), sum e^(z - m) (z - m).
    """
    row_tiles = tl.cdiv(rows, ROWS)
    # Programs next to one another share a piece of the output layer.
    row_tile = tl.program_id(0) % row_tiles
    token_tile = tl.program_id(0) // row_tiles
    token_tiles = tl.cdiv(vocabulary, TOKENS)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    token = token_tile * TOKENS + tl.arange(0, TOKENS)
    row_exists = row < rows
    token_exists = token < vocabulary
    source = tl.load(chosen + row, mask=row_exists, other=0)
    lanes = tl.arange(0, DEPTH)
    h_from = hidden + source[:, None] * hidden_stride + lanes[None, :]
    w_from = weight + token[None, :].to(tl.int64) * weight_stride + lanes[:, None]
    z = tl.zeros([ROWS, TOKENS], ACCUMULATOR)
    for unit in range(0, units, DEPTH):
        unit_exists = unit + lanes < units
        h = tl.load(h_from + unit, mask=row_exists[:, None] & unit_exists[None, :], other=0.0)
        w = tl.load(w_from + unit, mask=token_exists[None, :] & unit_exists[:, None], other=0.0).to(h.dtype)
        if UPCAST:
            h = h.to(ACCUMULATOR)
            w = w.to(ACCUMULATOR)
        z = tl.dot(h, w, z, input_precision="ieee", out_dtype=ACCUMULATOR)
    if bias is not None:
        added = tl.load(bias + token, mask=token_exists, other=0.0)
        z += added.to(hidden.dtype.element_ty).to(ACCUMULATOR)[None, :]
    if SOFTCAP > 0:
        z = SOFTCAP * _tanh(z / SOFTCAP)
    z = tl.where(token_exists[None, :], z, float("-inf"))
    place = row.to(tl.int64)[:, None] * (token_tiles * TOKENS) + token[None, :]
    tl.store(workspace + place, z)

    target = tl.load(targets + source, mask=row_exists, other=-1)
    z = tl.where(token[None, :] == target[:, None], float("-inf"), z)
    # A NaN is skipped here and caught by the sum.
    highest = tl.max(tl.where(z == z, z, float("-inf")), axis=1)
    difference = z - shift_of(highest)[:, None]
    terms = tl.exp(difference)
    result = partial + row.to(tl.int64) * token_tiles + token_tile
    tl.store(result, highest, mask=row_exists)
    tl.store(result + part_stride, tl.sum(terms, axis=1), mask=row_exists)
    tl.store(result + 2 * part_stride, tl.sum(times_log_weight(terms, difference), axis=1), mask=row_exists)


@triton.jit
def row_kernel(
    workspace,
    partial,
    targets,
    chosen,
    logprob,  # [N] of ACCUMULATOR
    lse,  # [N] float64
    entropy,  # [N] float64, or None
    state,  # [rows, ROW_STATE] float64, or None
    vocabulary,
    token_tiles,
    part_stride,
    ACCUMULATOR: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROW_STATE: tl.constexpr,
    TOKENS: tl.constexpr,
    TILES_BLOCK: tl.constexpr,
):
    """Combine the tiles of one row, in order. All NaN where the target is out of range."""
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(chosen + row)
    target = tl.load(targets + source)
    in_range = (target >= 0) & (target < vocabulary)
    # Read as NaN, a target out of range makes everything NaN.
    at_target = tl.load(
        workspace + row * (token_tiles * TOKENS) + target, mask=in_range, other=float("nan")
    ).to(tl.float64)  # fmt: skip
    parts = partial + row * token_tiles
    lanes = tl.arange(0, TILES_BLOCK)
    peak = tl.full([TILES_BLOCK], float("-inf"), tl.float64)
    for first in range(0, token_tiles, TILES_BLOCK):
        inside = first + lanes < token_tiles
        peak = tl.maximum(peak, tl.load(parts + first + lanes, mask=inside, other=float("-inf")).to(tl.float64))
    others_highest = tl.max(peak, axis=0)
    highest = tl.where(at_target > others_highest, at_target, others_highest)
    shift = shift_of(highest)
    rest_of_lane = tl.zeros([TILES_BLOCK], tl.float64)
    weighted_of_lane = tl.zeros([TILES_BLOCK], tl.float64)
    for first in range(0, token_tiles, TILES_BLOCK):
        inside = first + lanes < token_tiles
        place = parts + first + lanes
        tile_highest = tl.load(place, mask=inside, other=float("-inf")).to(tl.float64)
        tile_sum = tl.load(place + part_stride, mask=inside, other=0.0).to(tl.float64)
        tile_weighted = tl.load(place + 2 * part_stride, mask=inside, other=0.0).to(tl.float64)
        lowered = tile_highest - shift
        factor = tl.exp(lowered)
        moved = tl.where(lowered == float("-inf"), 0.0, lowered)
        rest_of_lane += tile_sum * factor
        weighted_of_lane += (tile_weighted + moved * tile_sum) * factor
    rest = tl.sum(rest_of_lane, axis=0)
    difference = at_target - shift
    own = tl.exp(difference)
    total = rest + own
    log_sum = tl.log(total)
    is_nan = total != total
    is_infinite = tl.abs(highest) == float("inf")
    unusable = is_nan | is_infinite
    row_logprob = tl.where(unusable, float("nan"), difference - log_sum)
    mean = (tl.sum(weighted_of_lane, axis=0) + times_log_weight(own, difference)) / total
    row_entropy = tl.where(unusable, float("nan"), log_sum - mean)
    row_lse = tl.where(is_infinite, highest, highest + log_sum)
    tl.store(logprob + source, row_logprob.to(ACCUMULATOR))
    tl.store(lse + source, tl.where(is_nan, float("nan"), row_lse))
    if entropy is not None:
        tl.store(entropy + source, row_entropy)
    if state is not None:
        slope = tl.full((), 1.0, tl.float64)
        if SOFTCAP > 0:
            ratio = at_target / SOFTCAP
            slope = 1.0 - ratio * ratio
        own_state = state + row * ROW_STATE
        tl.store(own_state, shift)
        tl.store(own_state + 1, -mean)
        tl.store(own_state + 2, tl.where(unusable, float("nan"), 1.0 / total))
        tl.store(own_state + 3, slope * rest / total)
        tl.store(own_state + 4, slope * times_log_weight(own / total, row_logprob + row_entropy))


@triton.jit(do_not_specialize=["rows"])
def unit_gradients_kernel(
    workspace,
    weight,
    targets,
    chosen,
    state,
    unit_logprob,  # [N, units] of ACCUMULATOR
    unit_entropy,  # [N, units] of ACCUMULATOR, or None
    rows,
    units,
    vocabulary,
    weight_stride,
    workspace_stride,
    ACCUMULATOR: tl.constexpr,
    FACTOR: tl.constexpr,  # the type of the hidden states
    UPCAST: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROW_STATE: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile of both unit gradients. The weights are relative to the row's largest term: as p they would underflow a half."""
    row_tiles = tl.cdiv(rows, ROWS)
    row = (tl.program_id(0) % row_tiles) * ROWS + tl.arange(0, ROWS)
    unit = (tl.program_id(0) // row_tiles) * UNITS + tl.arange(0, UNITS)
    row_exists = row < rows
    unit_exists = unit < units
    source = tl.load(chosen + row, mask=row_exists, other=0)
    target = tl.load(targets + source, mask=row_exists, other=-1)
    row_state = state + row.to(tl.int64) * ROW_STATE
    highest = tl.load(row_state, mask=row_exists, other=0.0).to(ACCUMULATOR)
    to_mean = tl.load(row_state + 1, mask=row_exists, other=0.0).to(ACCUMULATOR)
    lanes = tl.arange(0, DEPTH)
    z_from = workspace + row.to(tl.int64)[:, None] * workspace_stride + lanes[None, :]
    of_logprob = tl.zeros([ROWS, UNITS], ACCUMULATOR)
    of_entropy = tl.zeros([ROWS, UNITS], ACCUMULATOR)
    for first in range(0, vocabulary, DEPTH):
        token = first + lanes
        # The workspace ends with whole tiles of -inf, and with rows that nobody asks for.
        z = tl.load(z_from + first)
        z = tl.where(token[None, :] == target[:, None], float("-inf"), z)
        w_from = weight + token.to(tl.int64)[:, None] * weight_stride + unit[None, :]
        w = tl.load(w_from, mask=(token < vocabulary)[:, None] & unit_exists[None, :], other=0.0).to(FACTOR)
        difference = z - highest[:, None]
        weights = tl.exp(difference)
        if SOFTCAP > 0:
            ratio = z / SOFTCAP
            weights = tl.where(weights > 0, weights * (1.0 - ratio * ratio), weights)
        factors = weights.to(FACTOR)
        if UPCAST:
            factors = factors.to(ACCUMULATOR)
            w = w.to(ACCUMULATOR)
        of_logprob = tl.dot(factors, w, of_logprob, input_precision="ieee", out_dtype=ACCUMULATOR)
        if unit_entropy is not None:
            entropy_factors = times_log_weight(weights, difference + to_mean[:, None]).to(FACTOR)
            if UPCAST:
                entropy_factors = entropy_factors.to(ACCUMULATOR)
            of_entropy = tl.dot(entropy_factors, w, of_entropy, input_precision="ieee", out_dtype=ACCUMULATOR)
    inverse_total = tl.load(row_state + 2, mask=row_exists, other=0.0).to(ACCUMULATOR)
    at_target = tl.load(row_state + 3, mask=row_exists, other=0.0).to(ACCUMULATOR)
    exists = row_exists[:, None] & unit_exists[None, :]
    known = (target >= 0) & (target < vocabulary)
    own_from = weight + target[:, None] * weight_stride + unit[None, :]
    own = tl.load(own_from, mask=exists & known[:, None], other=0.0).to(FACTOR).to(ACCUMULATOR)
    place = source[:, None] * units + unit[None, :]
    result = at_target[:, None] * own - inverse_total[:, None] * of_logprob
    tl.store(unit_logprob + place, result, mask=exists)
    if unit_entropy is not None:
        entropy_at_target = tl.load(row_state + 4, mask=row_exists, other=0.0).to(ACCUMULATOR)
        result = -(entropy_at_target[:, None] * own + inverse_total[:, None] * of_entropy)
        tl.store(unit_entropy + place, result, mask=exists)
