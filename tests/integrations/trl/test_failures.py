"""Whatever fails in a forecast, wherever: one warning that says why, NaN, and the same training."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_trl import tiny_trainer
from trl_runs import forecasting, same_training, trained_with_and_without

pytestmark = pytest.mark.exhaustive

PLACES = {
    "the probe": "entropy_fast.integrations.forecaster.fast_delta_h1",
    "the batch": "entropy_fast.integrations.trl.callback.window_of",
    "what was clipped": "entropy_fast.integrations.trl.hooks.Clipped",
    "a micro-batch": "entropy_fast.integrations.trl.hooks.MicroBatch",
    "tags on responses": "entropy_fast.integrations.trl.hooks.TrainerHooks._tag",
    "patches": "entropy_fast.integrations.trl.hooks.TrainerHooks.patch",
    "patches taken off": "entropy_fast.integrations.trl.hooks.TrainerHooks.unpatch",
    "a new window": "entropy_fast.integrations.trl.hooks.TrainerHooks.begin",
    "the beginning": "entropy_fast.integrations.forecaster.StepForecaster.begin",
    "the end": "entropy_fast.integrations.forecaster.StepForecaster.end",
    "whether it is wanted": "entropy_fast.integrations.forecaster.StepForecaster.wants",
    "how many prompts": "entropy_fast.integrations.forecaster.StepForecaster._sample_of",
    "the copy of the policy": "entropy_fast.integrations.verification.KeptPolicy",
    "looking back": "entropy_fast.integrations.looking_back.KeptPolicy.change_since",
    "the ledger": "entropy_fast.truth.EntropyLedger.record",
    "the ledger's rows": "entropy_fast.truth.EntropyLedger.rows",
    "the ledger's sums": "entropy_fast.truth.EntropyLedger.calibration",
    "the clock": "entropy_fast.integrations.time_budget.TimeBudget.spend",
    "the training's clock": "entropy_fast.integrations.time_budget.TimeBudget.train",
    "metrics": "entropy_fast.integrations.forecast.StepForecast.metrics",
    "a kept step": "entropy_fast.integrations.trl.callback.write_bundle",
}
IN_TWO_PLACES = ("what was clipped", "a new window", "the ledger's rows", "the ledger's sums")


@pytest.mark.parametrize("place", PLACES)
def test_an_exception_anywhere_is_one_warning_and_the_same_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of cheese")

    plain = tiny_trainer(tmp_path)
    plain.train()
    probed = tiny_trainer(tmp_path)
    seen = forecasting(probed, bundle=tmp_path / "kept", bundle_every=1)
    monkeypatch.setattr(PLACES[place], broken)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        probed.train()
    same_training(plain, probed)
    ours = [str(w.message) for w in caught if "entropy_fast" in str(w.message)]
    assert ours and all("out of cheese" in message for message in ours)
    # What is used in two places may fail in both: for each it is said once.
    assert len(ours) == (2 if place in IN_TWO_PLACES else 1)
    for forecast in seen:
        if forecast.result is None and place != "metrics":
            assert math.isnan(forecast.metrics()["total"])


def test_warnings_that_were_made_errors_end_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of cheese")

    plain = tiny_trainer(tmp_path)
    plain.train()
    probed = tiny_trainer(tmp_path)
    seen = forecasting(probed, on_forecast=[broken])
    monkeypatch.setattr(PLACES["the probe"], broken)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="entropy_fast")
        probed.train()
    same_training(plain, probed)
    assert not seen


def test_memory_that_runs_out_in_the_trainers_backward_is_ours_to_bear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hooks on log-probs run inside of it: an exception there would be one of the training."""
    plain = tiny_trainer(tmp_path)
    plain.train()
    probed = tiny_trainer(tmp_path)
    seen = forecasting(probed)
    original = torch.Tensor.double

    def double(tensor: torch.Tensor) -> torch.Tensor:
        if torch._C._current_graph_task_id() != -1:  # within a backward
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(tensor)

    monkeypatch.setattr(torch.Tensor, "double", double)
    with pytest.warns(UserWarning, match="could not be listened to \\(OutOfMemoryError"):
        probed.train()
    same_training(plain, probed)
    assert all(forecast.failed for forecast in seen)


def test_a_hook_that_fails_at_every_forecast_is_said_once(tmp_path: Path) -> None:
    def broken(_: Any) -> None:
        raise RuntimeError("out of cheese")

    _, _, caught = trained_with_and_without(lambda: tiny_trainer(tmp_path), on_forecast=[broken])
    assert len(caught) == 1 and "a hook on forecasts failed" in str(caught[0].message)
