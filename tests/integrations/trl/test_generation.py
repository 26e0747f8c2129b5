"""What responses are drawn from: tools, environments, an engine of its own, options that change a policy on the way."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_trl import tiny_trainer
from trl_runs import forecasting, own_gradient, trained_with_and_without
from trl_stand_ins import OtherEngine, tool_trainer, with_an_environment

exhaustive = pytest.mark.exhaustive
VLLM = {"use_vllm": True, "vllm_mode": "colocate"}


@exhaustive
@pytest.mark.parametrize(
    "options", [{}, {"lora": True, "temperature": 1.5, "loss_type": "dr_grpo"}], ids=["", "lora, T"]
)
def test_tools(tmp_path: Path, options: dict[str, Any]) -> None:
    probed, seen, caught = trained_with_and_without(lambda: tool_trainer(tmp_path, **options))
    assert probed.words_of_tools > 0
    own_gradient(seen)
    assert not caught


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"max_steps": 1}, id="plain"),
        pytest.param({"lora": True, "temperature": 0.7, "loss_type": "dr_grpo"}, id="lora, T", marks=exhaustive),
        pytest.param(
            {"mask_truncated_completions": True, "max_completion_length": 30}, id="truncated", marks=exhaustive
        ),
    ],
)
def test_words_of_an_environment(tmp_path: Path, options: dict[str, Any]) -> None:
    extra = {"rollout_func": with_an_environment}
    probed, seen, caught = trained_with_and_without(lambda: tiny_trainer(tmp_path, extra=extra, **options))
    assert any(bool((batch["tool_mask"] == 0).any()) for batch in probed._buffered_inputs)
    own_gradient([f for f in seen if f.result is not None])
    assert not caught


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"vllm_importance_sampling_mode": "token_truncate", "max_steps": 1}, id="token_truncate"),
        pytest.param({}, id="sequence_mask", marks=exhaustive),
        pytest.param({"vllm_importance_sampling_mode": "token_mask"}, id="token_mask", marks=exhaustive),
        pytest.param({"vllm_importance_sampling_mode": "sequence_truncate"}, id="sequence_truncate", marks=exhaustive),
        pytest.param({"vllm_importance_sampling_correction": False}, id="not corrected", marks=exhaustive),
        pytest.param(
            {"loss_type": "vespo", "vllm_importance_sampling_mode": "token_truncate"}, id="vespo", marks=exhaustive
        ),
        pytest.param(
            {"num_iterations": 2, "max_steps": 4, "off_policy_mask_threshold": 0.02}, id="twice", marks=exhaustive
        ),
        pytest.param({"temperature": 0.7, "lora": True, "bf16": False}, id="temperature, lora", marks=exhaustive),
    ],
)
def test_an_engine_that_samples_from_weights_a_little_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """TRL's code around vLLM, with its corrections; vLLM itself needs a GPU."""
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", OtherEngine)
    probed, seen, caught = trained_with_and_without(lambda: tiny_trainer(tmp_path, **VLLM, **options))
    assert all("sampling_per_token_logps" in batch for batch in probed._buffered_inputs)
    own_gradient(seen)
    assert not caught
    assert seen[-1].result is not None
    # The entropy side takes responses for the policy's own; how far they are from it is known.
    ratios = seen[-1].result.sequences["entropy"].ratios
    assert ratios is not None
    if options.get("max_steps") == 1:
        gaps = [
            ((batch["old_per_token_logps"] - batch["sampling_per_token_logps"]).nan_to_num(0.0) * mask).abs().sum(1)
            / mask.sum(1)
            for batch in probed._buffered_inputs
            for mask in [batch["completion_mask"]]
        ]
        expected = torch.cat(gaps).double().sort().values
        assert float(expected.max()) > 0.01
        assert ratios.mean_log_ratio.sort().values.tolist() == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)


@exhaustive
def test_rows_that_are_used_twice_say_from_what_policy_they_are(tmp_path: Path) -> None:
    options = {"num_iterations": 2, "max_steps": 2, "learning_rate": 0.02, "temperature": 0.7}
    _, seen, _ = trained_with_and_without(lambda: tiny_trainer(tmp_path, **options))
    notes = ["away from old_logprobs" in " ".join(f.result.diagnostics.warnings) for f in seen if f.result is not None]
    assert notes == [False, True]


@pytest.mark.parametrize("options", [{"top_k": 10}, pytest.param({"suppress_tokens": [7]}, marks=exhaustive)])
def test_options_of_the_generation_that_change_what_is_sampled(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer = tiny_trainer(tmp_path, generation_kwargs=options, max_steps=1)
    seen = forecasting(trainer)
    trainer.train()
    numbers = seen[0].metrics()
    assert math.isfinite(numbers["direct"]) and math.isnan(numbers["total"]) and math.isnan(numbers["visitation"])
