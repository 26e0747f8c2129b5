"""Forecasts of a training whose model FSDP2 shards: those of one process, and the training is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from process_groups import Done, job, run_jobs
from trl_compared import assert_one_forecast
from trl_fsdp2 import BY_ACCELERATE

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs torch's gloo backend"),
]

# By who shards, and options of the trainer.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "accelerate": ("accelerate", {}),
    "transformers": ("transformers", {}),
    "adapters, reference policy, checkpointing": (
        "accelerate",
        {"lora": True, "beta": 0.04, "gradient_checkpointing": True},
    ),
    "two micro-batches, rows used twice, reentrant": (
        "accelerate",
        {
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 3,
            "num_iterations": 2,
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
    ),
    "sequence ratios, clipped": (
        "transformers",
        {"importance_sampling_level": "sequence", "loss_type": "grpo", "max_grad_norm": 0.01},
    ),
}
CHECKPOINTING = {**BY_ACCELERATE["fsdp_config"], "activation_checkpointing": True}  # FSDP2's own
ROUNDED = 2e-3  # of a gradient's direction that bf16 has rounded


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """Each setting by one process without FSDP2 and by two with it, and what there is by two alone."""
    jobs: dict[str, dict[str, Any]] = {}
    for name, (sharded_by, options) in SETTINGS.items():
        alone = dict(options)
        if "per_device_train_batch_size" in alone:
            alone["per_device_train_batch_size"] *= 2
        jobs[f"{name}: alone"] = job(1, "trl_ranks:run", options=alone, verify="previous")
        jobs[name] = job(2, "trl_ranks:run", options={"sharded_by": sharded_by, **options}, verify="previous")
    for name, options in (
        ("rounded", {"bf16": True, "fsdp_config": CHECKPOINTING}),
        ("dropout", {"dropout": 0.1}),
        ("own generation", {"own_generation": True}),
        ("adapters on shards", {"lora": True, "sharded_by": "transformers"}),
    ):
        own = {"sharded_by": "accelerate", **options}
        jobs[name] = job(2, "trl_ranks:run", options=own, verify="previous")
    for name, at in (
        ("failing", "entropy_fast.integrations.forecaster.fast_delta_h1"),
        ("failing in looking back", "entropy_fast.integrations.looking_back.scored"),
    ):
        jobs[name] = job(2, "trl_ranks:failing", at=at, sharded_by="accelerate")
    jobs["stopping"] = job(2, "trl_ranks:stopping", sharded_by="accelerate")
    return dict(zip(jobs, run_jobs(tmp_path_factory.mktemp("jobs"), list(jobs.values()), 900), strict=True))


def both(done: Done) -> tuple[dict[str, Any], dict[str, Any]]:
    first, second = done.ranks
    assert first is not None and second is not None
    return first, second


def without_slopes(done: Done) -> Done:
    """The slope of one pair, or two, is a ratio of numbers of the size of their noise, of which both are compared."""
    rows = [row for rank in done.ranks if rank is not None for name in ("forecasts", "logs") for row in rank[name]]
    for row in rows:
        for name in [name for name in row if name.endswith("slope")]:
            del row[name]
    return done


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_log_what_one_logs(runs: dict[str, Done], name: str) -> None:
    first, second = both(runs[name])
    assert [row["slope"] for row in first["forecasts"]] == [row["slope"] for row in second["forecasts"]]
    assert_one_forecast(without_slopes(runs[f"{name}: alone"]), without_slopes(runs[name]))
    assert (first["ledger there"], second["ledger there"]) == (True, False)
    assert any(row["realised"] is not None for row in first["forecasts"])
    assert all(row["candidate/bonus"] is not None for row in first["forecasts"])


def test_what_fsdp2_rounds_is_forecast_and_not_looked_back_on(runs: dict[str, Done]) -> None:
    first, second = both(runs["rounded"])
    assert first["forecasts"] == second["forecasts"]
    for own in (first, second):
        assert own["same weights"] and own["same draws"] and not own["warnings"]
        assert len(own["agreement"]) == 4
        for agreed in own["agreement"]:
            assert agreed[0] > 1 - ROUNDED
    assert all(row["total"] is not None and row["realised"] is None for row in first["forecasts"])
    assert all("rounds parameters to torch.bfloat16" in reason for reason in first["realised reasons"][1:])


@pytest.mark.parametrize(
    ("name", "why"), [("dropout", "train without dropout"), ("adapters on shards", "has a post-accumulate-grad hook")]
)
def test_what_is_refused_at_the_first_forecast_and_costs_forecasts_alone(
    runs: dict[str, Done], name: str, why: str
) -> None:
    for own in both(runs[name]):
        assert own["same weights"] and own["same draws"]
        assert all(row["total"] is None for row in own["forecasts"])
        assert all(why in reason for reason in own["reasons"])
        assert len(own["warnings"]) == 1


def test_the_trainers_own_generation_goes_on_as_it_would_without(runs: dict[str, Done]) -> None:
    first, second = both(runs["own generation"])
    assert first["forecasts"] == second["forecasts"] and first["weights"] == second["weights"]
    for own in (first, second):
        assert own["same weights"] and own["same draws"] and not own["warnings"]
        assert all(row["total"] is not None for row in own["forecasts"])
        assert all(agreed[0] > 1 - 1e-6 and abs(agreed[1] - 1) < 1e-4 for agreed in own["agreement"])
    assert first["forecasts"][-1]["realised"] is not None


@pytest.mark.parametrize(("name", "number"), [("failing", "total"), ("failing in looking back", "realised")])
def test_a_rank_that_fails_costs_all_of_them_that_number_and_nothing_else(
    runs: dict[str, Done], name: str, number: str
) -> None:
    first, second = both(runs[name])
    assert first["forecasts"] == second["forecasts"]
    for own in (first, second):
        assert own["same weights"]
        assert len(own["warnings"]) == 1 and "made up" in own["warnings"][0]
        known = [row[number] is not None for row in own["forecasts"]]
        assert known == ([True, False, True, True] if number == "total" else [False, False, True, True])


def test_ranks_stop_together_and_tokens_are_nobodys(runs: dict[str, Done]) -> None:
    for own in both(runs["stopping"]):
        assert own["steps"] == 2 and own["forecast"] == 2
        assert own["tokens"] == [False, False]


def test_what_the_settings_are_made_of(tmp_path: Path) -> None:
    """That the models were sharded at all, over both processes."""
    (done,) = run_jobs(tmp_path, [job(2, "trl_ranks:shards")])
    for own in both(done):
        for sharded_by, found in own.items():
            assert found["sharded"] == found["parameters"] > 20, sharded_by
            assert found["elements here"] < 0.6 * found["elements"], sharded_by
