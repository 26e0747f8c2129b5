"""`linear_token_logprobs` with the vocabulary spread over the ranks of a process group, each of which holds some of the rows.

Each rank runs the op on its own rows. What the ranks then tell each other is a few numbers a token, and gradients of the hidden
states. With R ranks, H hidden units and N tokens every rank sends, and receives,

    (R-1) · 96 bytes a call            what has to be alike everywhere, and who holds which rows
    (R-1) · 16 bytes a token           lse and target's logit of each slice, gathered; 24 with the entropy
    2 (R-1)/R · 4 H bytes a token      gradients summed by a ring, 8 H for float64: in every backward to the hidden states; with
                                       unit gradients as results, in the call, for each of the two
"""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from entropy_fast.errors import ConfigError, EntropyFastError
from entropy_fast.ops.backends import requested, resolve_backend
from entropy_fast.ops.linear_gradients import Upstream
from entropy_fast.ops.linear_inputs import LINEAR_BACKENDS, as_autocast, check_linear_arguments
from entropy_fast.ops.registration import accumulator, refuse_forward_mode
from entropy_fast.ops.slice_collectives import agree, gathered, summed
from entropy_fast.ops.slice_derivatives import second_derivatives
from entropy_fast.ops.slice_parts import (
    SliceCall,
    gradient_of_rows,
    hidden_part,
    own_values,
    slice_gradients,
    values_of,
)
from entropy_fast.ops.token_logprobs import TokenLogprobs, check_targets
from entropy_fast.ops.vocabulary_slice import VocabularySlice, is_dtensor
from entropy_fast.reference import LinearTokenLogprobs, MergedSlices, SliceValues, merge_slices

__all__ = ["sliced_linear_token_logprobs", "sliced_linear_token_logprobs_with_units"]

_NAME = "sliced_linear_token_logprobs"


def sliced_linear_token_logprobs(
    hidden: Tensor,
    vocabulary_slice: VocabularySlice,
    targets: Tensor,
    *,
    softcap: float | None = None,
    want_entropy: bool = False,
    ignore_index: int = -100,
    backend: str | None = None,
) -> TokenLogprobs:
    """Log-probability of each target over the whole vocabulary, and its lse and entropy, the same on every rank of the group.

    Values and gradients are those of `linear_token_logprobs` of the whole weight, up to rounding. All ranks of the group call
    it with the same hidden states, targets and options, and go back through its results with the same gradients, as ranks do
    that share a vocabulary; each then has the whole gradient of ``hidden``, and that of its own rows of weight and bias.
    Differentiable in reverse mode, any number of times. Logits divided by a temperature T are those of hidden states, bias
    and softcap divided by T.

    Args:
        hidden: ``[N, H]``, float32, float64, bfloat16 or float16; a plain tensor, the same on all ranks.
        vocabulary_slice: this rank's rows, and the group.
        targets: ``[N]`` int64, each in ``[0, V)`` or equal to ``ignore_index``.
        softcap: as of `linear_token_logprobs`.
        want_entropy: as there.
        ignore_index: as there.
        backend: as there, for the rank's own rows.

    Returns:
        `TokenLogprobs`, in float32, or float64 for float64 hidden states. Rows whose logits are not all finite or -inf are NaN.

    Raises:
        ConfigError: arguments do not fit.
        DistributedError: they do not fit on another rank, ranks were called with different ones (values of hidden states are
            not compared), or their slices do not make the vocabulary. A rank that does not call at all leaves the others
            waiting until the group's timeout.
        BackendUnavailableError: the backend cannot run here.
    """
    call, hidden = _agreed(hidden, vocabulary_slice, targets, softcap, want_entropy, None, ignore_index, backend)
    own = vocabulary_slice
    return TokenLogprobs(*_Values.apply(hidden, own.weight, own.bias, call, own.group))  # type: ignore[no-untyped-call]


