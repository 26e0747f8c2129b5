"""Options of a probe: a memory budget in words."""

from __future__ import annotations

import pytest

from entropy_fast import RunOptions
from entropy_fast.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (0, 0),
        (12345, 12345),
        ("0", 0),
        ("12345", 12345),
        ("7B", 7),
        ("8GiB", 8 * 1024**3),
        ("500 MB", 500 * 1000**2),
        ("500MiB", 500 * 1024**2),
        ("1.5 KiB", 1536),
        ("1.5KB", 1500),
        (" 2 gib ", 2 * 1024**3),
        ("2gb", 2 * 1000**3),
        ("0.25 TiB", 1024**4 // 4),
        ("3TB", 3 * 1000**4),
    ],
)
def test_memory_budget(given: int | str, expected: int) -> None:
    assert RunOptions(memory_budget=given).memory_bytes == expected


@pytest.mark.parametrize(
    "given",
    [
        *(
            "",
            " ",
            "GiB",
            "-1",
            "-8GiB",
            "8 apples",
            "8Gi",
            "8G",
            "1e9",
            "8GiB 2",
            "8,5GiB",
            "8.GiB",
            ".5GiB",
            "nan",
            "inf",
        ),
        *(-1, True, 1.5, None, b"8GiB"),
    ],
)
def test_memory_budgets_that_say_nothing(given: object) -> None:
    with pytest.raises(ConfigError, match="`memory_budget` is ") as caught:
        RunOptions(memory_budget=given)  # type: ignore[arg-type]
    assert repr(given) in caught.value.problem
    assert '"8GiB"' in caught.value.fix
