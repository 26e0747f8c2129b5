"""What an engine finds on the way to its result: X_sum and Y_sum, beside K and δH₁.

Legend: X_sum = Σ_n X_n raw, Y_sum = P Σ_n g_n, K_nm = X_n · Y_m, U the mean of K off its diagonal, SE its standard error.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from probe_options import options_of
from torch import Tensor, nn

from entropy_fast import DeltaH1Result, OfflineEntropyProbe, Rollouts
from entropy_fast.context import ProbeContext
from entropy_fast.engines import sums
from entropy_fast.engines.gradient_sum import GradientSum
from entropy_fast.step import AdamState

Optimizer = torch.optim.Optimizer | AdamState


@dataclasses.dataclass(frozen=True)
class Observed:
    """A result and the two sums it came from, by parameter name."""

    result: DeltaH1Result
    sums: dict[str, dict[str, Tensor]]

    @property
    def kernel(self) -> Tensor:
        assert self.result.kernel is not None
        return self.result.kernel

    @property
    def u(self) -> float:
        return self.result.delta_h1 / self.result.learning_rate

    @property
    def std_error(self) -> float:
        """Of U."""
        return self.result.std_error / self.result.learning_rate


def observe(engine: str, model: nn.Module, optimizer: Optimizer, rollouts: Rollouts, **options: object) -> Observed:
    """Probe with ``engine`` and keep what `finish_functional` and `finish_update` returned."""
    config = dict(full_kernel=True, **{"prompts_per_microbatch": 2, **options})
    probe = OfflineEntropyProbe(model, optimizer, **options_of(engine=engine, **config))
    kept: dict[str, dict[str, Tensor]] = {}

    def keeping(label: str, finish: Callable[..., Any]) -> Callable[..., Any]:
        def run(context: ProbeContext, total: GradientSum, batch: Rollouts) -> Any:
            done = finish(context, total, batch)
            assert label not in kept, f"{engine} formed {label}_sum twice"
            kept[label] = {n: t.detach().clone() for n, t in zip(context.registry.names, done[0].tensors, strict=True)}
            return done

        return run

    with pytest.MonkeyPatch.context() as patch:
        for label, name in (("X", "finish_functional"), ("Y", "finish_update")):
            patch.setattr(sums, name, keeping(label, getattr(sums, name)))
        result = probe.compute_delta_h1(rollouts)
    assert kept.keys() == {"X", "Y"}, f"{engine} formed its sums without finish_functional and finish_update"
    return Observed(result, kept)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def median_error(found: Tensor, expected: Tensor) -> float:
    """Of K's entries: a norm would hang on the few largest."""
    return float((found.double() - expected.double()).abs().median() / expected.double().norm())


def ratio_of(errors: dict[str, list[float]], last: int | None = None) -> float:
    """Geometric mean over all draws, or over so many of the last, of the first list's errors relative to the second's."""
    one, two = (own[-last:] if last else own for own in errors.values())
    return math.exp(sum(math.log(a / b) for a, b in zip(one, two, strict=True)) / len(one))


def assert_same_sums(found: Observed, expected: Observed, tolerance: float) -> None:
    """Every tensor of X_sum and of Y_sum for itself: an error in a small one does not hide behind a large one.

    A tensor that is next to nothing (keys' biases have no gradient but rounding) is measured against a thousandth of an
    average tensor.
    """
    for label, tensors in expected.sums.items():
        sizes = {name: float(tensor.norm()) for name, tensor in tensors.items()}
        floor = 1e-3 * max(sizes.values()) / len(sizes) ** 0.5
        assert floor > 0
        for name, tensor in tensors.items():
            error = float((found.sums[label][name] - tensor).norm())
            assert error <= tolerance * max(sizes[name], floor), f"{label}_sum of {name}: {error} of {sizes[name]}"


def assert_same_estimate(found: Observed, expected: Observed, tolerance: float) -> None:
    """K, U and SE; U by its standard error, because it may be near 0 by cancellation."""
    assert relative(found.kernel, expected.kernel) <= tolerance
    assert abs(found.u - expected.u) <= tolerance * expected.std_error
    assert abs(found.std_error - expected.std_error) <= tolerance * expected.std_error
