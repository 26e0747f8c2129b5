"""linear_token_logprobs in blocks of rows and of the vocabulary, with torch's matrix products around compiled row loops.

Legend: h hidden state [H], W output layer [V, H], z logits, s_v the softcap's derivative (1 without), y the target,
p = softmax(z). csrc/softmax_block.h has the formulas of one block and of how blocks are put together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from entropy_fast.ops import native_backend
from entropy_fast.ops.linear_inputs import LinearInputs
from entropy_fast.ops.registration import accumulator
from entropy_fast.reference import LinearTokenLogprobs

__all__ = ["WORKSPACE_BYTES", "block_logits", "linear_token_logprobs"]

# Bytes and rows of one block of logits, by bytes an element. Measured: large products run at a higher rate; those of 16-bit
# numbers, which are faster, want their factors nearer.
_BLOCK_BYTES = {2: 2**21, 4: 2**24, 8: 2**24}
_ROWS = {2: 512, 4: 1248, 8: 1248}
# What the blocks take at most (for the entropy there is another). Beside them and the results there are a few arrays of
# rows x H, and the part of the weights under work where it has to be cast.
WORKSPACE_BYTES = 2**24
# The last rows of a product are filled up. BLAS libraries take other paths, with other roundings, for few rows, and a row's
# result must not depend on how many others there are; in fp32 and wider all paths that were tried round alike from this number
# on.
_LEAST_ROWS, _ROWS_STEP = 512, 16


def linear_token_logprobs(inputs: LinearInputs) -> LinearTokenLogprobs:
    """As ``entropy_fast.reference.linear_token_logprobs``, on the CPU, within ``WORKSPACE_BYTES``."""
    hidden, targets, n_units = inputs.hidden, inputs.targets, inputs.n_units
    dtype = accumulator(hidden)
    if hidden.dtype == torch.float16:
        # Weights are relative to a row's maximum, not to its sum: a product of a thousand of them passes 65504.
        hidden = hidden.float()
    rows = hidden.shape[0]
    scalars = torch.zeros(3, rows, dtype=torch.float64)
    units = [torch.zeros(hidden.shape, dtype=dtype) for _ in range(n_units)]
    kept = (targets != inputs.ignore_index).nonzero().squeeze(1)
    size = _product_rows(len(kept), hidden.dtype)
    for chosen in torch.split(kept, size) if len(kept) else ():
        own = inputs._replace(hidden=hidden[chosen], targets=targets[chosen])
        found, found_units = _rows(own, size)
        scalars[:, chosen] = found
        for whole, part in zip(units, found_units, strict=True):
            whole[chosen] = part
    logprob, lse, entropy = scalars
    return LinearTokenLogprobs(
        logprob.to(dtype),
        lse.clone(),
        entropy.clone() if inputs.want_entropy else None,
        units[0] if units else None,
        units[1] if n_units > 1 else None,
    )


def _product_rows(n: int, dtype: torch.dtype) -> int:
    """Rows of every product for ``n`` rows in all: equal parts, so that little has to be filled up."""
    most = _ROWS[dtype.itemsize]
    if dtype.itemsize < 4:
        return most
    parts = max(1, -(-n // most))
    share = -(-n // parts)
    return min(most, max(_LEAST_ROWS, -(-share // _ROWS_STEP) * _ROWS_STEP))


def _block_width(dtype: torch.dtype) -> int:
    """Tokens of one block, a number that depends on the dtype alone."""
    return _BLOCK_BYTES[dtype.itemsize] // (_ROWS[dtype.itemsize] * dtype.itemsize)


def block_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, out: Tensor | None = None
) -> Tensor:
    """Logits of one block, in the dtype of ``hidden``, which ``weight`` has too."""
    if bias is None:
        logits = torch.mm(hidden, weight.t(), out=out)
    else:
        logits = torch.addmm(bias.to(hidden.dtype), hidden, weight.t(), out=out)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _rows(inputs: LinearInputs, size: int) -> tuple[Tensor, list[Tensor]]:
    """``[3, rows]`` logprob, lse and entropy in float64, and unit gradients, by products of ``size`` rows."""
    hidden, weight, targets, bias, softcap = inputs[:5]
    n, n_units = hidden.shape[0], inputs.n_units
    dtype = accumulator(hidden)
    # Some matrix products read past the end of a row and count on 0 times that being 0: a NaN would get into the row before.
    finite = hidden.isfinite().all(1, keepdim=True)
    h = hidden.new_zeros(size, hidden.shape[1])
    h[:n] = hidden.masked_fill(~finite, 0.0)
    # A target that no block holds: rows that only fill up.
    y = torch.nn.functional.pad(targets, (0, size - n), value=-1)
    state = torch.zeros(size, 8, dtype=torch.float64)
    state[:, 0], state[:, 4] = -torch.inf, torch.nan
    sums = [torch.zeros(size, h.shape[1], dtype=dtype) for _ in range(n_units)]
    # Allocated once: fresh memory of this size would be mapped, and its pages cleared, for every block.
    width = min(_block_width(h.dtype), weight.shape[0])
    workspace = torch.empty(max(1, n_units), size * width, dtype=h.dtype)
    # Sums are in the accumulator's dtype; products of narrower factors have to be added to them.
    products = [torch.empty_like(h) for _ in sums] if h.dtype != dtype else []
    for begin in range(0, weight.shape[0], width):
        block = slice(begin, min(begin + width, weight.shape[0]))
        part = weight[block].to(h.dtype)
        views = [flat[: size * len(part)].view(size, len(part)) for flat in workspace]
        z = block_logits(h, part, None if bias is None else bias[block], softcap, out=views[0])
        weights = views[:n_units]
        native_backend.softmax_block(
            z,
            weights[1] if n_units > 1 else None,
            y,
            state,
            first_token=block.start,
            softcap=softcap or 0.0,
            weights=n_units > 0,
        )
        if not sums:
            continue
        if products:
            for weight_of, product in zip(weights, products, strict=True):
                torch.mm(weight_of, part, out=product)
            native_backend.sums_of_blocks(sums, products, state)
        else:
            native_backend.sums_of_blocks(sums, None, state)
            for weight_of, total in zip(weights, sums, strict=True):
                total.addmm_(weight_of, part)
    state[:n, 1].masked_fill_(~finite.squeeze(1), torch.nan)
    return _finish(state[:n], [total[:n] for total in sums], weight, targets, softcap)


def _finish(
    state: Tensor, sums: list[Tensor], weight: Tensor, targets: Tensor, softcap: float | None
) -> tuple[Tensor, list[Tensor]]:
    highest, total, rest, weighted, at_target, center = state[:, :6].unbind(1)
    log_sum = total.log()
    lse = highest + log_sum
    unusable = ~lse.isfinite()
    logprob = ((at_target - highest) - log_sum).masked_fill(unusable, torch.nan)
    entropy = (log_sum - weighted / total).masked_fill(unusable, torch.nan)
    units = []
    if sums:
        dtype = sums[0].dtype
        slope = 1.0 if softcap is None else 1.0 - (at_target / softcap).square()
        row = weight[targets].to(dtype)
        per_sum = (1.0 / total).to(dtype).unsqueeze(1)
        units.append((slope * rest / total).to(dtype).unsqueeze(1) * row - sums[0] * per_sum)
        if len(sums) > 1:
            probability = logprob.exp()
            own = torch.where(probability > 0, probability * (logprob + entropy), probability) * slope
            off_center = (center + entropy - lse).to(dtype).unsqueeze(1)
            units.append(-(torch.addcmul(sums[1], sums[0], off_center) * per_sum + own.to(dtype).unsqueeze(1) * row))
        units = [unit.masked_fill(unusable.unsqueeze(1), torch.nan) for unit in units]
    return torch.stack([logprob, lse, entropy]), units
