"""The op ``entropy_fast::token_logprobs``: log-probabilities of chosen tokens in one pass over the logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropy_fast import reference
from entropy_fast.errors import ConfigError
from entropy_fast.ops import native_backend, triton_backend
from entropy_fast.ops.backends import AUTO, count_call, requested, resolve_backend
from entropy_fast.ops.registration import accumulator, described, refuse_forward_mode, register

__all__ = ["Backward", "TokenLogprobs", "check_targets", "overwrite_with_gradient", "token_logprobs"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_OP = "entropy_fast::token_logprobs"
_BACKWARD_OP = "entropy_fast::token_logprobs_backward"
_BACKWARD_IN_PLACE_OP = "entropy_fast::token_logprobs_backward_"


class TokenLogprobs(NamedTuple):
    """What :func:`token_logprobs` returns.

    Attributes:
        logprob: ``[rows]``, the log-probability of each target, nats; float32, or float64 for float64 logits.
        lse: ``[rows]``, the log of the sum of exponentials of each row; same dtype.
        entropy: ``[rows]``, the entropy of each row's distribution, nats; same dtype; None unless wanted.
    """

    logprob: Tensor
    lse: Tensor
    entropy: Tensor | None


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    want_entropy: bool = False,
    ignore_index: int = -100,
    overwrite_logits: bool = False,
    backend: str | None = None,
) -> TokenLogprobs:
    """Log-probability of each row's target, the log of the sum of exponentials of each row, and each row's entropy.

    Same value and gradient as ``log_softmax(logits.float()).gather(...)``, without a ``[rows, vocabulary]`` temporary
    in the forward. Deterministic: a row's result depends on that row alone, not on the batch or the number of threads.

    Args:
        logits: ``[rows, vocabulary]``, float32, float64, bfloat16 or float16. Rows may lie any distance apart; logits
            whose last dimension is not contiguous are copied.
        targets: ``[rows]`` int64 on the same device, each in ``[0, vocabulary)`` or equal to ``ignore_index``.
        want_entropy: whether the entropy is computed, in the same pass.
        ignore_index: rows with this target are not read; they give 0 and pass no gradient.
        overwrite_logits: let the backward write the gradient over the logits instead of allocating it, where no two rows
            share memory. Whoever else
            still needs the logits then (a second backward, a softcap's tanh) gets torch's error about tensors modified in
            place. A backward under ``create_graph`` leaves them alone.
        backend: ``reference``, ``native``, ``triton`` or ``cuda``; None for the environment variable
            ``ENTROPY_FAST_BACKEND`` and, where that is unset, the best one for the device.

    Returns:
        :class:`TokenLogprobs`. A NaN in a row makes that row's results NaN; a row that is -inf throughout, or holds a
        +inf, has a NaN ``logprob`` and ``entropy`` and an infinite ``lse``.

    Raises:
        ConfigError: shapes, dtypes, devices or targets do not fit, or there is no such backend. Targets on a GPU are not
            checked, which would mean waiting for them: the rows of impossible ones are NaN.
        BackendUnavailableError: the backend was asked for by name and cannot run here.
    """
    _check_arguments(logits, targets)
    refuse_forward_mode("token_logprobs", logits)
    logprob, lse, entropy = _token_logprobs(
        logits, targets, want_entropy, ignore_index, overwrite_logits, requested(backend)
    )
    return TokenLogprobs(logprob, lse.to(logprob.dtype), None if entropy is None else entropy.to(logprob.dtype))


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
    if logits.shape[1] == 0 and logits.shape[0] > 0:
        raise ConfigError(
            f"token_logprobs got logits of shape {tuple(logits.shape)}: a vocabulary of 0.",
            fix="pass [rows, vocabulary].",
        )
    if logits.device != targets.device:
        raise ConfigError(
            f"token_logprobs got logits on {logits.device} and targets on {targets.device}.",
            fix="move them to one device.",
        )


def check_targets(op: str, targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raise unless every target is a token or ``ignore_index``; looks at tensors on the CPU only.

    Raises:
        ConfigError: one is not; the message names the op, the row and the value.
    """
    if targets.device.type != "cpu":
        return
    outside = ((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise ConfigError(
            f"{op} got targets[{row}] = {int(targets[row])}; expected a token in [0, {vocabulary}) or "
            f"ignore_index = {ignore_index}.",
            fix="check that the tokens belong to this model's vocabulary, and what marks the masked positions.",
        )


def _rows_of_their_own(logits: Tensor) -> bool:
    """Whether every element has its own place in memory, and rows are contiguous."""
    return _dense_rows(logits) is logits and (logits.shape[0] <= 1 or logits.stride(0) >= logits.shape[1])


def _dense_rows(logits: Tensor) -> Tensor:
    return logits if logits.shape[1] <= 1 or logits.stride(1) == 1 else logits.contiguous()


class _Forward(NamedTuple):
    """Arguments of the op, in the order of its schema; the dispatcher leaves out trailing ones that have their default."""

    logits: Tensor
    targets: Tensor
    want_entropy: bool = False
    ignore_index: int = -100
    overwrite_logits: bool = False
    backend: str = AUTO


class Backward(NamedTuple):
    """Arguments of the backward ops: upstream gradients, the forward's inputs, and its ``lse`` and ``entropy`` (float64)."""

    grad_logprob: Tensor
    grad_lse: Tensor
    grad_entropy: Tensor | None
    logits: Tensor
    targets: Tensor
    lse: Tensor
    entropy: Tensor | None
    ignore_index: int = -100
    backend: str = AUTO


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    call = _Forward(*arguments)
    _check_arguments(call.logits, call.targets)
    check_targets("token_logprobs", call.targets, call.logits.shape[1], call.ignore_index)
    chosen = resolve_backend(call.backend, call.logits.device)
    count_call(chosen, _OP)
    if chosen == "reference":
        return reference.token_logprobs(
            call.logits, call.targets, want_entropy=call.want_entropy, ignore_index=call.ignore_index
        )
    results = _fake_forward(*arguments)
    run = triton_backend if chosen == "triton" else native_backend
    run.token_logprobs_forward(_dense_rows(call.logits), call.targets.contiguous(), *results, call.ignore_index)
    return results


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    call = _Forward(*arguments)
    rows = call.logits.shape[0]
    lse = call.logits.new_empty(rows, dtype=torch.float64)
    logprob = call.logits.new_empty(rows, dtype=accumulator(call.logits))
    return logprob, lse, torch.empty_like(lse) if call.want_entropy else None


def _backward(*arguments: Any) -> Tensor:
    call = Backward(*arguments)
    _check_backward(call)
    grad_logits = _fake_backward(*arguments)
    _fill_gradient(call, grad_logits)
    return grad_logits


def _backward_in_place(*arguments: Any) -> None:
    call = Backward(*arguments)
    _check_backward(call)
    if not _rows_of_their_own(call.logits):
        raise ConfigError(
            f"token_logprobs_backward_ got logits of shape {tuple(call.logits.shape)} and strides {call.logits.stride()}; "
            "expected contiguous rows that share no memory.",
            fix="pass contiguous logits, or use the op that allocates its result.",
        )
    _fill_gradient(call, call.logits)


def _fake_backward(*arguments: Any) -> Tensor:
    logits = Backward(*arguments).logits
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _check_backward(call: Backward) -> None:
    logits, targets = call.logits, call.targets
    _check_arguments(logits, targets)
    check_targets("token_logprobs_backward", targets, logits.shape[1], call.ignore_index)
    by_row = {
        "grad_logprob": (call.grad_logprob, accumulator(logits)),
        "grad_lse": (call.grad_lse, torch.float64),
        "lse": (call.lse, torch.float64),
        "grad_entropy": (call.grad_entropy, torch.float64),
        "entropy": (call.entropy, torch.float64),
    }
    for name, (tensor, dtype) in by_row.items():
        if tensor is None and name in ("grad_entropy", "entropy"):
            continue
        if tensor is None or tensor.shape != targets.shape or tensor.dtype != dtype or tensor.device != logits.device:
            raise ConfigError(
                f"token_logprobs_backward got {name} {None if tensor is None else described(tensor)}; expected {dtype} "
                f"{tuple(targets.shape)} on {logits.device}.",
                fix="pass what the forward of the same logits returned, and gradients like it.",
            )
    if call.grad_entropy is not None and call.entropy is None:
        raise ConfigError(
            "token_logprobs_backward got a gradient of the entropies without the entropies.",
            fix="pass those of the forward (want_entropy=True).",
        )


def _fill_gradient(call: Backward, grad_logits: Tensor) -> None:
    chosen = resolve_backend(call.backend, call.logits.device)
    count_call(chosen, _BACKWARD_OP)
    if chosen == "reference":
        gradient = reference.token_logprobs_backward(
            call.grad_logprob,
            call.grad_lse,
            call.logits,
            call.targets,
            call.lse,
            grad_entropy=call.grad_entropy,
            entropy=call.entropy,
            ignore_index=call.ignore_index,
        )
        grad_logits.copy_(gradient)
        return
    # The kernels take the entropy and its gradient, or neither.
    of_entropy = None if call.grad_entropy is None else call.grad_entropy.contiguous()
    run = triton_backend if chosen == "triton" else native_backend
    run.token_logprobs_backward(
        call.grad_logprob.contiguous(),
        call.grad_lse.contiguous(),
        of_entropy,
        _dense_rows(call.logits),
        call.targets.contiguous(),
        call.lse.contiguous(),
        None if of_entropy is None or call.entropy is None else call.entropy.contiguous(),
        grad_logits,
        call.ignore_index,
    )


def overwrite_with_gradient(call: Backward) -> None:
    """Write the gradient with respect to the logits over them."""
    _token_logprobs_backward_in_place(*call)
    # Whoever else saved these logits for a backward is told so by torch.
    torch.autograd.graph.increment_version(call.logits)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor | None]) -> None:
    logits, targets, _want_entropy, ctx.ignore_index, ctx.overwrite_logits, ctx.backend = inputs
    ctx.save_for_backward(logits, targets, *output[1:])


def _differentiate(ctx: Any, grad_logprob: Tensor, grad_lse: Tensor, grad_entropy: Tensor | None) -> tuple[Any, ...]:
    logits, targets, lse, entropy = ctx.saved_tensors
    call = Backward(grad_logprob, grad_lse, grad_entropy, logits, targets, lse, entropy, ctx.ignore_index, ctx.backend)
    if torch.is_grad_enabled():
        # The graph of this backward needs the logits, in later backwards too.
        ctx.overwrite_logits = False
    if ctx.overwrite_logits and _rows_of_their_own(logits):
        overwrite_with_gradient(call)
        gradient = logits.detach()
    else:
        gradient = _token_logprobs_backward(*call)
    return gradient, None, None, None, None, None


def _save_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.ignore_index, _backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_twice(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # In plain torch, and so differentiable again: second derivatives are rare.
    grad_logprob, grad_lse, grad_entropy, logits, targets, lse, entropy = ctx.saved_tensors
    ignored = targets == ctx.ignore_index
    index = targets.masked_fill(ignored, 0).unsqueeze(-1)
    log_probability = reference.log_probabilities(logits, lse, ignored)
    probability = log_probability.exp()
    wide = grad.to(probability.dtype).masked_fill(ignored.unsqueeze(-1), 0.0)
    weighted = wide * probability
    of_scale = weighted.sum(-1)
    of_logprob = wide.gather(-1, index).squeeze(-1) - of_scale
    scale = (grad_lse - grad_logprob.double()).to(probability.dtype)
    factor = scale.unsqueeze(-1)
    of_lse = -(scale * of_scale).double()
    of_grad_entropy = of_entropy = None
    if grad_entropy is not None and entropy is not None:
        # The gradient's part -e p (log p + H), with e the upstream gradient of the entropy H; log p = logits - lse.
        finite = log_probability.masked_fill(log_probability == -torch.inf, 0.0)
        deviation = finite + entropy.to(probability.dtype).unsqueeze(-1)
        upstream = grad_entropy.to(probability.dtype)
        projected = (weighted * deviation).sum(-1)
        of_grad_entropy = -projected.double()
        of_entropy = -(upstream * of_scale).double()
        of_lse = of_lse + (upstream * (projected + of_scale)).double()
        factor = factor - upstream.unsqueeze(-1) * (deviation + 1.0)
    of_logits = (factor * weighted).to(logits.dtype)
    return of_logprob, of_scale.double(), of_grad_entropy, of_logits, None, of_lse, of_entropy, None, None


def _over_batches(
    info: Any, in_dims: tuple[int | None, ...], logits: Tensor, targets: Tensor, *options: Any
) -> tuple[tuple[Tensor, Tensor, Tensor | None], tuple[int, int, int | None]]:
    """Vmap: the batch becomes more rows."""
    logits = logits.expand(info.batch_size, *logits.shape) if in_dims[0] is None else logits.movedim(in_dims[0], 0)
    targets = targets.expand(info.batch_size, *targets.shape) if in_dims[1] is None else targets.movedim(in_dims[1], 0)
    results = _token_logprobs(logits.flatten(0, 1), targets.flatten(), *options)
    logprob, lse, entropy = (None if part is None else part.view(targets.shape) for part in results)
    assert logprob is not None and lse is not None
    return (logprob, lse, entropy), (0, 0, None if entropy is None else 0)


_GRADIENTS = "Tensor grad_logprob, Tensor grad_lse, Tensor? grad_entropy"
_SAVED = "Tensor targets, Tensor lse, Tensor? entropy, int ignore_index=-100, str backend='auto'"
_token_logprobs = register(
    _OP,
    "(Tensor logits, Tensor targets, bool want_entropy=False, int ignore_index=-100, bool overwrite_logits=False, "
    "str backend='auto') -> (Tensor, Tensor, Tensor?)",
    _forward,
    _fake_forward,
)
_token_logprobs_backward = register(
    _BACKWARD_OP, f"({_GRADIENTS}, Tensor logits, {_SAVED}) -> Tensor", _backward, _fake_backward
)
_token_logprobs_backward_in_place = register(
    _BACKWARD_IN_PLACE_OP, f"({_GRADIENTS}, Tensor(a!) logits, {_SAVED}) -> ()", _backward_in_place, lambda *_: None
)
torch.library.register_autograd(_OP, _differentiate, setup_context=_save_for_backward)
torch.library.register_autograd(_BACKWARD_OP, _differentiate_twice, setup_context=_save_for_double_backward)
torch.library.register_vmap(_OP, _over_batches)
