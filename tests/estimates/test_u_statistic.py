"""U and its errors against brute force over indices: pairs of prompts, batches with a unit deleted, tuples of four indices.

Legend: K_nm = X_n · Y_m, units are lists of prompts (single ones, or blocks).
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from probe_oracle import u_statistics
from probe_oracle.oracle import relative_error
from torch import Tensor

from entropy_fast.errors import RolloutsError
from entropy_fast.estimates import UEstimate, u_estimate

TOLERANCE = 1e-9


def random_kernel(b: int, seed: int, signal: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randn(2, b, generator=generator, dtype=torch.float64)
    noise = torch.randn(b, b, generator=generator, dtype=torch.float64)
    return signal * (1 + rows[:, None] + 2 * columns) + noise + 5 * torch.eye(b, dtype=torch.float64)


def estimate_of(kernel: Tensor, units: list[list[int]] | None = None, whole: bool = True) -> UEstimate:
    sizes = None if units is None else torch.tensor([len(unit) for unit in units])
    k = kernel if units is None else u_statistics.block_kernel(kernel, units)
    return u_estimate(float(k.sum()), k.diagonal(), k.sum(1), k.sum(0), sizes, k if whole else None)


def close(actual: object, expected: object, tolerance: float = TOLERANCE) -> bool:
    return relative_error(actual, expected) < tolerance


signals = st.sampled_from([0.0, 0.3, 3.0])
# Equal blocks rarely come up among random sizes, and four or more of them even less.
equal_blocks = st.builds(lambda size, count: [size] * count, st.integers(1, 3), st.integers(2, 5))
block_sizes = st.one_of(equal_blocks, st.lists(st.integers(1, 3), min_size=2, max_size=6))
seeds = st.integers(0, 10_000)


@settings(max_examples=60, deadline=None)
@given(b=st.integers(2, 7), seed=seeds, signal=signals)
def test_single_prompts_against_brute_force(b: int, seed: int, signal: float) -> None:
    kernel = random_kernel(b, seed, signal)
    found = estimate_of(kernel)
    units = u_statistics.singles(kernel)
    assert close(found.value, u_statistics.u_value(kernel, units))
    assert close(found.row_means, u_statistics.row_means(kernel))
    if b < 3:
        assert (found.se_jackknife, found.se_plug_in, found.zeta_1, found.se_given_update) == (None,) * 4
        return
    assert close(found.se_jackknife, u_statistics.jackknife(kernel, units))
    assert close(found.zeta_1, u_statistics.zeta_1(kernel))
    assert close(found.se_plug_in, u_statistics.plug_in(kernel))
    assert close(found.se_given_update, u_statistics.x_row_mean_error(kernel))


@settings(max_examples=25, deadline=None)
@given(b=st.integers(4, 6), seed=seeds, signal=signals)
def test_unbiased_variance_against_averages_over_index_tuples(b: int, seed: int, signal: float) -> None:
    kernel = random_kernel(b, seed, signal)
    found = estimate_of(kernel)
    expected = u_statistics.unbiased_variance(kernel)
    # It is a difference of larger terms, so the scale is theirs.
    assert abs(found.unbiased_variance - expected) < TOLERANCE * float(kernel.square().mean())  # type: ignore[operator]
    assert (found.se_unbiased is None) == (found.unbiased_variance < 0)  # type: ignore[operator]
    if found.se_unbiased is not None:
        assert math.isclose(found.se_unbiased**2, found.unbiased_variance, rel_tol=1e-12, abs_tol=1e-300)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(sizes=block_sizes, seed=seeds, signal=signals)
def test_blocks_against_brute_force_over_prompts(sizes: list[int], seed: int, signal: float) -> None:
    kernel = random_kernel(sum(sizes), seed, signal)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    units = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
    found = estimate_of(kernel, units)
    assert close(found.value, u_statistics.u_value(kernel, units))
    if len(sizes) >= 3:
        assert close(found.se_jackknife, u_statistics.jackknife(kernel, units))
        assert close(found.se_given_update, u_statistics.jackknife_of_rows(kernel, units))
    else:
        assert (found.se_jackknife, found.se_given_update) == (None, None)
    # The other errors are about averages of equal units: K between the means of the blocks.
    means = u_statistics.block_kernel(kernel, units) / sizes[0] ** 2
    if len(set(sizes)) == 1 and len(sizes) >= 3:
        assert close(found.se_plug_in, u_statistics.plug_in(means))
        assert close(found.zeta_1, u_statistics.zeta_1(means))
        assert close(found.row_means, u_statistics.row_means(means))
        assert close(found.se_given_update, u_statistics.x_row_mean_error(means))
    else:
        assert (found.se_plug_in, found.zeta_1) == (None, None)
    if len(set(sizes)) == 1 and len(sizes) >= 4:
        difference = abs(found.unbiased_variance - u_statistics.unbiased_variance(means))  # type: ignore[operator]
        assert difference < TOLERANCE * float(means.square().mean())
    else:
        assert (found.unbiased_variance, found.se_unbiased) == (None, None)


@settings(max_examples=40, deadline=None)
@given(sizes=block_sizes, seed=seeds, signal=signals)
def test_shares_sum_to_u_by_row_by_column_and_in_the_mean(sizes: list[int], seed: int, signal: float) -> None:
    kernel = random_kernel(sum(sizes), seed, signal)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    units = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
    found = estimate_of(kernel, units)
    outside = sum(size * (sum(sizes) - size) for size in sizes)
    for u, unit in enumerate(units):
        others = [n for n in range(sum(sizes)) if n not in unit]
        as_entropy = sum(float(kernel[n, m]) for n in unit for m in others) / outside
        as_update = sum(float(kernel[m, n]) for n in unit for m in others) / outside
        assert math.isclose(found.as_entropy[u], as_entropy, rel_tol=1e-9, abs_tol=1e-12)
        assert math.isclose(found.as_update[u], as_update, rel_tol=1e-9, abs_tol=1e-12)
        assert math.isclose(found.contributions[u], (as_entropy + as_update) / 2, rel_tol=1e-9, abs_tol=1e-12)
    for shares in (found.contributions, found.as_entropy, found.as_update):
        assert math.isclose(float(shares.sum()), found.value, rel_tol=1e-9, abs_tol=1e-12)


def test_a_kernel_worked_out_by_hand() -> None:
    kernel = torch.tensor([[100.0, 2.0, 3.0], [4.0, 100.0, 6.0], [5.0, 1.0, 100.0]])
    found = estimate_of(kernel)
    assert found.value == pytest.approx(21 / 6)  # mean of 2 3 4 6 5 1
    assert found.row_means.tolist() == pytest.approx([14 / 4, 13 / 4, 15 / 4])
    assert found.zeta_1 == pytest.approx((0 + 1 / 16 + 1 / 16) / 2)
    assert found.se_plug_in == pytest.approx(math.sqrt(4 * (1 / 16) / 3))
    # Without prompt 0, 1 or 2, the mean of {6, 1}, {3, 5} or {2, 4} is left.
    assert found.se_jackknife == pytest.approx(math.sqrt(2 / 3 * ((3.5 - 3.5) ** 2 + (4 - 3.5) ** 2 + (3 - 3.5) ** 2)))
    assert found.se_given_update == pytest.approx(
        math.sqrt(((2.5 - 3.5) ** 2 + (5 - 3.5) ** 2 + (3 - 3.5) ** 2) / 2 / 3)
    )


def test_the_diagonal_has_no_influence_on_anything() -> None:
    kernel = random_kernel(6, seed=0, signal=1.0)
    other = kernel + torch.diag(torch.linspace(-50, 80, 6, dtype=torch.float64))
    one, two = estimate_of(kernel), estimate_of(other)
    for field in ("value", "se_jackknife", "se_plug_in", "unbiased_variance", "se_given_update", "contributions"):
        assert close(getattr(two, field), getattr(one, field), 1e-8), field


def test_negative_unbiased_variance_has_no_root_but_is_reported() -> None:
    kernel = torch.tensor(
        [[0.0, 1, -1, 1], [1, 0, 1, -1], [-1, 1, 0, 1], [1, -1, 1, 0]]
    )  # a cycle against its diagonals
    found = estimate_of(kernel)
    assert found.unbiased_variance == pytest.approx(u_statistics.unbiased_variance(kernel))
    assert found.unbiased_variance is not None
    assert found.unbiased_variance < 0
    assert found.se_unbiased is None
    assert found.se_plug_in is not None


def test_what_is_not_defined_is_none() -> None:
    assert estimate_of(random_kernel(4, 0, 1.0), whole=False).unbiased_variance is None
    three = estimate_of(random_kernel(3, 0, 1.0))
    assert three.unbiased_variance is None
    assert three.se_jackknife is not None
    assert estimate_of(random_kernel(2, 0, 1.0)).se_jackknife is None


@pytest.mark.parametrize("units", [0, 1])
def test_fewer_than_two_units_are_an_error(units: int) -> None:
    kernel = torch.ones(units, units)
    with pytest.raises(RolloutsError, match=f"at least 2 prompts.*found {units}"):
        estimate_of(kernel)


def test_single_precision_input_is_summed_in_double() -> None:
    kernel = random_kernel(5, 1, 1.0).float()
    found = u_estimate(float(kernel.double().sum()), kernel.diagonal(), kernel.sum(1), kernel.sum(0), kernel=kernel)
    for values in (found.row_means, found.contributions, found.as_entropy, found.as_update):
        assert values.dtype == torch.float64
    assert close(found.value, u_statistics.u_value(kernel, u_statistics.singles(kernel)), 1e-6)
