"""The op ``entropy_fast::linear_token_logprobs``: log-probabilities from hidden states, never holding ``[rows, vocabulary]``.

The forward also gives the *unit gradients* ∂logprob/∂hidden and ∂entropy/∂hidden, which do not depend on what comes from
above: a backward, or any number of them, only scales rows. The output layer costs 4·N·H·V operations in all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropy_fast import reference
from entropy_fast.ops import blockwise, linear_gradients, triton_backend
from entropy_fast.ops.backends import AUTO, count_call, requested, resolve_backend
from entropy_fast.ops.linear_gradients import logits_dtype
from entropy_fast.ops.linear_inputs import LINEAR_BACKENDS, LinearInputs, as_autocast, check_linear_arguments
from entropy_fast.ops.registration import accumulator, refuse_forward_mode, register
from entropy_fast.ops.token_logprobs import TokenLogprobs, check_targets
from entropy_fast.reference import LinearTokenLogprobs

__all__ = ["linear_token_logprobs", "linear_token_logprobs_with_units"]

_NAME = "linear_token_logprobs"
_OP = f"entropy_fast::{_NAME}"
_BACKWARD_OP = f"{_OP}_backward"


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    want_entropy: bool = False,
    ignore_index: int = -100,
    backend: str | None = None,
) -> TokenLogprobs:
    """Log-probability of each target under ``softmax(hidden @ weight.T + bias)``, and its lse and entropy.

    Same values and gradients as :func:`token_logprobs` of ``F.linear(hidden, weight, bias)``; logits exist only in blocks of
    a workspace (``blockwise.WORKSPACE_BYTES`` on the CPU). When ``hidden`` needs a gradient, the forward computes the unit
    gradients ``[rows, H]`` and the backward scales them. Gradients of ``weight`` and ``bias`` are computed when they require
    one, by going through the vocabulary once more. Under autocast ``hidden`` is cast as ``F.linear`` would cast it.

    Args:
        hidden: ``[rows, H]``, float32, float64, bfloat16 or float16.
        weight: ``[vocabulary, H]``, any floating dtype; blocks of it are cast to the dtype of ``hidden``.
        targets: ``[rows]`` int64 on the same device, each in ``[0, vocabulary)`` or equal to ``ignore_index``.
        bias: ``[vocabulary]`` or None.
        softcap: the logits are ``softcap * tanh(· / softcap)``; None for none.
        want_entropy: whether entropies are computed (and ∂entropy/∂hidden, when ``hidden`` needs a gradient).
        ignore_index: rows with this target cost nothing; they give 0 and pass no gradient.
        backend: ``reference``, ``native`` or ``triton``; None for the environment variable ``ENTROPY_FAST_BACKEND`` and,
            where that is unset, the best one for the device.

    Returns:
        :class:`TokenLogprobs`, in float32, or float64 for float64 hidden states. Rows whose logits are not all finite or
        -inf are NaN.

    Raises:
        ConfigError: shapes, dtypes, devices, targets or softcap do not fit, or there is no such backend.
        BackendUnavailableError: the backend was asked for by name and cannot run here, or does not have this op.
    """
    check_linear_arguments(_NAME, hidden, weight, targets, bias, softcap)
    refuse_forward_mode(_NAME, hidden, weight, bias)
    hidden = as_autocast(hidden)
    needs_units = torch.is_grad_enabled() and hidden.requires_grad
    result = LinearTokenLogprobs(
        *_linear_token_logprobs(
            hidden, weight, targets, bias, softcap, want_entropy, needs_units, ignore_index, requested(backend)
        )
    )
    entropy = None if result.entropy is None else result.entropy.to(result.logprob.dtype)
    return TokenLogprobs(result.logprob, result.lse.to(result.logprob.dtype), entropy)


def linear_token_logprobs_with_units(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    want_entropy: bool = False,
    ignore_index: int = -100,
    backend: str | None = None,
) -> LinearTokenLogprobs:
    """:func:`linear_token_logprobs` with its unit gradients as results, for callers that do the backward themselves.

    Arguments and errors are the same. Nothing here carries a graph. ``lse`` and ``entropy`` are float64; ``unit_logprob``
    and ``unit_entropy`` (None without ``want_entropy``) are ``[rows, H]`` in the dtype of ``logprob``.
    """
    check_linear_arguments(_NAME, hidden, weight, targets, bias, softcap)
    hidden = as_autocast(hidden)
    with torch.no_grad():
        return LinearTokenLogprobs(
            *_linear_token_logprobs(
                hidden, weight, targets, bias, softcap, want_entropy, True, ignore_index, requested(backend)
            )
        )


class _Backward(NamedTuple):
    """Arguments of the backward op: upstream gradients, the forward's inputs and results, and which inputs want a gradient."""

    grad_logprob: Tensor
    grad_lse: Tensor
    grad_entropy: Tensor | None
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    logprob: Tensor
    lse: Tensor
    entropy: Tensor | None
    unit_logprob: Tensor | None
    unit_entropy: Tensor | None
    softcap: float | None
    wanted: list[bool]
    ignore_index: int = -100
    backend: str = AUTO


def _forward(*arguments: Any) -> LinearTokenLogprobs:
    call = LinearInputs(*arguments)
    check_linear_arguments(_NAME, call.hidden, call.weight, call.targets, call.bias, call.softcap)
    check_targets(_NAME, call.targets, call.weight.shape[0], call.ignore_index)
    chosen = resolve_backend(call.backend, call.hidden.device, LINEAR_BACKENDS)
    count_call(chosen, _OP)
    return _RUNS[chosen](call)


