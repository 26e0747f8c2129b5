"""A GRPO training of TRL's by one process or several, for tests; started by `process_groups.run_jobs`.

Responses are drawn from the policy by draws of their own row, so that however many processes there are, they are the same.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_trl import tiny_model, tiny_trainer
from torch.distributed.tensor import DTensor
from trl import GRPOTrainer  # imported before processes are forked: it takes seconds
from trl_fsdp2 import BY_ACCELERATE, ToldToShard, loaded_in_shards
from trl_runs import CLOCKED, bits, random_states

from entropy_fast import candidates
from entropy_fast.errors import EntropyFastWarning
from entropy_fast.integrations.early_warning import EntropyFloor
from entropy_fast.integrations.forecast import StepForecast
from entropy_fast.integrations.trl import EntropyForecastCallback

ROWS = 12  # of a step; 6 of each of two processes, of groups of 4: one is on both


class DrawnByRow(ToldToShard, GRPOTrainer):
    """Every response has a generator of its own, whichever process makes it; all processes do as many forwards."""

    @torch.no_grad()
    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
        first = self.accelerator.process_index * len(prompt_ids)
        completions = []
        for number, ids in enumerate(prompt_ids, first):
            generator = torch.Generator().manual_seed(1000 * self.state.global_step + number)
            row = list(ids)
            for _ in range(self.max_completion_length):
                logits = self.model(input_ids=torch.tensor([row])).logits[0, -1].double() / self.temperature
                if row[-1] != 1:
                    row.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
            completions.append(row[len(ids) :])
        return completions, None


@contextlib.contextmanager
def as_launched(rank: int) -> Iterator[None]:
    """What a launcher tells a process of several."""
    if dist.get_world_size() > 1:
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": dist.get_world_size()}
        os.environ.update({name: str(value) for name, value in told.items()})
        os.environ.update(
            MASTER_ADDR="127.0.0.1", MASTER_PORT="1"
        )  # asked for, and not used: the process group is there
    logging.disable(logging.WARNING)
    yield


class DrawnByTrl(ToldToShard, GRPOTrainer):
    """Responses are TRL's own."""


def trainer_of(
    folder: Path, sharded_by: str | None = None, dropout: float = 0.0, own_generation: bool = False, **options: Any
) -> Any:
    """With a model that nobody shards, accelerate or transformers."""
    rows = ROWS // dist.get_world_size()
    settings = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": rows, "max_steps": 4, "seed": 3}
    model = tiny_model(dropout=dropout)
    if sharded_by == "transformers":
        model = loaded_in_shards(model, folder)
    kind = DrawnByTrl if own_generation else DrawnByRow
    told = BY_ACCELERATE if sharded_by == "accelerate" else {}
    return tiny_trainer(folder, model=model, kind=kind, **settings | copy.deepcopy(told) | options)


def trained(folder: Path, options: dict[str, Any], **callback: Any) -> tuple[Any, list[StepForecast], list[str]]:
    trainer, seen = trainer_of(folder, **options), list[StepForecast]()
    given = {"budget": None, "on_forecast": [seen.append, *callback.pop("hooks", ())], **callback}
    trainer.add_callback(EntropyForecastCallback(trainer, **given))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    return trainer, seen, [str(w.message) for w in caught if issubclass(w.category, EntropyFastWarning)]


def digest(trainer: Any) -> str:
    found = hashlib.sha256()
    for parameter in trainer.model.parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        found.update(bytes(bits(whole).tolist()))
    return found.hexdigest()


def logs_of(trainer: Any) -> list[dict[str, float | None]]:
    return [
        {key: value for key, value in row.items() if not key.endswith(CLOCKED)} for row in trainer.state.log_history
    ]


def said(seen: list[StepForecast], forecast: Callable[[StepForecast], dict[str, float]]) -> list[dict[str, Any]]:
    return [{name: None if math.isnan(value) else value for name, value in forecast(own).items()} for own in seen]


def run(rank: int, options: dict[str, Any], verify: str, bundle: bool = False) -> dict[str, Any]:
    """Train without forecasts and with them."""
    with as_launched(rank), tempfile.TemporaryDirectory() as folder:
        plain = trainer_of(Path(folder), **options)
        plain.train()
        states = random_states()
        extra: dict[str, Any] = {"ledger": Path(folder) / "ledger.parquet"}
        if bundle:
            extra["bundle"] = Path(folder) / "bundle"
        trainer, seen, caught = trained(
            Path(folder), options, verify=verify, candidates={"bonus": candidates.entropy_bonus(0.05)}, **extra
        )
        live = [own.result.diagnostics.live_gradient for own in seen if own.result is not None]
        return {
            "same weights": digest(plain) == digest(trainer),
            "same draws": random_states() == states,
            "weights": digest(trainer),
            "plain logs": logs_of(plain),
            "logs": logs_of(trainer),
            "forecasts": said(seen, StepForecast.metrics),
            "prompts": [[list(own.group_ids) for own in f.result.per_prompt] for f in seen if f.result is not None],
            "reasons": [own.reason for own in seen],
            "realised reasons": [own.realised_reason for own in seen],
            "agreement": [None if own is None else [own.cosine, own.scale, own.prompts, own.of] for own in live],
            "warnings": caught,
            "ledger there": extra["ledger"].exists(),
            "kept": sorted(path.name for path in (Path(folder) / "bundle").glob("*")),
        }


def failing(rank: int, at: str, sharded_by: str | None = None) -> dict[str, Any]:
    """One rank fails at its second forecast, or in looking back on its first."""
    with as_launched(rank), tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        plain = trainer_of(Path(folder), sharded_by)
        plain.train()
        calls: list[int] = []

        def fail_once(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                calls.append(1)
                if rank == 1 and len(calls) == 2:
                    raise ValueError("made up")
                return original(*args, **kwargs)

            return call

        patch.setattr(at, fail_once(_named(at)))
        trainer, seen, caught = trained(Path(folder), {"sharded_by": sharded_by})
        return {
            "same weights": digest(plain) == digest(trainer),
            "forecasts": said(seen, StepForecast.metrics),
            "reasons": [own.reason for own in seen],
            "warnings": caught,
        }


def stopping(rank: int, sharded_by: str | None = None) -> dict[str, Any]:
    """A hook that wants to stop, on one rank alone."""

    tokens: list[bool] = []

    class Stop:
        wants_stop = False

        def __call__(self, forecast: StepForecast) -> None:
            tokens.append(forecast.tokens is not None)
            self.wants_stop = rank == 1 and forecast.step == 1

    with as_launched(rank), tempfile.TemporaryDirectory() as folder:
        floor = EntropyFloor(3.3, within=50, stop=False)
        trainer, seen, _ = trained(Path(folder), {"sharded_by": sharded_by}, hooks=[Stop(), floor])
        return {"steps": trainer.state.global_step, "forecast": len(seen), "tokens": tokens}


def shards(rank: int) -> dict[str, Any]:
    """What this rank has of a model, by who shards it."""
    found = {}
    for sharded_by in ("accelerate", "transformers"):
        with as_launched(rank), tempfile.TemporaryDirectory() as folder:
            trainer = trainer_of(Path(folder), sharded_by, max_steps=1)
            trainer.train()
        parameters = list(trainer.model.parameters())
        own = [p.to_local() for p in parameters if isinstance(p, DTensor)]
        found[sharded_by] = {
            "parameters": len(parameters),
            "sharded": len(own),
            "elements": sum(p.numel() for p in parameters),
            "elements here": sum(p.numel() for p in own),
        }
    return found


def _named(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name)  # type: ignore[no-any-return]
