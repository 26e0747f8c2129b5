"""U-statistics of a kernel K [B, B] by brute force over indices.

Legend: units are lists of prompts; X_u and Y_u sum over the prompts of a unit, so K_uv = Σ_{n in u, m in v} K_nm.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def singles(kernel: Tensor) -> list[list[int]]:
    return [[n] for n in range(kernel.shape[0])]


def u_value(kernel: Tensor, units: list[list[int]]) -> float:
    """Mean of K_nm over pairs of prompts that sit in different units."""
    values = [
        float(kernel[n, m]) for u, v in itertools.permutations(range(len(units)), 2) for n in units[u] for m in units[v]
    ]
    return math.fsum(values) / len(values)


def jackknife(kernel: Tensor, units: list[list[int]]) -> float:
    """Delete-one standard error: U is computed again on a batch that lacks the unit."""
    deleted = [u_value(kernel, units[:u] + units[u + 1 :]) for u in range(len(units))]
    mean = math.fsum(deleted) / len(deleted)
    return math.sqrt((len(units) - 1) / len(units) * math.fsum((d - mean) ** 2 for d in deleted))


def jackknife_of_rows(kernel: Tensor, units: list[list[int]]) -> float:
    """Delete-one standard error of U with the update held fixed: a unit is left out in the rows alone."""
    prompts = range(kernel.shape[0])

    def without(left_out: int) -> float:
        pairs = [
            (n, m) for u, unit in enumerate(units) if u != left_out for n in unit for m in prompts if m not in unit
        ]
        return math.fsum(float(kernel[n, m]) for n, m in pairs) / len(pairs)

    deleted = [without(u) for u in range(len(units))]
    mean = math.fsum(deleted) / len(deleted)
    return math.sqrt((len(units) - 1) / len(units) * math.fsum((d - mean) ** 2 for d in deleted))


def block_kernel(kernel: Tensor, units: list[list[int]]) -> Tensor:
    """K between units, in sums."""
    rows = [[math.fsum(float(kernel[n, m]) for n in u for m in v) for v in units] for u in units]
    return torch.tensor(rows, dtype=torch.float64)


def row_means(kernel: Tensor) -> list[float]:
    """r_n = mean over the others m of (K_nm + K_mn) / 2."""
    b = kernel.shape[0]
    return [math.fsum(float(kernel[n, m] + kernel[m, n]) / 2 for m in range(b) if m != n) / (b - 1) for n in range(b)]


def zeta_1(kernel: Tensor) -> float:
    means = row_means(kernel)
    centre = u_value(kernel, singles(kernel))
    return math.fsum((r - centre) ** 2 for r in means) / (len(means) - 1)


def plug_in(kernel: Tensor) -> float:
    return math.sqrt(4 * zeta_1(kernel) / kernel.shape[0])


def x_row_mean_error(kernel: Tensor) -> float:
    """Standard error of the mean of X_n · (mean of the others' Y)."""
    b = kernel.shape[0]
    return standard_error([math.fsum(float(kernel[n, m]) for m in range(b) if m != n) / (b - 1) for n in range(b)])


def standard_error(values: list[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def unbiased_variance(kernel: Tensor) -> float:
    """Var U = E[U²] - θ² with every product h_ij h_kl that occurs in it replaced by an average over distinct indices.

    U is the mean of h over ordered pairs, so U² is the mean of h_ij h_kl over pairs of pairs; θ² = E[h_ij h_kl] for four
    distinct indices. Each pair of pairs therefore contributes the average product of its own pattern, minus that for four
    distinct indices.
    """
    b = kernel.shape[0]
    h = [[float(kernel[i, j] + kernel[j, i]) / 2 for j in range(b)] for i in range(b)]
    products: dict[int, list[float]] = {2: [], 3: [], 4: []}  # number of distinct indices -> products of that pattern
    for (i, j), (k, m) in itertools.product(itertools.permutations(range(b), 2), repeat=2):
        products[len({i, j, k, m})].append(h[i][j] * h[k][m])
    average = {distinct: math.fsum(values) / len(values) for distinct, values in products.items()}
    pairs_of_pairs = math.fsum(len(values) for values in products.values())
    return math.fsum(len(values) * (average[d] - average[4]) for d, values in products.items()) / pairs_of_pairs
