"""Steps of GRPO, and the run folders between them."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import PreTrainedModel

from entropy_fast.atomic import atomic_path
from entropy_fast.config import EstimateOptions
from entropy_fast.errors import RunFolderError
from entropy_fast.rollouts import Rollouts, write_rollouts
from entropy_fast.rollouts.units import iter_microbatches
from entropy_fast.run_folder.manifest import RunManifest, read_manifest, write_manifest
from entropy_fast.run_folder.model_source import ModelSource, load_model, load_tokenizer
from entropy_fast.sampling import VERIFIERS, SamplingSettings, sample_rollouts
from entropy_fast.ways.teacher_forcing import align_logprobs, model_logits, pad_rows
from examples.train_policy.settings import RECIPE, Settings, default_folder, seed_for
from examples.train_policy.starts import Start, additions, start_of

__all__ = ["policy_at", "sampled", "take_step", "train"]

SETTINGS, MARKER = "settings.json", "complete.json"
Announce = Callable[[str], None]


def train(settings: Settings, folder: Path | None = None, announce: Announce = print) -> list[Path]:
    """The run folders of a training, which is done unless it is there already.

    The same settings give the same policy on one machine with one number of threads; torch's random state is left alone.

    Args:
        settings: see `Settings`.
        folder: where it is kept; None takes `default_folder`.
        announce: called with a line for every step.

    Returns:
        One folder for each of ``settings.checkpoints``.

    Raises:
        RunFolderError: the folder holds something else, or what it held is damaged.
        ConfigError: the warm-up does not get there, or a package is missing.
    """
    folder = (default_folder(settings) if folder is None else folder).expanduser().resolve()
    checkpoints = [folder / f"step-{step:04}" for step in settings.checkpoints]
    # Through JSON, so that it equals what is read: tuples come back as lists.
    wanted = json.loads(json.dumps({"recipe": RECIPE, "folder": str(folder), **dataclasses.asdict(settings)}))
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        found = _settings_in(folder)
        if found not in (None, wanted):
            raise RunFolderError(
                f"{folder} holds a policy of other settings, or one that was made in another place.",
                fix="pass another --out, or remove the folder.",
            )
        if found is not None and (folder / MARKER).is_file():
            for checkpoint in checkpoints:
                read_manifest(checkpoint)  # says what is missing
            announce(f"{folder} is complete: nothing to do.")
            return checkpoints
        for leftover in folder.glob("step-*"):  # of a training that was interrupted
            shutil.rmtree(leftover)
        _write_json(folder / SETTINGS, wanted)
        started = time.monotonic()
        with torch.random.fork_rng(devices=[]):
            log = _train(settings, folder, announce)
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        seconds = round(time.monotonic() - started, 1)
        _write_json(folder / MARKER, {"seconds": seconds, "versions": versions, "log": log})
    return checkpoints


def policy_at(checkpoint: Path, settings: Settings) -> tuple[Start, torch.optim.Optimizer]:
    """The small policy of a checkpoint, and its optimizer as it was."""
    source = read_manifest(checkpoint).model
    start = Start(load_model(source), load_tokenizer(source), None, "exact-text", additions(settings.digits))
    trained = [p for p in start.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt", weights_only=True))
    return start, optimizer


def _train(settings: Settings, folder: Path, announce: Announce) -> list[dict[str, float]]:
    torch.manual_seed(seed_for(settings, "start"))
    start = start_of(settings, announce)
    trained = [p for p in start.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    log: list[dict[str, float]] = []
    for step in range(settings.steps + 1):
        if step == settings.steps and step not in settings.checkpoints:
            break
        rollouts = sampled(start, settings, settings.prompts, "update", step)
        assert rollouts.rewards is not None
        if step in settings.checkpoints:
            held_out = sampled(start, settings, settings.held_out_prompts, "held out", step)
            _save(folder / f"step-{step:04}", start, optimizer, {"rollouts": rollouts, "held_out": held_out}, settings)
        if step < settings.steps:
            entropy, norm = take_step(start.model, optimizer, rollouts, settings)
            reward = float(rollouts.rewards.mean())
            log.append({"step": step + 1, "reward": reward, "entropy_per_token": entropy, "gradient_norm": norm})
            announce(
                f"step {step + 1}: reward {reward:.3f}, entropy {entropy:.4f} nats a token, gradient norm {norm:.3g}"
            )
    return log


def sampled(start: Start, settings: Settings, prompts: int, purpose: str, step: int) -> Rollouts:
    """Responses to fresh prompts, with a seed of their own for every purpose and step."""
    tasks = start.tasks(prompts, seed_for(settings, purpose, "tasks", step))
    sampling = SamplingSettings(
        responses_per_prompt=settings.responses,
        max_new_tokens=settings.max_new_tokens,
        seed=seed_for(settings, purpose, step),
        prompts_per_batch=16,
    )
    return sample_rollouts(start.model, start.tokenizer, tasks, VERIFIERS[start.verifier], sampling)


def take_step(
    model: PreTrainedModel | PeftModel, optimizer: torch.optim.Optimizer, rollouts: Rollouts, settings: Settings
) -> tuple[float, float]:
    """One on-policy step of Dr. GRPO; the entropy per token it was made at, and the gradient's norm before clipping."""
    assert rollouts.advantages is not None
    advantages = rollouts.advantages.float()
    entropy_sum = torch.zeros((), dtype=torch.float64)
    model.train()
    for rows in iter_microbatches(rollouts, list(range(rollouts.n_prompts)), settings.prompts_per_microbatch):
        batch = pad_rows(rollouts, rows, model.device)
        forward = align_logprobs(model_logits(model, batch), batch, want_entropies=True)
        losses = -advantages[rows] * forward.sequence_logprobs / settings.max_new_tokens
        torch.autograd.backward(losses.sum() / rollouts.n_sequences)
        assert forward.entropies is not None
        entropy_sum += forward.entropies.detach().double().sum()
    trained = [p for p in model.parameters() if p.requires_grad]
    norm = float(torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(entropy_sum) / int(rollouts.response_lengths.sum()), norm


def _save(
    folder: Path, start: Start, optimizer: torch.optim.Optimizer, batches: dict[str, Rollouts], settings: Settings
) -> None:
    """A run folder that ``entropy-fast probe`` accepts."""
    folder.mkdir()
    source, adapter = start.source, None
    if source is None:
        start.model.save_pretrained(str(folder / "model"))
        start.tokenizer.save_pretrained(str(folder / "model"))
        source = ModelSource(str(folder / "model"))
    else:
        adapter = "adapter"
        start.model.save_pretrained(str(folder / adapter), save_embedding_layers=False)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    for name, rollouts in batches.items():
        write_rollouts(rollouts, folder / f"{name}.jsonl")
    (group,) = optimizer.state_dict()["param_groups"]
    real_step = {"learning_rate": group["lr"], **{name: group[name] for name in ("betas", "eps", "weight_decay")}}
    _write_json(folder / "training.json", {**real_step, "max_grad_norm": settings.max_grad_norm})
    estimate = EstimateOptions(weighting="dr_grpo", step="next", max_grad_norm=settings.max_grad_norm)
    write_manifest(RunManifest(source, "rollouts.jsonl", "optimizer.pt", adapter, estimate=estimate), folder)


def _settings_in(folder: Path) -> Any:
    """The settings of what the folder holds, None where it holds nothing.

    Raises:
        RunFolderError: it holds something else.
    """
    if (folder / SETTINGS).is_file():
        try:
            return json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunFolderError(f"{folder / SETTINGS} is no JSON: {error}", fix="remove the folder.") from error
    if any(not path.name.startswith(".") for path in folder.iterdir()):
        raise RunFolderError(f"{folder} is not empty and holds no policy.", fix="pass another --out.")
    return None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: a second process waits for the first, and finds its policy."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _write_json(path: Path, document: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
