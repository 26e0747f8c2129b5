"""The examples of forecasts in training loops run and say what they should."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("forecast_in_trl", ["step   3: entropy", "forecast", "slope"]),
        pytest.param("forecast_with_accelerate", ["step 2: direct part of δH₁"], marks=pytest.mark.exhaustive),
        pytest.param("probe_in_training_loop", ["step 4: δH₁", "on other responses"], marks=pytest.mark.exhaustive),
    ],
)
def test_runs(name: str, said: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "examples" / f"{name}.py")],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env=os.environ | {"STEPS": "3", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for text in said:
        assert text in done.stdout, done.stdout
    assert "no forecast" not in done.stderr
