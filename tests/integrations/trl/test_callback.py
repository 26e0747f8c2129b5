"""Forecasts inside TRL's trainer: the training is the same bit by bit, and the numbers are those of its own gradient."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_trl import tiny_model, tiny_trainer
from transformers import AutoModelForCausalLM

from entropy_fast.cli.app import run
from entropy_fast.errors import ConfigError, EntropyFastWarning
from entropy_fast.integrations.forecast import StepForecast
from entropy_fast.integrations.trl import EntropyForecastCallback, EntropyForecastMixin
from entropy_fast.truth import EntropyLedger

# By name the options of the trainer, and of the model.
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dr_grpo at a temperature": {"loss_type": "dr_grpo", "temperature": 0.7},
    "cispo, scattered groups": {"loss_type": "cispo", "steps_per_generation": 4, "gradient_accumulation_steps": 1},
    "twice the same rows": {"num_iterations": 2, "max_steps": 4},
    "bf16": {"bf16": True},
}
MORE: dict[str, dict[str, Any]] = {
    "clipped": {"max_grad_norm": 0.1},
    "lora, checkpointing": {"lora": True, "gradient_checkpointing": True},
    "bnpo, a window over two generations": {
        "loss_type": "bnpo",
        "steps_per_generation": 1,
        "gradient_accumulation_steps": 2,
    },
    "entropy bonus": {"entropy_coef": 0.01},
    "truncated responses left out": {"mask_truncated_completions": True},
    "lora": {"lora": True},
    "dropout": {"dropout": 0.1},
    "grpo": {"loss_type": "grpo"},
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "by sequence": {"importance_sampling_level": "sequence", "num_iterations": 2},
    "surprising tokens": {"top_entropy_quantile": 0.3},
    "two-sided clipping": {"delta": 1.5, "num_iterations": 2},
    "no clipping": {"max_grad_norm": 0.0},
    "bf16, lora": {"bf16": True, "lora": True},
    "bf16, temperature": {"bf16": True, "temperature": 1.3},
    "sgd": {"optim": "sgd", "learning_rate": 0.1},
    "weight decay, warm-up": {"weight_decay": 0.1, "warmup_steps": 2},
    "one micro-batch": {"gradient_accumulation_steps": 1},
    "head in fp32": {"cast_lm_head_to_fp32": True, "bf16": True},
    "dropout, lora": {"dropout": 0.2, "lora": True},
}
ALL = [*SETTINGS, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in MORE)]


def trained(folder: Path, name: str, **callback: Any) -> tuple[Any, EntropyForecastCallback | None, list[StepForecast]]:
    options = dict((SETTINGS | MORE)[name])
    model = tiny_model(dropout=options.pop("dropout", 0.0))
    trainer = tiny_trainer(folder, model=model, **options)
    seen: list[StepForecast] = []
    own = None
    if callback.pop("on", True):
        own = EntropyForecastCallback(trainer, **{"budget": None, "on_forecast": [seen.append], **callback})
        trainer.add_callback(own)
    trainer.train()
    return trainer, own, seen


@pytest.mark.parametrize("name", ALL)
def test_training_is_the_same_bit_by_bit_and_the_coefficients_are_those_of_its_gradient(
    name: str, tmp_path: Path
) -> None:
    plain, _, _ = trained(tmp_path, name, on=False)
    state = torch.get_rng_state()
    probed, _, seen = trained(tmp_path, name)
    for (one, a), (_, b) in zip(plain.model.named_parameters(), probed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), one
    assert torch.equal(state, torch.get_rng_state())
    for before, after in zip(plain.state.log_history, probed.state.log_history, strict=True):
        for key, value in before.items():
            if not key.endswith(("time", "runtime", "per_second")):
                assert after[key] == value, key
    assert not [f.reason for f in seen if f.failed]
    found = [f for f in seen if f.result is not None]
    # Where truncated responses are left out most windows are empty; a warm-up begins with a rate of 0.
    passed_over = {"weight decay, warm-up": 1}.get(name, 0)
    if name != "truncated responses left out":
        assert len(found) == len(seen) - passed_over
    for forecast in found:
        assert forecast.result is not None
        # TRL's fused output layer and accelerate's casts stand in the model's forward; they must not cost the packed way.
        assert forecast.result.plan.way.startswith("packed") == (name != "head in fp32")
        live = forecast.result.diagnostics.live_gradient
        assert live is not None
        narrow = "bf16" in name or "fp32" in name
        # With dropout the gradient is that of other networks than the policy, so that it need not agree with the policy's.
        if live.prompts == live.of and not math.isnan(live.cosine) and "dropout" not in name:
            assert live.cosine > (0.9 if narrow else 1 - 1e-6)
            assert abs(live.scale - 1) < (0.3 if narrow else 1e-4)


def test_metrics_stand_beside_the_trainers_own_and_in_the_ledger(tmp_path: Path) -> None:
    file = tmp_path / "ledger.parquet"
    trainer, callback, seen = trained(tmp_path, "plain", ledger=file)
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logs) == 3
    for row, forecast in zip(logs, seen, strict=True):
        assert forecast.result is not None and forecast.result.split is not None
        assert row["entropy_fast/total"] == pytest.approx(forecast.result.delta_h1)
        assert row["entropy_fast/direct_error"] == pytest.approx(forecast.result.split.direct.std_error)
        for name in ("reward", "length"):
            assert math.isfinite(row[f"entropy_fast/forecast/{name}"])
        # What TRL logs as entropy is the mean over micro-batches; the level is that over all tokens.
        assert row["entropy_fast/level"] == pytest.approx(row["entropy"], rel=0.05)
    assert logs[0]["entropy_fast/realised"] is None
    assert all(math.isfinite(row["entropy_fast/realised"]) for row in logs[1:])
    rows = EntropyLedger(file).rows()
    assert [(row.step, row.part) for row in rows] == [
        (step, part) for step in range(3) for part in ("total", "direct", "visitation")
    ]
    assert math.isfinite(rows[0].realised) and math.isfinite(rows[1].realised) and math.isnan(rows[6].realised)
    assert callback is not None and callback.forecaster.last is seen[-1]


def test_rows_that_had_a_part_in_the_step_are_no_evidence(tmp_path: Path) -> None:
    _, _, seen = trained(tmp_path, "twice the same rows")
    # Steps 1 and 3 are made of the rows of steps 0 and 2, which those steps were made from; step 2 has rows of its own.
    assert [f.realised is None for f in seen] == [True, True, False, True]
    assert seen[1].realised_reason is not None and "sampled after the step" in seen[1].realised_reason


def test_a_probe_that_fails_is_one_warning_and_the_same_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _, _ = trained(tmp_path, "plain", on=False)

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of cheese")

    monkeypatch.setattr("entropy_fast.integrations.forecaster.fast_delta_h1", broken)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        probed, _, seen = trained(tmp_path, "plain")
    for a, b in zip(plain.model.parameters(), probed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    ours = [w for w in caught if issubclass(w.category, EntropyFastWarning)]
    assert len(ours) == 1 and "out of cheese" in str(ours[0].message)
    assert all(f.failed and math.isnan(f.metrics()["total"]) for f in seen) and len(seen) == 3


def test_a_policy_that_is_not_the_models_is_refused_with_the_reason(tmp_path: Path) -> None:
    from trl import GRPOTrainer

    class Other(GRPOTrainer):
        """Its log-probs are not what the model says: other positions, a scale, a wrapper that we do not see."""

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            logprobs, entropies, rest = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            return 0.9 * logprobs, entropies, rest

    trainer = tiny_trainer(tmp_path, kind=Other, max_steps=1)
    seen: list[StepForecast] = []
    trainer.add_callback(EntropyForecastCallback(trainer, budget=None, on_forecast=[seen.append]))
    with pytest.warns(EntropyFastWarning, match="nats a token away"):
        trainer.train()
    assert seen[0].failed and seen[0].result is None


def test_absolute_positions_and_padding_on_the_left(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, model=tiny_model(family="gpt2"), max_steps=1)
    seen: list[StepForecast] = []
    trainer.add_callback(EntropyForecastCallback(trainer, budget=None, on_forecast=[seen.append]))
    trainer.train()
    # Either the trainer numbers positions as we do, and then the gradients agree, or it is refused: never a wrong number.
    found = seen[0].result
    if found is None:
        assert seen[0].reason is not None and "nats a token away" in seen[0].reason
    else:
        live = found.diagnostics.live_gradient
        assert live is not None and live.cosine > 1 - 1e-6


def test_the_trainer_is_left_as_it_was(tmp_path: Path) -> None:
    trainer, _, _ = trained(tmp_path, "plain")
    names = [name for name in trainer.__dict__ if name.startswith(("_generate_and", "_compute_loss", "_calculate_rew"))]
    assert not names and "clip_grad_norm_" not in trainer.accelerator.__dict__


def test_a_trainer_of_ones_own_and_every_second_step(tmp_path: Path) -> None:
    from trl import GRPOTrainer

    class MyTrainer(EntropyForecastMixin, GRPOTrainer):
        pass

    trainer = tiny_trainer(
        tmp_path, kind=MyTrainer, extra={"entropy_forecast": {"every_n_steps": 2, "budget": None}}, max_steps=4
    )
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    # Steps 1 and 3 are not forecast, but looked back from.
    assert [row["entropy_fast/total"] is None for row in logs] == [False, True, False, True]
    assert [row["entropy_fast/realised"] is None for row in logs] == [True, False, True, False]


def test_ways_of_training_that_cannot_be_forecast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny_trainer(tmp_path)
    with pytest.raises(ConfigError, match="is not known"):
        EntropyForecastCallback(trainer, functionals=("joy",))
    with pytest.raises(ConfigError, match="is no trainer"):
        EntropyForecastCallback(object())
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    with pytest.raises(ConfigError, match="DeepSpeed"):
        EntropyForecastCallback(trainer)


@pytest.mark.parametrize("lora", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_a_kept_step_gives_the_same_number_offline(lora: bool, tmp_path: Path) -> None:
    """Also at the first steps, which make a whole step of every element, of one that is all rounding too."""
    # Saved and loaded first, so that an adapter's base has a place to be found at.
    tiny_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trainer = tiny_trainer(tmp_path, model=model, lora=lora, temperature=0.8)
    seen: list[StepForecast] = []
    callback = EntropyForecastCallback(
        trainer, budget=None, every_n_steps=2, on_forecast=[seen.append], bundle=tmp_path / "kept", bundle_every=2
    )
    trainer.add_callback(callback)
    trainer.train()
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["step-000000", "step-000002"]
    for forecast in seen[::2]:
        out, folder = tmp_path / f"out-{forecast.step}", tmp_path / "kept" / f"step-{forecast.step:06d}"
        online = forecast.result
        assert run(["probe", str(folder), "--out", str(out), "--no-picture"]) == 0
        offline = json.loads((out / "result.json").read_text())
        assert online is not None and online.split is not None
        for found, part in (
            (offline["delta_h1"], online.forecast),
            (offline["split"]["direct"]["value"], online.split.direct),
            (offline["split"]["visitation"]["value"], online.split.visitation),
        ):
            assert found == pytest.approx(part.value, rel=0, abs=1e-6 * float(part.by_unit.abs().sum()))


@pytest.mark.exhaustive
def test_a_layer_with_another_forward_is_not_kept(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, cast_lm_head_to_fp32=True, max_steps=1)
    trainer.add_callback(EntropyForecastCallback(trainer, budget=None, bundle=tmp_path / "kept"))
    with pytest.warns(EntropyFastWarning, match="the forward of 'lm_head' was replaced"):
        trainer.train()
    assert not list((tmp_path / "kept").iterdir())


def test_truncated_sampling_leaves_the_direct_part(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, top_k=10)
    seen: list[StepForecast] = []
    trainer.add_callback(EntropyForecastCallback(trainer, budget=None, on_forecast=[seen.append]))
    trainer.train()
    for forecast in seen:
        assert not forecast.failed, forecast.reason
        metrics = forecast.metrics()
        assert math.isnan(metrics["total"]) and math.isfinite(metrics["direct"])
    assert math.isnan(seen[1].metrics()["realised"]) and math.isfinite(seen[1].metrics()["realised_direct"])


def test_a_trainer_that_cannot_be_listened_to_trains_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("completion_ids")

    monkeypatch.setattr("entropy_fast.integrations.trl.hooks.TrainerHooks._tag", broken)
    plain, _, _ = trained(tmp_path, "plain", on=False)
    with pytest.warns(EntropyFastWarning, match="could not be listened to"):
        probed, _, seen = trained(tmp_path, "plain")
    assert all(f.failed for f in seen)
    for a, b in zip(plain.model.parameters(), probed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_second_training_and_a_ledger_that_is_there(tmp_path: Path) -> None:
    file = tmp_path / "ledger.parquet"
    _, callback, _ = trained(tmp_path, "plain", ledger=file)
    assert callback is not None
    again = tiny_trainer(tmp_path)
    second = EntropyForecastCallback(again, budget=None, ledger=file)
    again.add_callback(second)
    again.train()
    # The rows of the first run stay as they are; the second has a file of its own beside them.
    assert len(EntropyLedger(file).rows()) == 9
    assert second.forecaster.ledger.path == tmp_path / "ledger.from-0.parquet"
    assert len(second.forecaster.ledger.rows()) == 9
