"""fp16 with a gradient scaler, and output layers in fp32: the same training, and forecasts of its own gradient.

accelerate has no fp16 on CPUs, and trains in fp32 where it is asked for. What it sets up elsewhere, autocast to float16 and a
scaler, is put into its place here; all that it does with them, to losses, gradients, clipping and steps, is its own.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from tiny_trl import tiny_model, tiny_trainer
from torch.amp import GradScaler
from trl_runs import EXACT, own_gradient, trained_with_and_without

exhaustive = pytest.mark.exhaustive
# Rounding to 16 bits in two forwards that lie otherwise in memory: of a cosine, and of the gradient's length.
FP16, BF16 = {"cosine": 1 - 1e-3, "scale": 1e-2}, {"cosine": 1 - 1e-2, "scale": 5e-2}


def fp16_trainer(folder: Path, *, factor: float = 2.0**10, grows_after: int = 2000, **options: Any) -> Any:
    trainer = tiny_trainer(folder, fp16=True, **options)
    accelerator = trainer.accelerator
    assert accelerator.mixed_precision == "fp16" and accelerator.scaler is None and not accelerator.native_amp
    accelerator.native_amp = True
    accelerator.scaler = GradScaler("cpu", init_scale=factor, growth_interval=grows_after)
    return trainer


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"max_grad_norm": 0.1, "grows_after": 1, "max_steps": 2}, id="clipped, with a factor that grows"),
        pytest.param({"max_grad_norm": 0.0}, id="not clipped", marks=exhaustive),
        pytest.param({"lora": True}, id="lora", marks=exhaustive),
        pytest.param({"optim": "adamw_torch"}, id="an optimizer that is not fused", marks=exhaustive),
        pytest.param({"num_iterations": 2, "entropy_coef": 0.01, "max_steps": 4}, id="rows twice, bonus", marks=exhaustive),
        pytest.param({"temperature": 0.8, "gradient_checkpointing": True}, id="temperature, checkpointing", marks=exhaustive),
        pytest.param({"cast_lm_head_to_fp32": True}, id="head in fp32", marks=exhaustive),
    ],
)  # fmt: skip
def test_fp16_with_its_scaler(tmp_path: Path, options: dict[str, Any]) -> None:
    probed, seen, caught = trained_with_and_without(lambda: fp16_trainer(tmp_path, **options))
    own_gradient(seen, **FP16)
    assert not caught
    assert probed.accelerator.scaler.get_scale() > 1.0
    for forecast in seen:
        assert forecast.result is not None
        assert forecast.result.plan.way.startswith("packed") == ("cast_lm_head_to_fp32" not in options)


@exhaustive
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
def test_steps_that_the_scaler_skips_are_no_forecasts_and_no_failures(tmp_path: Path, optim: str) -> None:
    probed, seen, caught = trained_with_and_without(
        lambda: fp16_trainer(tmp_path, factor=2.0**22, max_steps=8, optim=optim)
    )
    assert not caught and not any(forecast.failed for forecast in seen)
    skipped = [forecast for forecast in seen if forecast.result is None]
    taken = [forecast for forecast in seen if forecast.result is not None]
    assert skipped and taken and skipped[0].step == 0
    for forecast in skipped:
        assert forecast.reason is not None and "the optimizer skips the step" in forecast.reason
        assert math.isnan(forecast.metrics()["total"])
    # A factor that overflowed is halved: what is left of it says how many steps were skipped.
    assert probed.accelerator.scaler.get_scale() == 2.0 ** (22 - len(skipped))
    own_gradient(taken, **FP16)
    # What the step before did is measured beside a skipped one too: its responses come from the moved policy.
    after = [one for one, before in zip(seen[1:], seen[:-1], strict=True) if before.result is not None]
    assert after and all(forecast.realised is not None for forecast in after)


@exhaustive
def test_fp16_that_is_not_there_is_not_forecast_in(tmp_path: Path) -> None:
    _, seen, _ = trained_with_and_without(lambda: tiny_trainer(tmp_path, fp16=True))
    own_gradient(seen, cosine=EXACT)
    assert all(f.result is not None and f.result.run_options.autocast_dtype is None for f in seen)


@exhaustive
@pytest.mark.parametrize(
    ("options", "bounds"),
    [
        pytest.param({}, {}, id="fp32"),
        pytest.param({"bf16": True}, BF16, id="bf16"),
        pytest.param({"bf16": True, "lora": True, "temperature": 0.7}, BF16, id="bf16, lora"),
        pytest.param({"model": lambda: tiny_model(tied=True)}, {}, id="tied"),
        pytest.param({"model": lambda: tiny_model(tied=True), "bf16": True}, BF16, id="tied, bf16"),
    ],
)
def test_an_output_layer_in_fp32(tmp_path: Path, options: dict[str, Any], bounds: dict[str, float]) -> None:
    model = options.get("model", tiny_model)
    _, seen, caught = trained_with_and_without(
        lambda: tiny_trainer(tmp_path, cast_lm_head_to_fp32=True, **{**options, "model": model()})
    )
    own_gradient(seen, **bounds)
    assert not caught


@exhaustive
def test_a_gradient_that_is_not_finite_is_said(tmp_path: Path) -> None:
    from trl import GRPOTrainer

    class Breaks(GRPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            return super()._compute_loss(model, inputs) * (math.nan if self.state.global_step == 1 else 1.0)

    _, seen, caught = trained_with_and_without(lambda: tiny_trainer(tmp_path, kind=Breaks, max_steps=2))
    assert seen[0].result is not None
    assert seen[1].failed and "the gradient has norm nan" in str(seen[1].reason)
    assert len(caught) == 1 and "the gradient has norm nan" in str(caught[0].message)
