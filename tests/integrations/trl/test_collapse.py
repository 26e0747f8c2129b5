"""The early warning in real runs: before half of the entropy is gone where a policy collapses, and never where it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_trl import tiny_model, tiny_trainer

from entropy_fast.integrations.early_warning import EntropyFloor
from entropy_fast.integrations.trl import EntropyForecastCallback


def sevens(completions: list[str], **_: Any) -> list[float]:
    return [float(c.split().count("7")) for c in completions]


def run(folder: Path, rate: float, seed: int, *, stop: bool = False) -> tuple[list[float], EntropyFloor]:
    trainer = tiny_trainer(
        folder, model=tiny_model(spread=0.15), reward=sevens, per_device_train_batch_size=64, num_generations=8,
        gradient_accumulation_steps=1, max_completion_length=8, max_steps=40, learning_rate=rate,
        lr_scheduler_type="constant", seed=seed,
    )  # fmt: skip
    floor = EntropyFloor(1.0, within=20, stop=stop)
    trainer.add_callback(EntropyForecastCallback(trainer, budget=None, verify=None, on_forecast=[floor]))
    trainer.train()
    return [row["entropy"] for row in trainer.state.log_history if "entropy" in row], floor


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_collapse_is_foreseen(seed: int, tmp_path: Path) -> None:
    levels, floor = run(tmp_path, 3e-3, seed)
    assert levels[-1] < levels[0] / 2, "the policy was meant to collapse"
    half = next(step for step, level in enumerate(levels) if level < levels[0] / 2)
    assert floor.warnings and floor.warnings[0].step < half
    assert len(floor.warnings[0].prompts) == 3


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_alarm_where_nothing_falls(seed: int, tmp_path: Path) -> None:
    levels, floor = run(tmp_path, 1e-5, seed)
    assert levels[-1] > 0.9 * levels[0]
    assert not floor.warnings


@pytest.mark.exhaustive
def test_the_training_stops_where_it_is_asked_to(tmp_path: Path) -> None:
    levels, floor = run(tmp_path, 3e-3, 0, stop=True)
    assert len(floor.warnings) == 1
    assert len(levels) == floor.warnings[0].step + 1 < 40
    assert levels[-1] > levels[0] / 2