def sliced_linear_token_logprobs_with_units(
    hidden: Tensor,
    vocabulary_slice: VocabularySlice,
    targets: Tensor,
    *,
    softcap: float | None = None,
    want_entropy: bool = False,
    ignore_index: int = -100,
    backend: str | None = None,
) -> LinearTokenLogprobs:
    """`sliced_linear_token_logprobs` with its unit gradients as results, for callers that do the backward themselves.

    Arguments and errors are the same. Nothing here carries a graph. ``lse`` and ``entropy`` are float64; ``unit_logprob`` and
    ``unit_entropy`` (None without ``want_entropy``) are ``[N, H]`` in the dtype of ``logprob``. All are the same on all ranks.
    """
    own = vocabulary_slice
    with torch.no_grad():
        call, hidden = _agreed(hidden, own, targets, softcap, want_entropy, True, ignore_index, backend)
        found = own_values(hidden, own.weight, own.bias, call)
        state = _State.of(found, gathered(values_of(found, call), own.group))
        one, nothing = torch.ones_like(state.merged.lse), torch.zeros_like(state.merged.lse)
        upstream: list[Upstream] = [(one, nothing, None), (nothing, nothing, one)]
        parts = [state.hidden_part(grads, own.weight, call, own.group) for grads in upstream[: 1 + want_entropy]]
        units = summed(torch.stack(parts), own.group)
        return LinearTokenLogprobs(
            *call.results(state.merged, units.dtype), units[0], units[1] if want_entropy else None
        )


@dataclasses.dataclass(frozen=True)
class _State:
    """What a call found: on this rank, and on all."""

    own: LinearTokenLogprobs
    values: SliceValues
    merged: MergedSlices

    @classmethod
    def of(cls, own: LinearTokenLogprobs, every: Tensor) -> _State:
        """From the slice's own results, and what was gathered of all: ``[R, 2 or 3, N]``."""
        lses, logits, *entropies = every.unbind(1)
        values = SliceValues(lses, logits, entropies[0] if entropies else None)
        return cls(own, values, merge_slices(values))

    def hidden_part(self, grads: Upstream, weight: Tensor, call: SliceCall, group: Any) -> Tensor:
        """``[N, H]`` this rank's part in the gradient of the hidden states, in the accumulator's dtype."""
        ranks, rank = len(self.values.lse), dist.get_rank(group)
        held = (torch.arange(ranks, device=weight.device) == rank).unsqueeze(1) & call.held
        of_logprob, of_lse, of_entropy = slice_gradients(grads, self.values, self.merged, held)
        own = (of_logprob[rank], of_lse[rank], None if of_entropy is None else of_entropy[rank])
        return hidden_part(own, weight, self.own, call)


class _Values(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: SliceCall, group: Any
    ) -> tuple[Any, ...]:
        own = own_values(hidden, weight, bias, call)
        every = gathered(values_of(own, call), group)
        ctx.call, ctx.group = call, group
        ctx.save_for_backward(hidden, weight, bias, every, *own)
        dtype = accumulator(hidden)
        results = call.results(_State.of(own, every).merged, dtype)
        return tuple(None if part is None else part.to(dtype) for part in results)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        hidden, weight, bias, every, *own = ctx.saved_tensors
        state = _State.of(LinearTokenLogprobs(*own), every)
        rest = (ctx.needs_input_grad[:3], ctx.call, ctx.group, state)
        found = _Gradients.apply(*grads, hidden, weight, bias, *rest)  # type: ignore[no-untyped-call]
        return (*found, None, None)