def _by_reference(call: LinearInputs) -> LinearTokenLogprobs:
    options = {
        name: value for name, value in call._asdict().items() if name not in ("hidden", "weight", "targets", "backend")
    }
    return reference.linear_token_logprobs(call.hidden, call.weight, call.targets, **options)


_RUNS: dict[str, Callable[[LinearInputs], LinearTokenLogprobs]] = {
    "reference": _by_reference,
    "native": blockwise.linear_token_logprobs,
    "triton": triton_backend.linear_token_logprobs,
}


def _fake_forward(*arguments: Any) -> LinearTokenLogprobs:
    call = LinearInputs(*arguments)
    hidden, rows, dtype = call.hidden, call.hidden.shape[0], accumulator(call.hidden)
    return LinearTokenLogprobs(
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(rows, dtype=torch.float64),
        hidden.new_empty(rows, dtype=torch.float64) if call.want_entropy else None,
        hidden.new_empty(hidden.shape, dtype=dtype) if call.unit_gradients else None,
        hidden.new_empty(hidden.shape, dtype=dtype) if call.unit_gradients and call.want_entropy else None,
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: LinearTokenLogprobs) -> None:
    hidden, weight, targets, bias, ctx.softcap, *_flags, ctx.ignore_index, ctx.backend = inputs
    result = LinearTokenLogprobs(*output)
    ctx.mark_non_differentiable(*(unit for unit in result[3:] if unit is not None))
    ctx.save_for_backward(hidden, weight, bias, targets, *result)


def _differentiate(
    ctx: Any, grad_logprob: Tensor, grad_lse: Tensor, grad_entropy: Tensor | None, *_units: Tensor | None
) -> tuple[Any, ...]:
    hidden, weight, bias, targets, *result = ctx.saved_tensors
    # As short as the call was: the dispatcher leaves out trailing arguments that have their default.
    wants_hidden, wants_weight, _, wants_bias = (*ctx.needs_input_grad, False)[:4]
    of_hidden, of_weight, of_bias = _linear_token_logprobs_backward(
        grad_logprob,
        grad_lse,
        grad_entropy,
        hidden,
        weight,
        bias,
        targets,
        *result,
        ctx.softcap,
        [wants_hidden, wants_weight, wants_bias],
        ctx.ignore_index,
        ctx.backend,
    )
    return of_hidden, of_weight, None, of_bias, None, None, None, None, None


def _backward(*arguments: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    call = _Backward(*arguments)
    chosen = resolve_backend(call.backend, call.hidden.device, LINEAR_BACKENDS)
    count_call(chosen, _BACKWARD_OP)
    upstream = call[:3]
    of_hidden = of_weight = of_bias = None
    if call.wanted[0]:
        assert call.unit_logprob is not None
        result = LinearTokenLogprobs(*call[7:12])
        of_hidden = linear_gradients.gradient_of_hidden(
            upstream, call.weight, call.targets, result, call.softcap, call.ignore_index
        ).to(call.hidden.dtype)
    if call.wanted[1] or call.wanted[2]:
        of_weight, of_bias = linear_gradients.gradient_of_weight(
            upstream,
            call.hidden,
            call.weight,
            call.bias,
            call.targets,
            (call.lse, call.entropy),
            call.softcap,
            (call.wanted[1], call.wanted[2]),
            call.ignore_index,
            logits_dtype(chosen, call.hidden.dtype),
        )
    return of_hidden, of_weight, of_bias


def _fake_backward(*arguments: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    call = _Backward(*arguments)
    candidates = zip(call.wanted, (call.hidden, call.weight, call.bias), strict=True)
    of_hidden, of_weight, of_bias = (torch.empty_like(t) if want and t is not None else None for want, t in candidates)
    return of_hidden, of_weight, of_bias


def _save_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    grads, (hidden, weight, bias, targets) = inputs[:3], inputs[3:7]
    ctx.softcap, _, ctx.ignore_index, _ = inputs[12:]
    ctx.save_for_backward(*grads, hidden, weight, bias, targets)


def _differentiate_twice(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    """By plain torch's second derivatives of the reference, which hold ``[rows, vocabulary]`` for a few rows at a time."""
    *upstream, hidden, weight, bias, targets = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:6]
    found = linear_gradients.second_derivatives(
        upstream, (hidden, weight, bias), targets, cotangents, wanted, ctx.softcap, ctx.ignore_index
    )
    return (*found.of_upstream, found.of_hidden, found.of_weight, found.of_bias, *(None,) * 10)


_linear_token_logprobs = register(
    _OP,
    "(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias=None, float? softcap=None, bool want_entropy=False, "
    "bool unit_gradients=False, int ignore_index=-100, str backend='auto') "
    "-> (Tensor, Tensor, Tensor?, Tensor?, Tensor?)",
    _forward,
    _fake_forward,
)
_linear_token_logprobs_backward = register(
    _BACKWARD_OP,
    "(Tensor grad_logprob, Tensor grad_lse, Tensor? grad_entropy, Tensor hidden, Tensor weight, Tensor? bias, "
    "Tensor targets, Tensor logprob, Tensor lse, Tensor? entropy, Tensor? unit_logprob, Tensor? unit_entropy, "
    "float? softcap, bool[] wanted, int ignore_index=-100, str backend='auto') -> (Tensor?, Tensor?, Tensor?)",
    _backward,
    _fake_backward,
)
torch.library.register_autograd(_OP, _differentiate, setup_context=_save_for_backward)
torch.library.register_autograd(_BACKWARD_OP, _differentiate_twice, setup_context=_save_for_double_backward)
