"""``optimizer.pt`` of real runs of transformers' Trainer, and ``optimizer.bin`` of accelerate, against the live optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from entropy_fast import EstimateOptions
from entropy_fast.checks.parameter_registry import ParameterRegistry
from entropy_fast.step import (
    AdamState,
    adam_state_from_file,
    next_step_of,
    optimizer_from_file,
    preconditioner_of,
    read_optimizer,
)

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


class Regression(nn.Module):
    """Matrices of one shape with biases and a norm between them: Trainer puts them into two groups."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(72, 72, dtype=dtype) for _ in range(2)])
        self.norm = nn.LayerNorm(72, dtype=dtype)
        generator = torch.Generator().manual_seed(1)
        for p in self.parameters():
            p.data.copy_(0.1 * torch.randn(p.shape, generator=generator, dtype=dtype))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        out = self.norm(torch.tanh(self.layers[1](torch.tanh(self.layers[0](x)))))
        return {"loss": out.square().mean(), "logits": out}


def trained(folder: Path, optim: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Path]:
    """The trainer after two steps, and what it saved."""
    generator = torch.Generator().manual_seed(2)
    data = [{"x": torch.randn(72, generator=generator, dtype=dtype), "labels": torch.zeros(1)} for _ in range(8)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        optim=optim,
        max_steps=2,
        save_steps=2,
        per_device_train_batch_size=4,
        weight_decay=0.1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=Regression(dtype), args=arguments, train_dataset=data)
    trainer.train()
    return trainer, folder / "checkpoint-2" / "optimizer.pt"


def parts_of(model: nn.Module, given: Any, gradients: list[Tensor]) -> list[Tensor]:
    at_hand = read_optimizer(given, model, any_kind=True)
    registry = ParameterRegistry.build(model, at_hand.state.group_of)
    estimate = EstimateOptions(step="next")
    step = next_step_of(at_hand, registry, preconditioner_of(at_hand, registry, estimate, next_step=True), estimate)
    return [sum(parts.values(), torch.zeros(())) for parts in step.of(gradients) if parts is not None]


def random_gradients(model: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [1e-3 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()]


def taken(model: nn.Module, optimizer: Any, gradients: list[Tensor]) -> list[Tensor]:
    before = [p.detach().clone() for p in model.parameters()]
    for p, g in zip(model.parameters(), gradients, strict=True):
        p.grad = g.clone()
    optimizer.step()
    return [p.detach() - was for p, was in zip(model.parameters(), before, strict=True)]


@pytest.mark.parametrize(
    "optim", ["adafactor", *(pytest.param(optim, marks=pytest.mark.exhaustive) for optim in ("adamw_torch", "sgd"))]
)
def test_trainers_optimizer_pt(tmp_path: Path, optim: str) -> None:
    trainer, path = trained(tmp_path, optim)
    model, optimizer = trainer.model, trainer.optimizer
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 4]
    assert optimizer_from_file(path, model).is_adam == (optim == "adamw_torch")
    # SGD without momentum has no state, whose shapes would tell which order it is.
    assert ["order was guessed" in note for note in optimizer_from_file(path, model).state.notes] == [True] * (
        optim == "sgd"
    )
    gradients = random_gradients(model)
    found = parts_of(model, path, gradients)
    for moved, real in zip(found, taken(model, optimizer, gradients), strict=True):
        assert (moved - real).norm() <= 1e-11 * real.norm() > 0


@pytest.mark.exhaustive
def test_trainers_optimizer_pt_in_8_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    trainer, path = trained(tmp_path, "adamw_bnb_8bit", torch.float32)
    model = trainer.model
    notes = adam_state_from_file(path, model).notes
    assert any("second moments of 2 parameters are bitsandbytes' codes of 8 bits" in note for note in notes)
    gradients = random_gradients(model)
    found = parts_of(model, path, gradients)
    for moved, real in zip(found, taken(model, trainer.optimizer, gradients), strict=True):
        assert (moved - real).norm() <= 1e-4 * real.norm() > 0  # what fp32 rounds of θ, of which a step is a hundredth


@pytest.mark.parametrize("named", [True, False])
def test_accelerates_optimizer_bin(tmp_path: Path, named: bool) -> None:
    """Two groups, the second layer first, whose shapes are those of the model's order."""
    from accelerate import Accelerator

    accelerator, plain = Accelerator(cpu=True), Regression(torch.float64)
    pairs = list(plain.named_parameters())
    own = [*pairs[2:4], *pairs[:2], *pairs[4:]]
    listed: Any = own if named else [p for _, p in own]
    optimizer = torch.optim.AdamW([{"params": listed[:2], "lr": 3e-3}, {"params": listed[2:]}], lr=1e-3)
    model, optimizer = accelerator.prepare(plain, optimizer)
    taken(model, optimizer, random_gradients(model))
    accelerator.save_state(str(tmp_path / "saved"))
    found = adam_state_from_file(tmp_path / "saved" / "optimizer.bin", model)
    live = AdamState.from_optimizer(optimizer, model)
    if not named:
        assert "order was guessed" in found.notes[0] and dict(found.group_of) != dict(live.group_of)
        return
    assert found.notes == () and dict(found.group_of) == dict(live.group_of) and found.groups == live.groups
    for name, expected in live.moments.items():
        assert torch.equal(found.moments[name].second_moment, expected.second_moment)