class _Gradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Any, ...]:
        grads, (hidden, weight, bias, wanted, call, group, state) = arguments[:3], arguments[3:]
        ctx.set_materialize_grads(False)
        ctx.call, ctx.group = call, group
        ctx.save_for_backward(*grads, hidden, weight, bias, state.own.lse == -torch.inf)
        of_hidden = of_weight = of_bias = None
        if wanted[0]:
            # Summed up before it is rounded to what the hidden states have.
            of_hidden = summed(state.hidden_part(grads, weight, call, group), group).to(hidden.dtype)
        if wanted[1] or wanted[2]:
            of_weight, of_bias = gradient_of_rows(grads, (hidden, weight, bias), state.merged, call, wanted[1:])
        return of_hidden, of_weight, of_bias

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        upstream, inputs, impossible = ctx.saved_tensors[:3], ctx.saved_tensors[3:6], ctx.saved_tensors[6]
        found = second_derivatives(
            upstream, inputs, cotangents, ctx.needs_input_grad[:6], ctx.call, impossible, ctx.group
        )
        return (*found, None, None, None, None)


def _agreed(
    hidden: Tensor,
    own: VocabularySlice,
    targets: Tensor,
    softcap: float | None,
    want_entropy: bool,
    units: bool | None,
    ignore_index: int,
    backend: str | None,
) -> tuple[SliceCall, Tensor]:
    """The call and the hidden states, once all ranks have seen that it is the same everywhere.

    ``units`` None is for where the hidden states need a gradient.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_rank(own.group) < 0:
        raise ConfigError(
            f"{_NAME}: this process is not in the slice's process group (or there is none).",
            fix="call torch.distributed.init_process_group first, and the op on the ranks of the slice's group.",
        )
    refused: EntropyFastError | None = None
    alike = dict.fromkeys(_ALIKE, 0)
    try:
        hidden = _checked(hidden, own, targets, softcap, ignore_index)
        resolve_backend(requested(backend), hidden.device, LINEAR_BACKENDS)
        inputs = (hidden, own.weight, own.bias)
        gradients = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in inputs]
        alike = dict(
            zip(
                _ALIKE,
                (
                    *hidden.shape,
                    own.vocabulary,
                    ignore_index,
                    hidden.dtype.itemsize * 2 + (hidden.dtype == torch.bfloat16),
                    0 if softcap is None else struct.unpack("<q", struct.pack("<d", softcap))[0],
                    _bits(want_entropy, units is not None, own.bias is not None),
                    _bits(*gradients),
                    int((targets * torch.arange(1, len(targets) + 1, device=targets.device)).sum()),
                ),
                strict=True,
            )
        )
    except EntropyFastError as error:
        refused = error
    agree(_NAME, alike, (own.first, own.weight.shape[0]), refused, own.weight.device, own.group)
    call = SliceCall.of(
        targets,
        range(own.first, own.first + own.weight.shape[0]),
        own.vocabulary,
        softcap=softcap,
        want_entropy=want_entropy,
        units=torch.is_grad_enabled() and hidden.requires_grad if units is None else units,
        ignore_index=ignore_index,
        backend=requested(backend),
    )
    return call, hidden


_ALIKE = (
    "rows",
    "hidden size",
    "vocabulary",
    "ignore_index",
    "the dtype of hidden",
    "softcap",
    "the wanted results",
    "what needs a gradient",
    "targets",
)


def _checked(hidden: Tensor, own: VocabularySlice, targets: Tensor, softcap: float | None, ignore_index: int) -> Tensor:
    for name, tensor in (("hidden", hidden), ("targets", targets)):
        if is_dtensor(tensor):
            raise ConfigError(
                f"{_NAME} got a DTensor as {name}; expected a plain tensor, whole on every rank.",
                fix="gather it (redistribute to Replicate()) and pass to_local(); its gradient is whole on every rank too.",
            )
    check_linear_arguments(_NAME, hidden, own.weight, targets, own.bias, softcap, may_be_empty=True)
    check_targets(_NAME, targets, own.vocabulary, ignore_index)
    refuse_forward_mode(_NAME, hidden, own.weight, own.bias)
    return as_autocast(hidden)


def _bits(*flags: bool) -> int:
    return sum(flag << position for position, flag in enumerate(flags))
