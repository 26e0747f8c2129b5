"""The same-batch estimate: an order-2 U-statistic over units, with the standard errors it supports.

Legend: M units of sizes |b| (B prompts in all), K_nm = X_n · Y_m, and

    U = [X_sum·Y_sum - Σ_n K_nn] / (B² - Σ |b|²)          B(B - 1) for units of one prompt

The diagonal is left out because X_n and Y_n share samples. Row means r_n = Σ_{m≠n} (K_nm + K_mn) / (2(M - 1)) are the
symmetrised kernel's; the first-order (Hájek) variance of U is 4 ζ₁ / M with ζ₁ the variance of r_n. Standard theory of
U-statistics (Hoeffding); every formula is checked by simulation in tests/statistics.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from entropy_fast.errors import RolloutsError

__all__ = ["UEstimate", "jackknife", "u_estimate"]


@dataclasses.dataclass(frozen=True)
class UEstimate:
    """U and its standard errors, in the unit of U (before multiplication by the learning rate).

    A standard error is None where it is not defined: the jackknives need 3 units, the plug-in 3 of one size, the unbiased
    one 4 of one size and the whole kernel.

    Attributes:
        value: U.
        se_jackknife: delete-one jackknife, about the population's change.
        se_plug_in: 2·sqrt(ζ₁/M), about the population's change.
        se_unbiased: root of the unbiased variance of U; None also when that variance came out negative.
        unbiased_variance: the unbiased variance itself, which may be negative for few units.
        zeta_1: ζ₁, the variance of the row means.
        se_given_update: standard error about the change made by *this* batch's update: delete-one jackknife of the rows, which
            for units of one size is that of the mean of the X row means.
        row_means: [M] symmetrised row means r_n; their mean is U for equal units.
        contributions: [M] each unit's share of U; they sum to U.
        as_entropy: [M] share of U by whose entropy changes (rows), summing to U.
        as_update: [M] share of U by whose update does it (columns), summing to U.
        pairs: B² - Σ |b|², what U is divided by.
        kept_rows: [M] U with each unit's row left out; None for fewer than 3 units.
        kept_units: [M] U with each unit left out in both roles; None likewise.
    """

    value: float
    se_jackknife: float | None
    se_plug_in: float | None
    se_unbiased: float | None
    unbiased_variance: float | None
    zeta_1: float | None
    se_given_update: float | None
    row_means: Tensor
    contributions: Tensor
    as_entropy: Tensor
    as_update: Tensor
    pairs: float
    kept_rows: Tensor | None = None
    kept_units: Tensor | None = None


def jackknife(kept: Tensor) -> float:
    """Standard error from [M] delete-one values: sqrt((M - 1)/M Σ (kept - mean)²)."""
    m = len(kept)
    return math.sqrt((m - 1) / m * float((kept - kept.mean()).square().sum()))


def u_estimate(
    x_dot_y: float,
    diagonal: Tensor,
    row_sums: Tensor,
    column_sums: Tensor,
    unit_sizes: Tensor | None = None,
    kernel: Tensor | None = None,
) -> UEstimate:
    """U and its standard errors from sums over the kernel.

    Args:
        x_dot_y: X_sum · Y_sum.
        diagonal: [M] K_nn.
        row_sums: [M] Σ_m K_nm, diagonal included.
        column_sums: [M] Σ_n K_nm, diagonal included.
        unit_sizes: [M] prompts per unit; None means 1 each.
        kernel: [M, M] the whole K, for the unbiased variance.

    Raises:
        RolloutsError: fewer than two units.
    """
    m = diagonal.shape[0]
    if m < 2:
        raise RolloutsError(
            f"the same-batch estimate needs at least 2 prompts (or blocks), found {m}: the diagonal is excluded, so "
            "nothing would be left.",
            fix="probe more prompts, or pass entropy_rollouts for the two-batch estimate.",
        )
    diagonal, row_sums, column_sums = (t.to(torch.float64) for t in (diagonal, row_sums, column_sums))
    sizes = torch.ones(m, dtype=torch.float64) if unit_sizes is None else unit_sizes.to(torch.float64)
    equal = bool((sizes == sizes[0]).all())
    pairs = float(sizes.sum() ** 2 - sizes.square().sum())
    value = (x_dot_y - float(diagonal.sum())) / pairs
    as_entropy, as_update = (row_sums - diagonal) / pairs, (column_sums - diagonal) / pairs
    contributions = (as_entropy + as_update) / 2
    row_means = contributions * m  # for equal units: the symmetrised mean over the other M - 1 units
    zeta = se_plug_in = se_jackknife = se_given = kept = deleted = None
    if equal and m >= 3:
        zeta = float((row_means - value).square().sum()) / (m - 1)
        se_plug_in = math.sqrt(4 * zeta / m)
    if m >= 3:
        # Delete-one of the rows alone: for equal units the standard error of the mean of the X row means.
        kept_pairs = pairs - sizes * (sizes.sum() - sizes)
        kept = (value - as_entropy) * pairs / kept_pairs
        se_given = jackknife(kept)
        # Delete-one: for equal units this is (M U - 2 r_n) / (M - 2); written so that unequal blocks work too.
        left_pairs = pairs - 2 * sizes * (sizes.sum() - sizes)
        deleted = (value - 2 * contributions) * pairs / left_pairs
        se_jackknife = jackknife(deleted)
    variance = None
    if kernel is not None and equal and m >= 4:
        variance = _unbiased_variance(kernel.to(torch.float64) / float(sizes[0]) ** 2)
    return UEstimate(
        value=value,
        se_jackknife=se_jackknife,
        se_plug_in=se_plug_in,
        se_unbiased=math.sqrt(variance) if variance is not None and variance >= 0 else None,
        unbiased_variance=variance,
        zeta_1=zeta,
        se_given_update=se_given,
        row_means=row_means,
        contributions=contributions,
        as_entropy=as_entropy,
        as_update=as_update,
        pairs=pairs,
        kept_rows=kept,
        kept_units=deleted,
    )


def _unbiased_variance(kernel: Tensor) -> float:
    """Unbiased estimate of Var U from the whole kernel [n, n], n >= 4.

    Var U = [4(n - 2)(E h_12 h_13 - θ²) + 2(E h_12² - θ²)] / (n(n - 1)) with h the symmetrised kernel; every expectation
    is replaced by its average over distinct indices.
    """
    n = kernel.shape[0]
    h = (kernel + kernel.T) / 2
    h = h - torch.diag(h.diagonal())
    s1, s2, total = float(h.sum(1).square().sum()), float(h.square().sum()), float(h.sum())
    same_pair = s2 / (n * (n - 1))
    one_shared = (s1 - s2) / (n * (n - 1) * (n - 2))
    disjoint = (total**2 - 4 * s1 + 2 * s2) / (n * (n - 1) * (n - 2) * (n - 3))
    return (4 * (n - 2) * (one_shared - disjoint) + 2 * (same_pair - disjoint)) / (n * (n - 1))
