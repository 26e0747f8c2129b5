"""Are a contender's numbers right? What gives wrong ones gets no speed."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.probe.contenders import sums_of, two_pass_result
from benchmarks.probe.setting import Setting, build
from benchmarks.probe.sums import Sums
from entropy_fast.estimates.result import DeltaH1Result

FLOAT32 = 1e-4  # relative to the norm: sums over all parameters, taken in different orders
TIMES_THE_REFERENCE_S_OWN = 3.0  # in half precision
BFLOAT16_ROUNDING = 2.0**-9  # relative; the plain step's log-probs are stored in bfloat16, as trainers' are


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the two-pass engine finds, in float32, and how far others may be from it.

    Attributes:
        sums: kernel sums.
        sequence_logprobs: [N] S of the update batch.
        allowed: largest relative difference, by name of the number.
    """

    sums: Sums
    sequence_logprobs: Tensor
    allowed: dict[str, float]


def differences(found: Sums, expected: Sums) -> dict[str, float]:
    """‖found - expected‖ / ‖expected‖ of each vector; X_sum · Y_sum relative to the sum of |row sums|."""
    off = {"x_dot_y": abs(found.x_dot_y - expected.x_dot_y) / float(expected.row_sums.abs().sum())}
    for name in ("diagonal", "row_sums", "column_sums"):
        a, b = getattr(found, name), getattr(expected, name)
        if a.shape != b.shape:
            off[name] = float("inf")
        elif b.numel():
            off[name] = float((a.double() - b).norm() / b.norm())
    return off


def _logprobs_off(found: Tensor, expected: Tensor) -> float:
    found = found.flatten().double()
    return float((found - expected).norm() / expected.norm()) if found.shape == expected.shape else float("inf")


def _expected(result: DeltaH1Result, own_error: dict[str, float] | None = None) -> Expected:
    names = ("x_dot_y", "diagonal", "row_sums", "column_sums", "sequence_logprobs")
    own = own_error or {}
    allowed = {name: max(FLOAT32, TIMES_THE_REFERENCE_S_OWN * own.get(name, 0.0)) for name in names}
    return Expected(sums_of(result), result.sequences["update"].sequence_logprobs, allowed)


def expected_of(setting: Setting, rollouts_file: Path | None) -> Expected:
    """The reference. In half precision it is taken in float32, and the two-pass engine's own error there is the measure."""
    if not setting.workload.bfloat16:
        return _expected(two_pass_result(setting))
    exact = two_pass_result(build(setting.workload, rollouts_file).in_float32())
    gc.collect()
    rounded = two_pass_result(setting)
    off = differences(sums_of(rounded), sums_of(exact))
    # One measure for all of them: any one number, a scalar above all, can be nearly right by luck.
    own = dict.fromkeys(off, max(off.values()))
    truth = exact.sequences["update"].sequence_logprobs
    own["sequence_logprobs"] = _logprobs_off(rounded.sequences["update"].sequence_logprobs, truth)
    expected = _expected(exact, own)
    expected.allowed["sequence_logprobs"] += BFLOAT16_ROUNDING
    return expected


def complaint(found: Sums | Tensor, expected: Expected) -> str:
    """What is wrong; empty when nothing is."""
    if isinstance(found, torch.Tensor):
        off = {"sequence_logprobs": _logprobs_off(found, expected.sequence_logprobs)}
    else:
        off = differences(found, expected.sums)
        scale = float(found.row_sums.abs().sum())
        for name in ("row_sums", "column_sums"):
            total = float(getattr(found, name).sum())
            if not abs(total - found.x_dot_y) <= expected.allowed["x_dot_y"] * scale:
                return f"{name} add up to {total:.8g}, X_sum·Y_sum is {found.x_dot_y:.8g}"
    for name, value in off.items():
        # Not `>`: NaN is wrong too.
        if not value <= expected.allowed[name]:
            return f"{name} off by {value:.2g} relative (allowed: {expected.allowed[name]:.2g})"
    return ""
