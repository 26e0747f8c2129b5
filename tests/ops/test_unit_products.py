"""Sums of outer products by unit: the compiled kernel and the products by torch against the definition in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from logprob_cases import DTYPES
from unit_product_calls import UnitProductCase, unit_product_case

from entropy_fast.errors import NativeLibraryError
from entropy_fast.ops import UnitRuns, add_unit_products, backend_report, native_backend


def _calls() -> int:
    return {record.name: record.calls for record in backend_report()}["native"]


def _run(case: UnitProductCase) -> tuple[list[torch.Tensor], bool]:
    """The sums afterwards, and whether the compiled kernel made them."""
    sums = [total.clone() for total in case.sums]
    before = _calls()
    add_unit_products([case.by_columns(s) for s in sums], case.left, case.right, case.scales, UnitRuns(case.runs))
    return sums, _calls() > before


@st.composite
def cases(draw: st.DrawFn) -> UnitProductCase:
    lengths = draw(st.lists(st.integers(0, 150), max_size=5))
    columns = st.integers(1, 70) | st.sampled_from([255, 256, 257])
    return unit_product_case(
        lengths,
        (draw(columns), draw(columns)),
        draw(st.sampled_from(DTYPES)),
        labels=draw(st.sampled_from([1, 2, 3, 5])),
        inner=draw(st.integers(1, 3)),
        turned=draw(st.booleans()),
        order=[draw(st.integers(0, 4)) for _ in lengths],
        seed=draw(st.integers(0, 99)),
    )


@given(case=cases())
def test_every_shape_is_right(case: UnitProductCase) -> None:
    sums, natively = _run(case)
    if natively:
        assert min(case.left.shape[1], case.right.shape[1]) <= 32
        case.assert_right(sums)
        return
    # Products by torch are rounded to the dtype of their factors.
    expected, size = case.expected()
    found = torch.stack([case.by_columns(total).double() for total in sums])
    eps = torch.finfo(case.sums[0].dtype if case.left.dtype == torch.float16 else case.left.dtype).eps
    assert ((found - expected).abs() <= (case.left.shape[0] + 4) * eps * size).all()


@pytest.mark.parametrize("columns", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_column_of_coefficients_is_as_right_as_alone(dtype: torch.dtype, columns: int) -> None:
    case = unit_product_case([40, 3, 70], (16, 300), dtype, labels=columns)
    sums, natively = _run(case)
    assert natively
    case.assert_right(sums)
    for column, total in enumerate(sums):
        own = dataclasses.replace(case, scales=case.scales[column : column + 1], sums=[case.sums[column]])
        assert torch.equal(_run(own)[0][0], total)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_narrow_factors_go_to_the_kernel_and_the_environment_can_forbid_it(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = unit_product_case([40, 3, 70], (16, 300), dtype)
    assert _run(case)[1]
    monkeypatch.setenv("ENTROPY_FAST_BACKEND", "reference")
    assert not _run(case)[1]


def test_cancelling_terms_of_bfloat16_are_added_in_fp32() -> None:
    """Coefficients that sum to zero leave what fp32 leaves, though the factors have eight bits."""
    case = unit_product_case([64], (4, 64), torch.bfloat16)
    case.left[32:], case.right[32:] = case.left[:32], case.right[:32]
    case.scales[:, 32:] = -case.scales[:, :32]
    for total in case.sums:
        total.zero_()
    sums, natively = _run(case)
    assert natively
    assert torch.stack(sums).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_does_not_show(dtype: torch.dtype) -> None:
    case = unit_product_case([500, 700, 20, 300], (24, 700), dtype, order=[2, 0, 2, 1])
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            found.append(_run(case)[0])
        finally:
            torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_strided_rows_are_taken_as_they_are() -> None:
    case = unit_product_case([30, 50], (8, 48), torch.float32, turned=True)
    left = torch.nan * torch.ones(80, 11)
    left[:, :8] = case.left
    right = torch.nan * torch.ones(48, 80)
    right[:] = case.right.t()
    sums = [total.clone() for total in case.sums]
    views = [case.by_columns(total) for total in sums]
    add_unit_products(views, left[:, :8], right.t(), case.scales, UnitRuns(case.runs))
    case.assert_right(sums)


def test_what_the_kernel_refuses() -> None:
    case = unit_product_case([3, 4], (2, 5), torch.float32)
    descending = torch.tensor([[1, 0, 3], [0, 3, 7]])
    with pytest.raises(NativeLibraryError, match="ascending"):
        native_backend.unit_products(case.sums, case.left, case.right, case.scales, descending)
    backwards = torch.tensor([[0, 3, 0]])
    with pytest.raises(NativeLibraryError, match="before it begins"):
        native_backend.unit_products(case.sums, case.left, case.right, case.scales, backwards)
