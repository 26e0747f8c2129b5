"""Do both modes of differentiation agree on this model? Asked once, of one prompt, before a batch goes through in forward mode.

An operation without forward derivative is an error of torch's in most cases. In some it goes on with a tangent of 0: a custom
operator, ``.data``, a parameter that the model does not read from its module. Nothing in the numbers of a batch would tell.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from entropy_fast.checks.coverage import PassCoverage
from entropy_fast.checks.grad_context import assert_attached
from entropy_fast.checks.repeatability import check_repeatable
from entropy_fast.columns import Side
from entropy_fast.columns.coefficients import power_of_two_scale
from entropy_fast.context import ProbeContext
from entropy_fast.engines.forward_mode.forward import ForwardWithTangents
from entropy_fast.engines.forward_mode.refusals import FORWARD_DERIVATIVE_FIX
from entropy_fast.engines.gradient_sum import GradientSum
from entropy_fast.engines.sums import coverage_of
from entropy_fast.engines.two_pass.gradient_routes import gradients_by_backward
from entropy_fast.errors import ForwardDerivativeError
from entropy_fast.rollouts import Rollouts
from entropy_fast.ways.teacher_forcing import PaddedBatch, align_logprobs, model_logits, pad_rows

__all__ = ["check_against_reverse_mode", "scaled_direction"]

# How far apart two ways to a derivative in which nothing cancels may be, relative. On a CPU; elsewhere, where float32 may mean
# TF32; and where the model itself is in 16 or 8 bits.
_AGREEMENT = 1e-4
_AGREEMENT_IN_TF32 = 2e-3
_AGREEMENT_IN_16_BITS = 0.1
_COARSE = (torch.bfloat16, torch.float16, torch.int8)


def check_against_reverse_mode(
    context: ProbeContext, rollouts: Rollouts, rows: Tensor, lengths: Sequence[Tensor]
) -> PassCoverage:
    """Raise unless both modes agree on one derivative of one prompt's Σ_i S_i.

    Along the gradient g_p of every parameter p, with the length of its update Y_p: Σ_p ‖g_p‖ ‖Y_p‖, in which nothing cancels,
    so that a use of a parameter which forward mode goes past is missed by what it may contribute. A model in fp32 or wider is
    asked without autocast, whose rounding would have to be allowed for.

    Args:
        context: the probe's; inside its ``probe_state``.
        rollouts: the entropy batch.
        rows: [G] the rows of one prompt.
        lengths: Y_p of every parameter, of which the norm counts.

    Returns:
        What the gradient reaches, which stands for the coverage of X.

    Raises:
        ForwardDerivativeError: they do not agree, or an operation has no forward derivative.
        GraphDetachedError: the log-probs hang on no parameter.
        GradientCoverageError: no parameter receives a gradient.
        ModelStateError: the two forwards give different log-probs.
    """
    coarse, device = _is_coarse(context), context.device
    batch = pad_rows(rollouts, rows, device)
    autocast = context.autocast if coarse else lambda: torch.autocast(device.type, enabled=False)
    first, gradient = _by_backward(context, batch, autocast)
    coverage = coverage_of(context, Side.FUNCTIONAL, gradient, rollouts)
    expected = 0.0
    for g, y in zip(gradient.tensors, lengths, strict=True):
        own, wanted = (float(t.double().norm()) for t in (g, y))
        g.mul_(wanted / own if own > 0 else 0.0)
        expected += own * wanted
    parameters = context.registry.tensors
    direction, scale = scaled_direction(gradient.tensors, parameters)
    forward = ForwardWithTangents(
        context.registry.module, parameters, autocast, batch, context.estimate.policy_temperature
    )
    found = forward.run(batch, direction)
    # The random state has moved on between the two, so randomness that nobody switched off shows.
    check_repeatable(first, found.values.sequence_logprobs.double().cpu(), rows)
    value = float(found.tokens.double().sum()) / scale
    allowed = _AGREEMENT_IN_16_BITS if coarse else _AGREEMENT if device.type == "cpu" else _AGREEMENT_IN_TF32
    if not math.isfinite(expected) or abs(value - expected) > allowed * expected:
        raise ForwardDerivativeError(
            f"engine 'jvp': along the gradient of one prompt's log-probs the derivative is {value:.6g} by forward mode and "
            f"{expected:.6g} by reverse mode; they must agree to {allowed:g}. An operation of the model drops its tangent (a "
            "custom operator, .data, a parameter that is not read from its module), or has one that reverse mode does not see "
            "(no_grad inside the forward).",
            fix=FORWARD_DERIVATIVE_FIX,
        )
    return dataclasses.replace(coverage, norm=None, one_prompt=True)


def scaled_direction(tensors: Sequence[Tensor], parameters: Sequence[Tensor]) -> tuple[list[Tensor], float]:
    """Tangents in the parameters' dtypes and devices, of ordinary size.

    Args:
        tensors: one a parameter, in its shape; multiplied in place by the scale.
        parameters: the parameters.

    Returns:
        The tangents, and the power of two they were multiplied by.
    """
    scale = power_of_two_scale(torch.stack([t.abs().max().double().cpu() for t in tensors]))
    scaled = [t.mul_(scale).to(device=p.device, dtype=p.dtype) for t, p in zip(tensors, parameters, strict=True)]
    return scaled, scale


def _by_backward(
    context: ProbeContext, batch: PaddedBatch, autocast: Callable[[], contextlib.AbstractContextManager[object]]
) -> tuple[Tensor, GradientSum]:
    """[n] S_i, fp64 on the CPU, and the gradient of their sum."""
    context.registry.check("check_against_reverse_mode")
    with autocast():
        logits = model_logits(context.registry.module, batch)
    assert_attached("logits", logits, "check_against_reverse_mode")
    logprobs = align_logprobs(logits, batch, temperature=context.estimate.policy_temperature).sequence_logprobs
    total = GradientSum.zeros(context.registry.tensors, None)
    total.add(gradients_by_backward(logprobs.sum(), context.registry))
    return logprobs.detach().double().cpu(), total


def _is_coarse(context: ProbeContext) -> bool:
    """Whether anything in the model, trained or not, is in 16 or 8 bits, whatever autocast does."""
    module = context.registry.module
    dtypes = [p.dtype for p in module.parameters()]
    dtypes.extend(getattr(m, "compute_dtype", None) or torch.float32 for m in module.modules())
    return any(dtype in dtypes for dtype in _COARSE)
