"""One number is one number, whoever made it; a boolean is none."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from entropy_fast.scalars import as_number


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (2, 2), (0.5, 0.5), (np.float32(0.5), 0.5), (np.float64(0.1), 0.1), (np.float16(0.5), 0.5), (np.int8(3), 3),
        (np.uint64(2**64 - 1), 2**64 - 1), (np.array(0.25), 0.25), (torch.tensor(0.5), 0.5), (torch.tensor(7), 7),
        (torch.tensor(0.1, dtype=torch.float64), 0.1), (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (torch.nn.Parameter(torch.tensor(1.5)), 1.5),
    ],
)  # fmt: skip
def test_numbers(value: object, expected: float) -> None:
    found = as_number(value)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    "value",
    [
        True, np.bool_(True), np.array(True), torch.tensor(True), "1", None, 1j, np.complex64(1), torch.tensor(1j), [1.0],
        np.array([1.0]), torch.tensor([1.0]), torch.empty((), device="meta"), np.datetime64("2020-01-01"), Fraction(1, 2),
        np.timedelta64(3, "ns"), np.array("1"), np.array(None), b"1",
    ],
)  # fmt: skip
def test_what_is_no_number(value: object) -> None:
    assert as_number(value) is None
