"""Forecasts of a training in several processes: the same on all of them, and those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from process_groups import Done, job, run_jobs
from trl_compared import assert_one_forecast

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch's gloo backend"
)

SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "as it comes": ({}, "previous"),
    "reference policy": ({"lora": True, "beta": 0.04}, "held_out"),
    "two micro-batches": ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}, "previous"),
    "rows used twice": ({"num_iterations": 2, "loss_type": "dr_grpo"}, "previous"),
    "sequence ratios": (
        {"importance_sampling_level": "sequence", "loss_type": "grpo", "max_grad_norm": 0.01},
        "held_out",
    ),
}
QUICK = "as it comes"


def both(verify: str, options: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    """Of one process and of two, with the same rows at every step."""
    alone = dict(options)
    if "per_device_train_batch_size" in alone:
        alone["per_device_train_batch_size"] *= 2
    return [
        job(world, "trl_ranks:run", options=own, verify=verify, **more) for world, own in ((1, alone), (2, options))
    ]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    options, verify = SETTINGS[QUICK]
    alone, together = both(verify, options, bundle=True)
    jobs = {
        "alone": alone,
        "together": together,
        "failing": job(2, "trl_ranks:failing", at="entropy_fast.integrations.forecaster.fast_delta_h1"),
        "stopping": job(2, "trl_ranks:stopping"),
    }
    return dict(zip(jobs, run_jobs(tmp_path_factory.mktemp("jobs"), list(jobs.values())), strict=True))


def test_two_processes_log_what_one_logs(quick: dict[str, Done]) -> None:
    """Rows of a prompt on both of them among it, candidates, and what the steps did."""
    assert_one_forecast(quick["alone"], quick["together"])
    first, second = quick["together"].ranks
    assert first is not None and second is not None
    assert (first["ledger there"], second["ledger there"]) == (True, False)
    assert (first["kept"], second["kept"]) == (["step-000000"], [])
    last = first["forecasts"][-1]
    assert all(last[name] is not None for name in ("realised", "candidate/bonus", "forecast/reward", "slope"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != QUICK])
def test_in_every_setting(name: str, tmp_path: Any) -> None:
    options, verify = SETTINGS[name]
    alone, together = run_jobs(tmp_path, both(verify, options))
    if verify == "held_out":
        # Every rank draws held-out responses of its own.
        for done in (alone, together):
            for rank in done.ranks:
                assert rank is not None and rank["forecasts"][-1]["realised"] is not None
                for row in (*rank["forecasts"], *rank["logs"]):
                    for key in [key for key in row if "realised" in key or "slope" in key or "coverage" in key]:
                        del row[key]
    assert_one_forecast(alone, together)


def test_a_rank_that_fails_costs_all_of_them_that_forecast_and_nothing_else(quick: dict[str, Done]) -> None:
    ranks = quick["failing"].ranks
    for own in ranks:
        assert own is not None and own["same weights"]
        known = [row["total"] is not None for row in own["forecasts"]]
        assert known == [True, False, True, True]
        assert "rank 1" in own["reasons"][1] and "made up" in own["reasons"][1]
    assert ranks[0] is not None and ranks[1] is not None
    assert ranks[0]["forecasts"] == ranks[1]["forecasts"]
    # The first rank says it for all, and the one that failed has its own traceback.
    assert [len(own["warnings"]) for own in ranks if own is not None] == [1, 1]


def test_ranks_stop_together(quick: dict[str, Done]) -> None:
    for own in quick["stopping"].ranks:
        assert own == {"steps": 2, "forecast": 2, "tokens": [True, True]}
