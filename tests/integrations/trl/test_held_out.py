"""Held-out responses: nothing of the training changes by them, and what they say is what scoring by hand says."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from probe_oracle.token_gradients import token_values
from tiny_trl import tiny_model, tiny_trainer
from torch import Tensor

from entropy_fast import Rollouts
from entropy_fast.errors import ConfigError, EntropyFastWarning
from entropy_fast.integrations.trl import EntropyForecastCallback
from entropy_fast.integrations.trl.held_out import HeldOutResponses

# By name the options of the trainer, and of the model.
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 0.7, "max_steps": 2},
    "lora, checkpointing": {"lora": True, "gradient_checkpointing": True},
    "dropout": {"dropout": 0.1},
    "bf16": {"bf16": True},
    "twice the same rows": {"num_iterations": 2, "max_steps": 4},
    "truncated responses left out": {"mask_truncated_completions": True, "max_completion_length": 12},
}
ALL = [name if name == "plain" else pytest.param(name, marks=pytest.mark.exhaustive) for name in SETTINGS]


def trained(folder: Path, name: str, **callback: Any) -> tuple[Any, list[Any]]:
    options = dict(SETTINGS[name])
    trainer = tiny_trainer(folder, model=tiny_model(dropout=options.pop("dropout", 0.0)), **options)
    seen: list[Any] = []
    if callback.pop("on", True):
        own = EntropyForecastCallback(
            trainer, budget=None, verify="held_out", on_forecast=[seen.append], sample=3, **callback
        )
        trainer.add_callback(own)
    trainer.train()
    return trainer, seen


@pytest.mark.parametrize("name", ALL)
def test_training_is_the_same_bit_by_bit(name: str, tmp_path: Path) -> None:
    found = []
    for on in (False, True):
        random.seed(1), np.random.seed(1)
        trainer, seen = trained(tmp_path, name, on=on)
        found.append((trainer, torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()))
    (plain, *states), (probed, *others) = found
    for (one, a), (_, b) in zip(plain.model.named_parameters(), probed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), one
    assert torch.equal(states[0], others[0]) and states[1:] == others[1:]
    for before, after in zip(plain.state.log_history, probed.state.log_history, strict=True):
        for key, value in before.items():
            if not key.endswith(("time", "runtime", "per_second")):
                assert after[key] == value, key
    assert seen and not [f.reason for f in seen if f.failed]
    if name == "truncated responses left out":
        return  # most windows are empty then
    # Also where the next step is of the same rows.
    assert all(f.realised is not None for f in seen if f.step)


def test_what_they_say_is_what_scoring_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[Rollouts, Rollouts, list[Tensor]]] = []
    original = HeldOutResponses.__call__

    def noted(self: HeldOutResponses, window: Any, prompts: int) -> Rollouts:
        found = original(self, window, prompts)
        model = self._trainer.model
        taken.append((window.rollouts, found, [t.detach() for t in token_values(model, found, 0.7)]))
        return found

    monkeypatch.setattr(HeldOutResponses, "__call__", noted)
    after: list[list[Tensor]] = []
    trainer = tiny_trainer(tmp_path, temperature=0.7, max_steps=3, learning_rate=1e-2)

    def look(forecast: Any) -> None:
        if forecast.realised is not None:
            responses = taken[forecast.step - 1][1]
            after.append([t.detach() for t in token_values(trainer.model, responses, 0.7)])
            seen.append(forecast.realised)

    seen: list[Any] = []
    trainer.add_callback(EntropyForecastCallback(trainer, budget=None, verify="held_out", sample=3, on_forecast=[look]))
    trainer.train()
    assert len(seen) == 2
    for done, (window, responses, before), now in zip(seen, taken, after, strict=False):
        groups = responses.group_ids
        assert done.prompts == responses.n_prompts == 3 and len(groups) == 12
        mine, theirs = prompts_of(responses), prompts_of(window)
        assert len(mine) == 3 and not mine & theirs
        lengths = responses.response_lengths.double()
        logs, old, new = (now[0] - before[0]).sum(1), before[1].sum(1), now[1].sum(1)
        parts = []
        for group in range(3):
            rows = groups == group
            share, size = logs[rows].softmax(0), int(rows.sum())
            visits = [size / (size - 1) * ((share * v[rows]).sum() - v[rows].mean()) for v in (new, lengths)]
            parts.append([old[rows].mean(), new[rows].mean() + visits[0], lengths[rows].mean(), visits[1]])
        h, moved, length, longer = torch.tensor(parts, dtype=torch.float64).mean(0)
        assert done.total == pytest.approx(float(moved / (length + longer) - h / length), abs=1e-5)
        assert done.direct == pytest.approx(float((new - old).sum() / lengths.sum()), abs=1e-5)
        assert abs(done.direct) > 1e-3


@pytest.mark.parametrize("left_out", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_a_response_ends_with_its_end(left_out: bool, tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, mask_truncated_completions=left_out)
    own = HeldOutResponses(trainer)
    (end,) = trainer.eos_token_ids
    assert own._cut([5, 6, end, 0, end]) == [5, 6, end]
    assert own._cut([5, 6, 7]) == ([] if left_out else [5, 6, 7])


def prompts_of(rollouts: Rollouts) -> set[tuple[int, ...]]:
    found = set()
    for ids, attended, counted in zip(rollouts.input_ids, rollouts.attention_mask, rollouts.loss_mask, strict=True):
        first = int((counted == 1).nonzero()[0])
        found.add(tuple(ids[:first][attended[:first] == 1].tolist()))
    return found


@pytest.mark.exhaustive
def test_a_data_set_without_other_prompts_is_a_warning_and_no_realised_change(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, max_steps=2)
    own = HeldOutResponses(trainer)

    def held_out(window: Any, prompts: int) -> Rollouts:
        trainer.train_dataset = trainer.train_dataset.select([0])
        return own(window, prompts)

    seen: list[Any] = []
    trainer.add_callback(
        EntropyForecastCallback(trainer, budget=None, verify="held_out", on_forecast=[seen.append], held_out=held_out)
    )
    with pytest.warns(EntropyFastWarning, match="prompts that were drawn from the data set"):
        trainer.train()
    assert [f.result is not None for f in seen] == [True, True] and seen[1].realised is None


@pytest.mark.exhaustive
def test_the_users_own_responses(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, max_steps=2)
    asked: list[int] = []
    own = HeldOutResponses(trainer)

    def held_out(window: Any, prompts: int) -> Rollouts:
        asked.append(prompts)
        return own(window, 5)

    seen: list[Any] = []
    trainer.add_callback(
        EntropyForecastCallback(
            trainer, budget=None, verify="held_out", held_out=held_out, sample=3, on_forecast=[seen.append]
        )
    )
    trainer.train()
    assert asked == [3, 3] and seen[1].realised.prompts == 5


def test_trainers_whose_responses_are_not_the_models_alone(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    plain = {"tools": None, "train_dataset": [1], "_tokenize_prompts": len}
    for name, value, message in (
        ("tools", [len], "with tools"),
        ("rollout_func", len, "function of its own"),
        ("environment_factories", {None: len}, "an environment"),
        ("_is_vlm", True, "text alone"),
        ("train_dataset", iter([1]), "cannot be drawn from"),
    ):
        with pytest.raises(ConfigError, match=message):
            HeldOutResponses(SimpleNamespace(**{**plain, name: value}))
    trainer.tools = [len]
    with pytest.raises(ConfigError, match="with tools"):
        EntropyForecastCallback(trainer, verify="held_out")
    EntropyForecastCallback(trainer, verify="held_out", held_out=lambda window, prompts: None)
