"""Log-probabilities of chosen tokens, forward and backward: one program per row.

The mathematics and the treatment of infinities are those of ``entropy_fast.reference.token_logprobs``. Everything is
computed in ``ACCUMULATOR`` (float32, or float64 for float64 logits) after the load; ``lse`` and ``entropy`` are float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "BLOCK",
    "NUM_WARPS",
    "shift_of",
    "times_log_weight",
    "token_logprobs_backward_kernel",
    "token_logprobs_forward_kernel",
]

BLOCK = 2048
NUM_WARPS = 8


@triton.jit
def shift_of(highest):
    """What is subtracted before the exponential: an infinite maximum would make inf - inf of an ordinary value."""
    return tl.where(tl.abs(highest) == float("inf"), 0.0, highest)


@triton.jit
def times_log_weight(weight, log_weight):
    """``weight * log_weight``, 0 where the weight is 0 and its logarithm -inf. NaN stays NaN."""
    return tl.where(weight > 0, weight * log_weight, weight)


@triton.jit
def token_logprobs_forward_kernel(
    logits,  # [rows, vocabulary], rows row_stride elements apart
    targets,  # [rows] int64
    logprob,  # [rows] of the accumulator's type
    lse,  # [rows] float64
    entropy,  # [rows] float64; None without HAS_ENTROPY
    vocabulary,
    row_stride,
    ignore_index,
    ACCUMULATOR: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the results of one row. Zeros where the target is ignored, NaN where it is out of range.

    The target is kept out of the sums and joins them at the end, in float64: what the other tokens hold beside a likely
    target would be lost in a float32 sum near 1.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    ignored = target == ignore_index
    usable = (target >= 0) & (target < vocabulary) & (target != ignore_index)
    if usable:
        x = logits + row * row_stride
        lanes = tl.arange(0, BLOCK)
        highest = tl.full((), float("-inf"), ACCUMULATOR)
        total = tl.full((), 0.0, ACCUMULATOR)
        weighted = tl.full((), 0.0, ACCUMULATOR)
        for begin in range(0, vocabulary, BLOCK):
            offsets = begin + lanes
            other = (offsets < vocabulary) & (offsets != target)
            values = tl.load(x + offsets, mask=other, other=float("-inf")).to(ACCUMULATOR)
            # A NaN is skipped here and caught by the sum.
            comparable = tl.where(values == values, values, float("-inf"))
            new_highest = tl.maximum(highest, tl.max(comparable, axis=0))
            shift = shift_of(new_highest)
            lowered = highest - shift
            factor = tl.exp(lowered)
            terms = tl.exp(values - shift)
            if HAS_ENTROPY:
                # With a maximum of -inf so far, the sums are 0 (or NaN) and so is what they become.
                moved = tl.where(lowered == float("-inf"), 0.0, lowered)
                weighted = (weighted + moved * total) * factor
                weighted += tl.sum(times_log_weight(terms, values - shift), axis=0)
            total = total * factor + tl.sum(terms, axis=0)
            highest = new_highest
        at_target = tl.load(x + target).to(tl.float64)
        others_highest = highest.to(tl.float64)
        row_highest = tl.where(at_target > others_highest, at_target, others_highest)
        shift = shift_of(row_highest)
        lowered = others_highest - shift
        factor = tl.exp(lowered)
        own = tl.exp(at_target - shift)
        row_total = total.to(tl.float64) * factor + own
        log_sum = tl.log(row_total)
        is_nan = row_total != row_total
        is_infinite = tl.abs(row_highest) == float("inf")
        unusable = is_nan | is_infinite
        row_lse = tl.where(is_infinite, row_highest, row_highest + log_sum)
        row_logprob = (at_target - shift) - log_sum
        tl.store(lse + row, tl.where(is_nan, float("nan"), row_lse))
        tl.store(logprob + row, tl.where(unusable, float("nan"), row_logprob).to(ACCUMULATOR))
        if HAS_ENTROPY:
            moved = tl.where(lowered == float("-inf"), 0.0, lowered)
            row_weighted = (weighted.to(tl.float64) + moved * total.to(tl.float64)) * factor
            row_weighted += times_log_weight(own, at_target - shift)
            tl.store(entropy + row, tl.where(unusable, float("nan"), log_sum - row_weighted / row_total))
    else:
        fill = tl.where(ignored, 0.0, float("nan"))
        tl.store(lse + row, fill.to(tl.float64))
        tl.store(logprob + row, fill.to(ACCUMULATOR))
        if HAS_ENTROPY:
            tl.store(entropy + row, fill.to(tl.float64))


@triton.jit
def token_logprobs_backward_kernel(
    logits,
    targets,
    lse,
    entropy,  # [rows] float64; None without HAS_ENTROPY, like grad_entropy
    grad_logprob,  # [rows] of the accumulator's type
    grad_lse,  # [rows] float64
    grad_entropy,  # [rows] float64
    grad_logits,  # [rows, vocabulary], rows grad_row_stride elements apart, the logits' type; may be the logits
    vocabulary,
    row_stride,
    grad_row_stride,
    ignore_index,
    ACCUMULATOR: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one row of ``grad_logits``. Zeros where the target is ignored, NaN where it is out of range."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    ignored = target == ignore_index
    usable = (target >= 0) & (target < vocabulary) & (target != ignore_index)
    gradient = grad_logits + row * grad_row_stride
    lanes = tl.arange(0, BLOCK)
    if usable:
        x = logits + row * row_stride
        row_lse = tl.load(lse + row)
        # x - lse in two steps, so that float32 loses nothing of a float64 lse. Where lse is not finite, `low` is NaN.
        high = row_lse.to(ACCUMULATOR)
        wide_high = high.to(tl.float64)
        wide_low = row_lse - wide_high
        low = wide_low.to(ACCUMULATOR)
        of_logprob = tl.load(grad_logprob + row).to(tl.float64)
        of_lse = tl.load(grad_lse + row)
        scale = (of_lse - of_logprob).to(ACCUMULATOR)
        # The target's own gradient in float64: 1 - p of a likely token would cancel.
        own_logprob = (tl.load(x + target).to(tl.float64) - wide_high) - wide_low
        own_probability = tl.exp(own_logprob)
        own = of_logprob * (1.0 - own_probability) + of_lse * own_probability
        row_entropy = tl.full((), 0.0, ACCUMULATOR)
        of_entropy = tl.full((), 0.0, ACCUMULATOR)
        if HAS_ENTROPY:
            wide_entropy = tl.load(entropy + row)
            wide_of_entropy = tl.load(grad_entropy + row)
            own -= wide_of_entropy * times_log_weight(own_probability, own_logprob + wide_entropy)
            row_entropy = wide_entropy.to(ACCUMULATOR)
            of_entropy = wide_of_entropy.to(ACCUMULATOR)
        own_gradient = own.to(ACCUMULATOR)
        # The gradient may lie over the logits: every warp has read the target's before any overwrites it.
        tl.debug_barrier()
        for begin in range(0, vocabulary, BLOCK):
            offsets = begin + lanes
            inside = offsets < vocabulary
            values = tl.load(x + offsets, mask=inside, other=float("-inf")).to(ACCUMULATOR)
            log_probability = (values - high) - low
            probability = tl.exp(log_probability)
            result = scale * probability
            if HAS_ENTROPY:
                result -= of_entropy * times_log_weight(probability, log_probability + row_entropy)
            result = tl.where(offsets == target, own_gradient, result)
            tl.store(gradient + offsets, result.to(grad_logits.dtype.element_ty), mask=inside)
    else:
        fill = tl.where(ignored, 0.0, float("nan"))
        for begin in range(0, vocabulary, BLOCK):
            offsets = begin + lanes
            blank = tl.zeros([BLOCK], tl.float32) + fill
            tl.store(gradient + offsets, blank.to(grad_logits.dtype.element_ty), mask=offsets < vocabulary)
