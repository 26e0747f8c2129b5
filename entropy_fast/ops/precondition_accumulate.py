"""The op ``entropy_fast::precondition_accumulate``: one pass that folds gradients into X_sum and Y_sum and takes dots.

Legend: x entropy gradient, g update gradient, v second moment, y = P g the preconditioned one, X_sum and Y_sum the sums of x
and y over earlier calls.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from entropy_fast import reference
from entropy_fast.errors import ConfigError
from entropy_fast.ops import native_backend, triton_backend
from entropy_fast.ops.accumulation_table import accumulation_table, kind_of
from entropy_fast.ops.backends import AUTO, count_call, requested, resolve_backend
from entropy_fast.ops.registration import register

__all__ = ["precondition_accumulate"]

_OP = "entropy_fast::precondition_accumulate"


def precondition_accumulate(
    x: Sequence[Tensor],
    g: Sequence[Tensor],
    v: Sequence[Tensor | None],
    X_sum: Sequence[Tensor],
    Y_sum: Sequence[Tensor],
    *,
    bias_correction: Sequence[float],
    eps: Sequence[float],
    ratio: Sequence[float] | None = None,
    x_scale: float = 1.0,
    g_scale: float = 1.0,
    update: bool = True,
    backend: str | None = None,
) -> Tensor:
    """For every tensor of the lists: y = g · g_scale · ratio / (√(v · bias_correction) + eps), then X_sum += x, Y_sum += y.

    Every element is read and written once, whatever the number of tensors. Products and sums of the dots are in float64, in
    an order that depends on the tensors' sizes alone: two runs give the same bits. Nothing waits for a GPU.

    Args:
        x: entropy gradients, float32, bfloat16, float16 or float64; multiplied by ``x_scale`` first. Gradients that are not
            contiguous are copied.
        g: update gradients, of the same shapes and dtypes as ``x``.
        v: second moments of the same shapes, float32, or bfloat16 or float64 with such gradients (anything else is
            converted first, at the cost of a copy); None for a tensor without any. Where v is 0 or None, y is 0.
        X_sum: sums of x, float32, or float64 for float64 gradients; contiguous, changed in place.
        Y_sum: sums of y, likewise.
        bias_correction: 1 / (1 - β2^step) of each tensor.
        eps: ε of each tensor.
        ratio: learning rate of each tensor's group relative to the first group's; None for 1 throughout.
        x_scale: factor of every x.
        g_scale: factor of every g.
        update: False to leave the sums as they are and take the dots alone.
        backend: ``reference``, ``native``, ``triton`` or ``cuda``; None for the environment variable
            ``ENTROPY_FAST_BACKEND`` and, where that is unset, the best one for the device.

    Returns:
        ``[len(x), 3]`` float64 on the device of the tensors: ⟨x, y⟩, ⟨x, Y_sum⟩ and ⟨y, X_sum⟩ of each tensor, with the sums
        as they were *before* this call. Over successive calls
        ⟨ΣX, ΣY⟩ - Σ⟨x_i, y_i⟩ = Σ_j (⟨x_j, Y_sum⟩ + ⟨y_j, X_sum⟩).

    Raises:
        ConfigError: lists of different lengths, or tensors whose shapes, dtypes or devices do not fit.
        BackendUnavailableError: the backend was asked for by name and cannot run here.
    """
    result: Tensor = _precondition_accumulate(
        list(x),
        list(g),
        list(v),
        list(X_sum),
        list(Y_sum),
        list(bias_correction),
        list(eps),
        [1.0] * len(x) if ratio is None else list(ratio),
        x_scale,
        g_scale,
        update,
        requested(backend),
    )
    return result


def _check_arguments(
    x: Sequence[Tensor],
    g: Sequence[Tensor],
    v: Sequence[Tensor | None],
    X_sum: Sequence[Tensor],
    Y_sum: Sequence[Tensor],
    factors: tuple[Sequence[float], ...],
) -> None:
    lengths = [len(part) for part in (x, g, v, X_sum, Y_sum, *factors)]
    if len(set(lengths)) > 1:
        raise ConfigError(
            f"precondition_accumulate got lists of {lengths} entries (x, g, v, X_sum, Y_sum, bias_correction, eps, ratio); "
            "they must be of one length.",
            fix="pass one entry per parameter in each.",
        )
    for index, (entropy, update, moment, x_sum, y_sum) in enumerate(zip(x, g, v, X_sum, Y_sum, strict=True)):
        tensors = [t for t in (entropy, update, moment, x_sum, y_sum) if t is not None]
        sum_dtype = torch.promote_types(entropy.dtype, torch.float32)
        fits = (
            len({t.shape for t in tensors}) == 1
            and {t.device for t in tensors} == {x[0].device}
            and entropy.dtype == update.dtype
            and entropy.is_floating_point()
            and x_sum.dtype == y_sum.dtype == sum_dtype
            and x_sum.is_contiguous()
            and y_sum.is_contiguous()
        )
        if not fits:
            found = ", ".join(f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in tensors)
            raise ConfigError(
                f"precondition_accumulate, tensor {index}: got {found} (x, g, v, X_sum, Y_sum); expected one shape, one "
                f"device for all tensors, x and g of one floating dtype and contiguous sums in {sum_dtype}.",
                fix="keep the sums in float32 (float64 for float64 gradients), on the device of the gradients.",
            )


def _check_memory(sums: Sequence[Tensor]) -> None:
    places = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in sums if t.numel())
    if any(end > start for (_, end), (start, _) in itertools.pairwise(places)):
        raise ConfigError(
            "precondition_accumulate got sums that share memory.", fix="give every sum a tensor of its own."
        )


def _implementation(
    x: list[Tensor],
    g: list[Tensor],
    v: list[Tensor | None],
    X_sum: list[Tensor],
    Y_sum: list[Tensor],
    bias_correction: list[float],
    eps: list[float],
    ratio: list[float],
    x_scale: float,
    g_scale: float,
    update: bool,
    backend: str = AUTO,
) -> Tensor:
    # Here, not where Python calls: the op can be called by its name in torch.ops, and traced.
    _check_arguments(x, g, v, X_sum, Y_sum, (bias_correction, eps, ratio))
    _check_memory((*X_sum, *Y_sum))
    device = x[0].device if x else torch.device("cpu")
    chosen = resolve_backend(backend, device)
    count_call(chosen, _OP)
    if chosen == "reference":
        return reference.precondition_accumulate(
            x,
            g,
            v,
            X_sum,
            Y_sum,
            bias_correction=bias_correction,
            eps=eps,
            ratio=ratio,
            x_scale=x_scale,
            g_scale=g_scale,
            update=update,
        )
    table = accumulation_table(
        [t.contiguous() for t in x],
        [t.contiguous() for t in g],
        [
            None if m is None else m.to(kind_of(t.dtype, m.dtype).moment_dtype).contiguous()
            for t, m in zip(x, v, strict=True)
        ],
        X_sum,
        Y_sum,
        list(zip(bias_correction, eps, ratio, strict=True)),
    )
    dots = torch.empty(len(x), 3, dtype=torch.float64, device=device)
    run = triton_backend if chosen == "triton" else native_backend
    run.precondition_accumulate(table, dots, x_scale, g_scale, update)
    return dots


def _fake(
    x: list[Tensor],
    g: list[Tensor],
    v: list[Tensor | None],
    X_sum: list[Tensor],
    Y_sum: list[Tensor],
    *_: object,
) -> Tensor:
    # One tensor without data among others that have some leads here, where shapes may be symbols.
    devices = {t.device for t in (*x, *g, *v, *X_sum, *Y_sum) if t is not None}
    if len(devices) > 1:
        raise ConfigError(
            f"precondition_accumulate got tensors on {', '.join(sorted(map(str, devices)))}; expected one device for all.",
            fix="move them to the device of the gradients.",
        )
    return torch.empty(len(x), 3, dtype=torch.float64, device=x[0].device if x else "cpu")


_precondition_accumulate = register(
    _OP,
    "(Tensor[] x, Tensor[] g, Tensor?[] v, Tensor(a!)[] X_sum, Tensor(b!)[] Y_sum, float[] bias_correction, float[] eps, "
    "float[] ratio, float x_scale, float g_scale, bool update, str backend='auto') -> Tensor",
    _implementation,
    _fake,
)
