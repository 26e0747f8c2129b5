"""Launches of the kernels of linear_token_logprobs, a piece of the rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from entropy_fast.ops.linear_inputs import LinearInputs
from entropy_fast.ops.registration import accumulator
from entropy_fast.ops.triton_loading import interpreting, kernels_of, on_device, triton_type
from entropy_fast.reference import LinearTokenLogprobs

__all__ = ["WORKSPACE_BYTES", "linear_token_logprobs"]

# What the logits take that exist at a time; no less than _LEAST_ROWS rows of them, so that the output layer,
# which is read twice for every such piece, is not what takes the time.
WORKSPACE_BYTES = 2**28
_LEAST_ROWS = 128


def _dense_rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def linear_token_logprobs(inputs: LinearInputs) -> LinearTokenLogprobs:
    """As ``entropy_fast.reference.linear_token_logprobs``, within ``WORKSPACE_BYTES`` (more if 128 rows need more).

    Finding the rows that are not ignored waits for the device.
    """
    hidden, weight, targets, bias, softcap = inputs[:5]
    rows, dtype, n_units = hidden.shape[0], accumulator(hidden), inputs.n_units
    units = [torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) for _ in range(n_units)]
    logprob = torch.zeros(rows, dtype=dtype, device=hidden.device)
    lse = torch.zeros(rows, dtype=torch.float64, device=hidden.device)
    entropy = torch.zeros_like(lse) if inputs.want_entropy else None
    result = LinearTokenLogprobs(logprob, lse, entropy, *units, *[None] * (2 - n_units))
    kept = (targets != inputs.ignore_index).nonzero().squeeze(1)
    if len(kept):
        with on_device(hidden.device):
            tensors = (_dense_rows(hidden), _dense_rows(weight), None if bias is None else bias.contiguous())
            _fill_rows(result, *tensors, targets.contiguous(), kept, softcap or 0.0)
    return result


def _fill_rows(
    result: LinearTokenLogprobs,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    kept: Tensor,
    softcap: float,
) -> None:
    """Write the rows ``kept`` of ``result``, as many at a time as the workspace holds."""
    kernels = kernels_of("linear_token_logprobs")
    vocabulary, units = weight.shape
    dtype = result.logprob.dtype
    tiles = kernels.tiles_for(8 * hidden.element_size())
    token_tiles = -(-vocabulary // tiles.tokens)
    width = token_tiles * tiles.tokens
    fitting = max(_LEAST_ROWS, WORKSPACE_BYTES // (width * dtype.itemsize)) // tiles.rows * tiles.rows
    at_once = min(fitting, -(-len(kept) // tiles.rows) * tiles.rows)
    workspace = torch.empty(at_once, width, dtype=dtype, device=hidden.device)
    partial = torch.empty(3, at_once, token_tiles, dtype=dtype, device=hidden.device)
    state = None
    if result.unit_logprob is not None:
        state = torch.empty(at_once, kernels.ROW_STATE, dtype=torch.float64, device=hidden.device)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    types = {"ACCUMULATOR": triton_type(dtype), "SOFTCAP": softcap}
    upcast = interpreting() or hidden.dtype == dtype
    for begin in range(0, len(kept), at_once):
        chosen = kept[begin : begin + at_once]
        row_tiles = -(-len(chosen) // tiles.rows)
        kernels.logits_kernel[(row_tiles * token_tiles,)](
            hidden,
            weight,
            bias,
            targets,
            chosen,
            workspace,
            partial,
            len(chosen),
            units,
            vocabulary,
            hidden.stride(0),
            weight.stride(0),
            partial.stride(0),
            **types,
            UPCAST=upcast,
            ROWS=tiles.rows,
            TOKENS=tiles.tokens,
            DEPTH=tiles.depth,
            **options,
        )
        kernels.row_kernel[(len(chosen),)](
            workspace,
            partial,
            targets,
            chosen,
            result.logprob,
            result.lse,
            result.entropy,
            state,
            vocabulary,
            token_tiles,
            partial.stride(0),
            **types,
            ROW_STATE=kernels.ROW_STATE,
            TOKENS=tiles.tokens,
            TILES_BLOCK=kernels.TILES_BLOCK,
        )
        if state is not None:
            kernels.unit_gradients_kernel[(row_tiles * -(-units // tiles.units),)](
                workspace,
                weight,
                targets,
                chosen,
                state,
                result.unit_logprob,
                result.unit_entropy,
                len(chosen),
                units,
                vocabulary,
                weight.stride(0),
                workspace.stride(0),
                **types,
                FACTOR=triton_type(hidden.dtype),
                UPCAST=upcast,
                ROW_STATE=kernels.ROW_STATE,
                ROWS=tiles.rows,
                UNITS=tiles.units,
                DEPTH=tiles.unit_depth,
                **options,
            )
