"""What decides a training, and where its policy is kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Literal

from entropy_fast.errors import ConfigError

__all__ = ["RECIPE", "SMALL", "SMOLLM2", "Settings", "default_folder", "seed_for"]

RECIPE = 2  # another number wherever the same settings would give another policy: what is kept is not used then


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides a training; the defaults are those of the small policy.

    Attributes:
        policy: which one is trained.
        steps: GRPO steps.
        checkpoints: after how many of them a run folder is left, in increasing order.
        seed: of initialisation, prompts and responses.
        prompts: B of every step.
        responses: G.
        held_out_prompts: prompts of the independent batch.
        max_new_tokens: generation budget.
        learning_rate: AdamW's; its betas are torch's.
        weight_decay: AdamW's.
        max_grad_norm: what the norm of the gradient is clipped at.
        prompts_per_microbatch: prompts in one forward.
        digits: of a number in a prompt, at the most.
        warm_up_share: the share of right answers at which the small policy's warm-up ends.
        lora_rank: of SmolLM2's adapter.

    Raises:
        ConfigError: they cannot be.
    """

    policy: Literal["small", "smollm2"] = "small"
    steps: int = 60
    checkpoints: tuple[int, ...] = (5, 20, 60)
    seed: int = 0
    prompts: int = 16
    responses: int = 8
    held_out_prompts: int = 64
    max_new_tokens: int = 6
    learning_rate: float = 5e-5
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    prompts_per_microbatch: int = 16
    digits: int = 2
    warm_up_share: float = 0.4
    lora_rank: int = 16

    def __post_init__(self) -> None:
        if not self.checkpoints or list(self.checkpoints) != sorted(set(self.checkpoints)):
            raise ConfigError(f"checkpoints are {self.checkpoints}.", fix="give increasing numbers of steps.")
        if self.checkpoints[0] < 2 or self.checkpoints[-1] > self.steps:
            raise ConfigError(
                f"checkpoints are {self.checkpoints}, of {self.steps} steps.",
                # Before that the A matrices of a LoRA have no second moment.
                fix="take them from 2 to the number of steps.",
            )


SMALL = Settings()
SMOLLM2 = Settings(
    policy="smollm2",
    steps=16,
    checkpoints=(4, 10, 16),  # later there are batches in which every response is right, from which no step is made
    prompts=8,
    held_out_prompts=8,
    max_new_tokens=16,
    prompts_per_microbatch=2,
    digits=1,
    learning_rate=2e-4,
)


def default_folder(settings: Settings) -> Path:
    """Where a policy is kept when no place is given: a folder of the user's cache with a key made from the settings."""
    key = hashlib.sha256(json.dumps([RECIPE, dataclasses.asdict(settings)]).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "entropy_fast" / "policies" / f"{settings.policy}-{key}"


def seed_for(settings: Settings, *purpose: str | int) -> int:
    """A seed for one purpose, far from all others: reasoning-gym counts up from the one it is given."""
    digest = hashlib.sha256(repr((settings.seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:6], "big")
