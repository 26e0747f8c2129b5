"""The op ``entropy_fast::token_logprobs``: log-probabilities of chosen tokens in one pass over the logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropy_fast import reference
from entropy_fast.errors import ConfigError
from entropy_fast.ops import native_backend, triton_backend
from entropy_fast.ops.backends import AUTO, count_call, resolve_backend

__all__ = ["TokenLogprobs", "token_logprobs"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_OP = "entropy_fast::token_logprobs"
_BACKWARD_OP = "entropy_fast::token_logprobs_backward"


class TokenLogprobs(NamedTuple):
    """What :func:`token_logprobs` returns.

    Attributes:
        logprob: ``[rows]``, the log-probability of each target; float32, or float64 for float64 logits.
        lse: ``[rows]``, the log of the sum of exponentials of each row; same dtype.
    """

    logprob: Tensor
    lse: Tensor


def token_logprobs(
    logits: Tensor, targets: Tensor, *, ignore_index: int = -100, backend: str | None = None
) -> TokenLogprobs:
    """Log-probability of each row's target, and the log of the sum of exponentials of each row.

    Same value and gradient as ``log_softmax(logits.float()).gather(...)``, without a ``[rows, vocabulary]`` temporary
    in the forward. Deterministic: a row's result depends on that row alone, not on the batch or the number of threads.

    Args:
        logits: ``[rows, vocabulary]``, float32, float64, bfloat16 or float16. Rows may lie any distance apart; logits
            whose last dimension is not contiguous are copied.
        targets: ``[rows]`` int64 on the same device, each in ``[0, vocabulary)`` or equal to ``ignore_index``.
        ignore_index: rows with this target are not read; they give 0 and pass no gradient.
        backend: ``reference``, ``native``, ``triton`` or ``cuda``; None for the environment variable
            ``ENTROPY_FAST_BACKEND`` and, where that is unset, the best one for the device.

    Returns:
        :class:`TokenLogprobs`. A NaN in a row makes that row's results NaN; a row that is -inf throughout, or holds a
        +inf, has a NaN ``logprob`` and an infinite ``lse``.

    Raises:
        ConfigError: shapes, dtypes, devices or targets do not fit, or there is no such backend.
        BackendUnavailableError: the backend was asked for by name and cannot run here.
    """
    _check_arguments(logits, targets)
    logprob, lse = _token_logprobs(logits, targets, ignore_index, AUTO if backend is None else backend)
    return TokenLogprobs(logprob, lse.to(logprob.dtype))


def _check_arguments(logits: Tensor, targets: Tensor) -> None:
    if logits.dim() != 2 or targets.dim() != 1 or logits.shape[0] != targets.shape[0]:
        raise ConfigError(
            f"token_logprobs got logits of shape {tuple(logits.shape)} and targets of shape {tuple(targets.shape)}; "
            "expected [rows, vocabulary] and [rows].",
            fix="flatten all leading dimensions into rows.",
        )
    if logits.dtype not in _DTYPES or targets.dtype != torch.int64:
        raise ConfigError(
            f"token_logprobs got {logits.dtype} logits and {targets.dtype} targets; expected float32, float64, "
            "bfloat16 or float16, and int64.",
            fix="convert them first.",
        )
    if logits.device != targets.device:
        raise ConfigError(
            f"token_logprobs got logits on {logits.device} and targets on {targets.device}.",
            fix="move them to one device.",
        )


def _check_targets(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    outside = ((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise ConfigError(
            f"token_logprobs got targets[{row}] = {int(targets[row])}; expected a token in [0, {vocabulary}) or "
            f"ignore_index = {ignore_index}.",
            fix="check that the tokens belong to this model's vocabulary, and what marks the masked positions.",
        )


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _dense_rows(logits: Tensor) -> Tensor:
    return logits if logits.shape[1] <= 1 or logits.stride(1) == 1 else logits.contiguous()


@torch.library.custom_op(_OP, mutates_args=())
def _token_logprobs(
    logits: Tensor, targets: Tensor, ignore_index: int = -100, backend: str = AUTO
) -> tuple[Tensor, Tensor]:
    _check_arguments(logits, targets)
    _check_targets(targets, logits.shape[1], ignore_index)
    chosen = resolve_backend(backend, logits.device)
    count_call(chosen, _OP)
    if chosen == "reference":
        return reference.token_logprobs(logits, targets, ignore_index=ignore_index)
    logprob = logits.new_empty(logits.shape[0], dtype=_accumulator(logits.dtype))
    lse = logits.new_empty(logits.shape[0], dtype=torch.float64)
    run = triton_backend.forward if chosen == "triton" else native_backend.forward
    run(_dense_rows(logits), targets.contiguous(), logprob, lse, ignore_index)
    return logprob, lse


@torch.library.custom_op(_BACKWARD_OP, mutates_args=())
def _token_logprobs_backward(
    grad_logprob: Tensor,
    grad_lse: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int = -100,
    backend: str = AUTO,
) -> Tensor:
    chosen = resolve_backend(backend, logits.device)
    count_call(chosen, _BACKWARD_OP)
    if chosen == "reference":
        return reference.token_logprobs_backward(
            grad_logprob, grad_lse, logits, targets, lse, ignore_index=ignore_index
        )
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    run = triton_backend.backward if chosen == "triton" else native_backend.backward
    run(
        grad_logprob.contiguous(),
        grad_lse.contiguous(),
        _dense_rows(logits),
        targets.contiguous(),
        lse.contiguous(),
        grad_logits,
        ignore_index,
    )
    return grad_logits


@_token_logprobs.register_fake
def _(logits: Tensor, targets: Tensor, ignore_index: int = -100, backend: str = AUTO) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=_accumulator(logits.dtype)), logits.new_empty(rows, dtype=torch.float64)


@_token_logprobs_backward.register_fake
def _(
    grad_logprob: Tensor,
    grad_lse: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int = -100,
    backend: str = AUTO,
) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, ctx.ignore_index, ctx.backend = inputs
    ctx.save_for_backward(logits, targets, output[1])


def _differentiate(ctx: Any, grad_logprob: Tensor, grad_lse: Tensor) -> tuple[Tensor, None, None, None]:
    logits, targets, lse = ctx.saved_tensors
    gradient = _token_logprobs_backward(grad_logprob, grad_lse, logits, targets, lse, ctx.ignore_index, ctx.backend)
    return gradient, None, None, None


def _save_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.ignore_index, _backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_twice(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # In plain torch, and so differentiable again: second derivatives are rare.
    grad_logprob, grad_lse, logits, targets, lse = ctx.saved_tensors
    ignored = targets == ctx.ignore_index
    index = targets.masked_fill(ignored, 0).unsqueeze(-1)
    probability = reference.probabilities(logits, lse, ignored)
    wide = grad.to(probability.dtype).masked_fill(ignored.unsqueeze(-1), 0.0)
    weighted = wide * probability
    of_scale = weighted.sum(-1)
    of_logprob = wide.gather(-1, index).squeeze(-1) - of_scale
    scale = (grad_lse - grad_logprob.double()).to(probability.dtype)
    of_lse = -(scale * of_scale).double()
    of_logits = (scale.unsqueeze(-1) * weighted).to(logits.dtype)
    return of_logprob, of_scale.double(), of_logits, None, of_lse, None, None


_token_logprobs.register_autograd(_differentiate, setup_context=_save_for_backward)
_token_logprobs_backward.register_autograd(_differentiate_twice, setup_context=_save_for_double_backward)
