"""Log-probabilities of chosen tokens, forward and backward: one program per row.

The mathematics and the treatment of infinities are those of ``entropy_fast.reference.token_logprobs``. Everything is
computed in ``ACCUMULATOR`` (float32, or float64 for float64 logits) after the load; ``lse`` is always float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["BLOCK", "NUM_WARPS", "token_logprobs_backward_kernel", "token_logprobs_forward_kernel"]

BLOCK = 2048
NUM_WARPS = 8


@triton.jit
def _shift_of(highest):
    """What is subtracted before the exponential: an infinite maximum would make inf - inf of an ordinary value."""
    return tl.where(tl.abs(highest) == float("inf"), 0.0, highest)


@triton.jit
def token_logprobs_forward_kernel(
    logits,  # [rows, vocabulary], rows row_stride elements apart
    targets,  # [rows] int64
    logprob,  # [rows] of the accumulator's type
    lse,  # [rows] float64
    vocabulary,
    row_stride,
    ignore_index,
    ACCUMULATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write ``logprob`` and ``lse`` of one row. Zeros where the target is ignored, NaN where it is out of range."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    ignored = target == ignore_index
    usable = (target >= 0) & (target < vocabulary) & (target != ignore_index)
    if usable:
        x = logits + row * row_stride
        lanes = tl.arange(0, BLOCK)
        highest = tl.full((), float("-inf"), ACCUMULATOR)
        total = tl.full((), 0.0, ACCUMULATOR)
        for begin in range(0, vocabulary, BLOCK):
            offsets = begin + lanes
            values = tl.load(x + offsets, mask=offsets < vocabulary, other=float("-inf")).to(ACCUMULATOR)
            # A NaN is skipped here and caught by the sum.
            comparable = tl.where(values == values, values, float("-inf"))
            new_highest = tl.maximum(highest, tl.max(comparable, axis=0))
            shift = _shift_of(new_highest)
            total = total * tl.exp(highest - shift) + tl.sum(tl.exp(values - shift), axis=0)
            highest = new_highest
        is_nan = total != total
        is_infinite = tl.abs(highest) == float("inf")
        wide_highest = highest.to(tl.float64)
        log_sum = tl.log(total.to(tl.float64))
        row_lse = tl.where(is_infinite, wide_highest, wide_highest + log_sum)
        at_target = tl.load(x + target).to(tl.float64)
        row_logprob = at_target - wide_highest - log_sum
        tl.store(lse + row, tl.where(is_nan, float("nan"), row_lse))
        tl.store(logprob + row, tl.where(is_nan | is_infinite, float("nan"), row_logprob).to(ACCUMULATOR))
    else:
        tl.store(lse + row, tl.where(ignored, 0.0, float("nan")).to(tl.float64))
        tl.store(logprob + row, tl.where(ignored, 0.0, float("nan")).to(ACCUMULATOR))


@triton.jit
def token_logprobs_backward_kernel(
    logits,
    targets,
    lse,
    grad_logprob,  # [rows] of the accumulator's type
    grad_lse,  # [rows] float64
    grad_logits,  # [rows, vocabulary], contiguous, the logits' type
    vocabulary,
    row_stride,
    ignore_index,
    ACCUMULATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one row of ``grad_logits``. Zeros where the target is ignored, NaN where it is out of range."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    ignored = target == ignore_index
    usable = (target >= 0) & (target < vocabulary) & (target != ignore_index)
    gradient = grad_logits + row * vocabulary
    lanes = tl.arange(0, BLOCK)
    if usable:
        x = logits + row * row_stride
        row_lse = tl.load(lse + row)
        # x - lse in two steps, so that float32 loses nothing of a float64 lse. Where lse is not finite, `low` is NaN.
        high = row_lse.to(ACCUMULATOR)
        low = (row_lse - high.to(tl.float64)).to(ACCUMULATOR)
        of_logprob = tl.load(grad_logprob + row)
        scale = tl.load(grad_lse + row).to(ACCUMULATOR) - of_logprob
        for begin in range(0, vocabulary, BLOCK):
            offsets = begin + lanes
            inside = offsets < vocabulary
            values = tl.load(x + offsets, mask=inside, other=float("-inf")).to(ACCUMULATOR)
            probability = tl.exp((values - high) - low)
            result = scale * probability + tl.where(offsets == target, of_logprob, 0.0)
            tl.store(gradient + offsets, result.to(grad_logits.dtype.element_ty), mask=inside)
    else:
        fill = tl.where(ignored, 0.0, float("nan"))
        for begin in range(0, vocabulary, BLOCK):
            offsets = begin + lanes
            blank = tl.zeros([BLOCK], tl.float32) + fill
            tl.store(gradient + offsets, blank.to(grad_logits.dtype.element_ty), mask=offsets < vocabulary)
