"""Whether forecasts inside TRL's trainer come true, and what they cost: real GRPO runs on a small policy.

    python -m benchmarks.trl_runs              # three runs of 60 steps, some minutes
    python -m benchmarks.trl_runs --steps 12   # to see that everything runs

Every step is forecast before it is taken; what it did is measured on the responses of the next step, which had no part in it.
Printed for every run and part: slope of realised on forecast with its error, correlation, the noise of both, coverage, and the
share of the training time that forecasts took. Weights are compared with those of the same run without forecasts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks.kernels.machine import description
from benchmarks.kernels.report import print_table
from entropy_fast.integrations.trl import EntropyForecastCallback

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

WORDS = ["<pad>", "<eos>", "<unk>", *(str(n) for n in range(60)), "plus", "is"]
GENERATIONS, PROMPTS = 8, 24
RUNS: dict[str, dict[str, Any]] = {
    "dr_grpo, full": {"loss_type": "dr_grpo", "learning_rate": 2e-4},
    "dapo, LoRA": {"loss_type": "dapo", "learning_rate": 1e-3, "lora": True},
    "grpo, full, T 0.8, clipped": {
        "loss_type": "grpo",
        "learning_rate": 4e-4,
        "temperature": 0.8,
        "max_grad_norm": 0.2,
    },
}
HEADER = ["run", "part", "slope", "correlation", "rms forecast", "its error", "error of realised", "coverage", "n"]


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def policy() -> Any:
    """Of random weights, with enough spread to have opinions."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(WORDS), hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=1, pad_token_id=0, initializer_range=0.15,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def reward(completions: list[str], **_: Any) -> list[float]:
    """Even numbers are good."""
    return [sum(w.isdigit() and int(w) % 2 == 0 for w in c.split()) / 4 for c in completions]


def trainer(folder: str, steps: int, *, lora: bool = False, **options: Any) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    rows = [{"prompt": f"{a} plus {b} is"} for a in range(30) for b in range(a, 30)]
    arguments = GRPOConfig(
        output_dir=folder, per_device_train_batch_size=PROMPTS * GENERATIONS, num_generations=GENERATIONS,
        max_completion_length=12, max_steps=steps, logging_steps=1, report_to="none", save_strategy="no", use_cpu=True,
        bf16=False, seed=1, disable_tqdm=True, gradient_checkpointing=False, lr_scheduler_type="constant", **options,
    )  # fmt: skip
    return GRPOTrainer(
        model=policy(),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=8, target_modules="all-linear") if lora else None,
    )


def run(name: str, steps: int, budget: float | None) -> dict[str, Any]:
    """One run with forecasts and one without."""
    with tempfile.TemporaryDirectory() as folder:
        plain = trainer(folder, steps, **RUNS[name])
        started = time.perf_counter()
        plain.train()
        seconds = time.perf_counter() - started
        probed = trainer(folder, steps, **RUNS[name])
        callback = EntropyForecastCallback(probed, budget=budget)
        probed.add_callback(callback)
        started = time.perf_counter()
        probed.train()
        with_forecasts = time.perf_counter() - started
    same = all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), probed.model.parameters(), strict=True))
    rows, ledger = [], callback.forecaster.ledger
    for part in ("direct", "total"):
        found = ledger.calibration(part, window=None)
        pairs = [e for e in ledger.rows() if e.part == part and not math.isnan(e.forecast + e.realised)]
        x, sigma, tau = (np.array([getattr(e, f) for e in pairs]) for f in ("forecast", "std_error", "realised_error"))
        rows.append(
            {
                "part": part, "slope": found.slope, "slope_error": found.slope_error, "expected_slope": found.expected_slope,
                "correlation": found.correlation, "forecast": float(np.sqrt((x**2).mean())),
                "forecast_error": float(np.sqrt((sigma**2).mean())), "realised_error": float(np.sqrt((tau**2).mean())),
                "coverage": found.coverage, "n": found.n,
            }
        )  # fmt: skip
    levels = [row["entropy"] for row in plain.state.log_history if "entropy" in row]
    return {
        "name": name, "same": same, "rows": rows, "seconds": seconds, "with_forecasts": with_forecasts,
        "share": callback.forecaster.time.used, "levels": [levels[0], levels[-1]], "budget": budget,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print and write; 1 where weights are not those of the run without forecasts."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trl_runs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--budget", type=float, default=None, help="share of the training time; without, no limit")
    parser.add_argument("--threads", type=int, default=2, help="torch.set_num_threads")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else 140)
    found = [run(name, options.steps, options.budget) for name in RUNS]
    table = [
        [
            own["name"], row["part"], f"{row['slope']:.3f} ± {row['slope_error']:.3f}", f"{row['correlation']:.3f}",
            f"{row['forecast']:.2g}", f"{row['forecast_error']:.2g}", f"{row['realised_error']:.2g}",
            f"{row['coverage']:.0%}", str(row["n"]),
        ]
        for own in found
        for row in own["rows"]
    ]  # fmt: skip
    print_table(console, f"{options.steps} steps of {PROMPTS} prompts x {GENERATIONS} responses", HEADER, table)
    for own in found:
        console.print(
            f"{own['name']}: weights {'identical' if own['same'] else 'DIFFERENT'}; entropy {own['levels'][0]:.2f} to "
            f"{own['levels'][1]:.2f}; {own['seconds']:.1f} s without, {own['with_forecasts']:.1f} s with forecasts, which took "
            f"{own['share']:.1%} of the training time",
            highlight=False,
        )
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "trl_runs.json"
    file.write_text(json.dumps({"machine": description("cpu"), "runs": found}, indent=1))
    console.print(f"Written: {file}", highlight=False, soft_wrap=True)
    return 0 if all(own["same"] for own in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
