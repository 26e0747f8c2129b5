"""What a slice of a vocabulary may be; its layouts as DTensor are in test_sliced_linear_token_logprobs.py, with real ranks."""

from __future__ import annotations

import pytest
import torch

from entropy_fast import ops
from entropy_fast.errors import ConfigError
from entropy_fast.ops.vocabulary_slice import is_dtensor


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), 0, 3), r"weight \(3,\); expected \[rows, H\]"),
        ((torch.zeros(3, 2), 0, 3, torch.zeros(2)), r"weight \(3, 2\) and bias \(2,\)"),
        ((torch.zeros(3, 2), 1, 3), "rows 1 to 4 of a vocabulary of 3"),
        ((torch.zeros(3, 2), -1, 3), "rows -1 to 2 of a vocabulary of 3"),
        ((torch.zeros(0, 2), 0, 0), "a vocabulary of 0"),
    ],
)
def test_rows_that_are_no_slice(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ops.VocabularySlice(*arguments)


def test_a_slice_without_rows_may_begin_anywhere() -> None:
    assert ops.VocabularySlice(torch.zeros(0, 2), 9, 5, torch.zeros(0)).weight.shape == (0, 2)


def test_a_plain_tensor_is_no_dtensor() -> None:
    assert not is_dtensor(torch.zeros(1)) and not is_dtensor(None)
    with pytest.raises(ConfigError, match="a plain Tensor; expected a DTensor"):
        ops.VocabularySlice.from_dtensor(torch.zeros(3, 2))
