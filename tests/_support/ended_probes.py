"""Probes that are ended before their time, and what a later one makes of what they left."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from probe_models.architectures import stepped_adamw
from probe_models.batches import make_rollouts
from probe_options import options_of
from rank_cases import wide_model
from ranks_at_work import numbers
from torch import nn

from entropy_fast import DeltaH1Result, Rollouts, candidates, fast_delta_h1

SIZES = (3, 2, 4, 2)
PARTS = {"entropy_estimator": "rao_blackwell", "baseline": "prompts"}
# One prompt in a forward, so that there is something between the first and the last.
CASES: Mapping[str, Mapping[str, Any]] = {
    "units' gradients kept, next step": {**PARTS, "step": "next"},
    "units' gradients not kept, next step": {**PARTS, "step": "next", "memory_budget": 0},
    "units' gradients kept, adam_static, sequences": {"by_sequence": True},
    "units' gradients not kept, adam_static, blocks": {"memory_budget": 0, "blocks": 2},
    "other updates and functionals": {
        **PARTS,
        "memory_budget": 0,
        "step": "next",
        "fields": {
            "functionals": {"length": torch.arange(float(sum(SIZES)))},
            "updates": {"bonus": candidates.entropy_bonus(0.01)},
        },
    },
    "two batches, next step": {**PARTS, "step": "next", "memory_budget": 0, "batches": 2},
    "two batches, adam_static, sequences and tokens": {"by_sequence": True, "by_token": True, "batches": 2},
    "two passes, next step": {**PARTS, "engine": "two_pass", "step": "next"},
    "two passes, two batches, the double backward": {
        "engine": "two_pass",
        "batches": 2,
        "conditional_variance": "alpha",
    },
    "two passes, two batches, next step": {**PARTS, "engine": "two_pass", "batches": 2, "step": "next"},
    "a live gradient, in chunks of prompts": {
        **PARTS,
        "step": "next",
        "gradient": "live",
        "relative_error": 1e-3,
        "sizes": (2, 3, 2, 2, 2, 2, 2, 2, 2, 2),
    },
}


class EndedError(Exception):
    """Instead of a kill, where the process is to go on."""


def probe(
    folder: Path | None,
    at: int | None = None,
    how: Callable[[], None] | None = None,
    change: Callable[[nn.Module, torch.optim.Optimizer], object] | None = None,
    fields: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[DeltaH1Result, list[tuple[str, int, int]]]:
    """A probe of a model made anew, with its checkpoints in ``folder``, one after every microbatch; and what it reported.

    Args:
        folder: None for no checkpoint.
        at: number of the report of progress at which it is ended; None for never.
        how: ends it there; None raises `EndedError`.
        change: what is done to model and optimizer before.
        fields: what else `fast_delta_h1` is given.
        options: of the probe, and ``batches`` and ``sizes`` of prompts.
    """
    model = wide_model()
    optimizer = stepped_adamw(model)
    if change is not None:
        change(model, optimizer)
    chosen = {"prompts_per_microbatch": 1, **options}
    rollouts = make_rollouts(chosen.pop("sizes", SIZES))
    given = {"entropy_rollouts": make_rollouts((2, 2, 3), seed=7)} if chosen.pop("batches", 1) == 2 else {}
    given |= {"rollouts": rollouts, **(fields or {})}
    if chosen.get("gradient") == "live":
        put_gradient(model, rollouts)
    if folder is not None:
        chosen = {"checkpoint": folder, "checkpoint_seconds": 0, **chosen}
    seen: list[tuple[str, int, int]] = []

    def report(stage: str, done: int, total: int) -> None:
        seen.append((stage, done, total))
        if len(seen) == at:
            if how is not None:
                how()
            raise EndedError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = fast_delta_h1(model, optimizer, on_progress=report, **given, **options_of(**chosen))
    return result, seen


def put_gradient(model: nn.Module, rollouts: Rollouts) -> None:
    """The gradient of a policy-gradient loss of the batch, as a training step leaves it."""
    model.eval()
    logits = model(input_ids=rollouts.input_ids, attention_mask=rollouts.attention_mask).logits[:, :-1]
    logprobs = torch.log_softmax(logits, -1).gather(-1, rollouts.input_ids[:, 1:, None])[..., 0]
    (-((logprobs * rollouts.loss_mask[:, 1:]).sum(1) * rollouts.advantages / 8).mean()).backward()


def all_of(result: DeltaH1Result) -> str:
    """Every number of a result, to the last bit."""
    return repr(dict(numbers(result)))


def in_another_process(work: Callable[[], object]) -> int:
    """Do something in a fork of this process; its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(ended)


def kill() -> None:
    """End this process as nothing can prevent."""
    os.kill(os.getpid(), signal.SIGKILL)
