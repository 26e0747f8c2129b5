"""bitsandbytes' 8-bit Adam from files: against the documented formula, against its own next step, and against 32 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from entropy_fast import EstimateOptions
from entropy_fast.checks.parameter_registry import ParameterRegistry
from entropy_fast.errors import OptimizerStateError
from entropy_fast.step import (
    AdamState,
    adam_state_from_file,
    next_step_of,
    preconditioner_of,
    read_optimizer,
)
from entropy_fast.step.quantized_moments import dequantized_entry

bitsandbytes = pytest.importorskip("bitsandbytes")


class Model(nn.Module):
    """Two matrices of one shape, large enough for codes, and a vector that bitsandbytes keeps in 32 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(80, 60), nn.Linear(80, 60)
        generator = torch.Generator().manual_seed(1)
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=generator))


def gradients(model: nn.Module, seed: int, spread: float) -> list[Tensor]:
    """Magnitudes over some orders of ten, as an element's own: they stay from step to step."""
    generator, sizes = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    return [
        torch.randn(p.shape, generator=generator) * torch.exp(spread * torch.randn(p.shape, generator=sizes))
        for p in model.parameters()
    ]


def stepped(kind: Any, spread: float = 1.0, steps: int = 10, **options: Any) -> tuple[Model, torch.optim.Optimizer]:
    """Two groups, the last parameters first."""
    model = Model()
    named = list(model.named_parameters())
    groups = [{"params": named[:1:-1], "lr": 3e-3}, {"params": named[1::-1]}]
    optimizer: torch.optim.Optimizer = kind(groups, lr=1e-3, betas=(0.8, 0.95), weight_decay=0.1, **options)
    for step in range(steps):
        for p, g in zip(model.parameters(), gradients(model, step, spread), strict=True):
            p.grad = g
        optimizer.step()
    return model, optimizer


def saved(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, by_name: bool = False) -> Path:
    content = get_optimizer_state_dict(model, optimizer) if by_name else optimizer.state_dict()
    torch.save(content, folder / "optimizer.pt")
    return folder / "optimizer.pt"


def by_formula(entry: dict[str, Any], number: int, block: int = 256) -> Tensor:
    codes, table, scales = (entry[f"{key}{number}"] for key in ("state", "qmap", "absmax"))
    flat = table[codes.reshape(-1).long()]
    return (flat * scales.repeat_interleave(block)[: flat.numel()]).reshape(codes.shape)


@pytest.mark.parametrize("by_name", [False, True])
def test_moments_are_table_times_scale(tmp_path: Path, by_name: bool) -> None:
    model, optimizer = stepped(bitsandbytes.optim.AdamW8bit)
    found = adam_state_from_file(saved(model, optimizer, tmp_path, by_name), model)
    assert [group.learning_rate for group in found.groups] == [3e-3, 1e-3]
    for name, p in model.named_parameters():
        entry, moments = optimizer.state[p], found.moments[name]
        eight_bit = p.dim() == 2
        assert (entry["state1"].dtype == torch.uint8) == eight_bit
        assert torch.equal(moments.second_moment, by_formula(entry, 2) if eight_bit else entry["state2"])
        assert moments.first_moment is not None
        assert torch.equal(moments.first_moment, by_formula(entry, 1) if eight_bit else entry["state1"])
        assert moments.step == 10 and found.group_of[name] == (0 if name.startswith("second") else 1)
    codes, whose = sorted(found.notes, key=lambda note: "LAMB" in note)
    assert "second moments of 2 parameters are bitsandbytes' codes of 8 bits" in codes and "9600 elements" in codes
    assert "does not say whether Adam, AdamW or LAMB" in whose


@given(st.integers(1, 5000), st.sampled_from([256, 2048]), st.integers(0, 2**32))
def test_any_number_of_codes_in_blocks_of_either_size(count: int, block: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    entry: dict[str, Any] = {"step": 3}
    for number in (1, 2):
        entry[f"state{number}"] = torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)
        entry[f"qmap{number}"] = bitsandbytes.functional.create_dynamic_map(signed=number == 1)
        entry[f"absmax{number}"] = torch.rand(-(-count // block), generator=generator)
    found = dequantized_entry("w", entry)
    assert found.keys() == {"step", "state1", "state2"}
    for number in (1, 2):
        assert torch.equal(found[f"state{number}"], by_formula(entry, number, block))


@pytest.mark.parametrize("at_zero", [True, False])
@pytest.mark.parametrize("kind", ["Adam8bit", "AdamW8bit", "PagedAdamW8bit", "AdamW32bit"])
def test_the_next_step_is_bitsandbytes_own(tmp_path: Path, kind: str, at_zero: bool) -> None:
    """At θ = 0, where fp32 does not round the step away, and elsewhere, where there is decay."""
    model, optimizer = stepped(getattr(bitsandbytes.optim, kind), spread=3.0)
    for p in model.parameters():
        p.data.mul_(0.0 if at_zero else 1.0)
    estimate = EstimateOptions(step="next")
    at_hand = read_optimizer(saved(model, optimizer, tmp_path), model, any_kind=True)
    registry = ParameterRegistry.build(model, at_hand.state.group_of)
    step = next_step_of(at_hand, registry, preconditioner_of(at_hand, registry, estimate, next_step=True), estimate)
    own = gradients(model, 77, 3.0)
    found = [sum(parts.values(), torch.zeros(())) for parts in step.of(own) if parts is not None]
    before = [p.detach().clone() for p in model.parameters()]
    for p, g in zip(model.parameters(), own, strict=True):
        p.grad = g
    optimizer.step()
    for moved, p, was in zip(found, model.parameters(), before, strict=True):
        real = p.detach().double() - was.double()
        rounding = torch.finfo(torch.float32).eps * (was.double().abs() + real.abs())  # in the decay, and in the step
        assert bool(((moved.double() - real).abs() <= 2 * rounding + 1e-6 * real.abs().max()).all())


def geometry(state: AdamState, model: nn.Module, vectors: list[Tensor]) -> Tensor:
    registry = ParameterRegistry.build(model, state.group_of)
    found = preconditioner_of(
        read_optimizer(state, model, any_kind=False), registry, EstimateOptions(), next_step=False
    ).apply_preconditioner(vectors)
    return torch.cat([piece.double().flatten() for piece in found])


def test_beside_a_run_in_32_bits_the_geometry_is_that_of_codes(tmp_path: Path) -> None:
    """How far 8 bits are from 32 after ten steps on the same gradients; a code is known to a few percent of a moment."""
    model, optimizer = stepped(bitsandbytes.optim.AdamW8bit)
    eight = adam_state_from_file(saved(model, optimizer, tmp_path), model)
    twin, reference = stepped(torch.optim.AdamW)
    vectors = gradients(model, 5, 1.0)
    gap = geometry(eight, model, vectors) - (
        whole := geometry(AdamState.from_optimizer(reference, twin), twin, vectors)
    )
    assert 1e-3 < gap.norm() / whole.norm() < 0.1


def in_codes(moment: Tensor, table: Tensor, block: int = 256) -> tuple[Tensor, Tensor]:
    """The nearest code of every element, as bitsandbytes' kernels for GPUs find it; those for CPUs never give the lowest."""
    flat = nn.functional.pad(moment.flatten(), (0, -moment.numel() % block)).view(-1, block)
    scales = flat.abs().amax(1)
    nearest = ((flat / scales[:, None])[..., None] - table).abs().argmin(-1)
    return nearest.flatten()[: moment.numel()].view(moment.shape).to(torch.uint8), scales


def test_moments_far_below_their_blocks_largest_count_as_none(tmp_path: Path) -> None:
    model, optimizer = stepped(bitsandbytes.optim.AdamW8bit, steps=1)
    _, reference = stepped(torch.optim.AdamW, spread=3.0)
    own = list(reference.state.values())
    content = optimizer.state_dict()
    expected = 0
    for entry, wide in zip((content["state"][1], content["state"][3]), (own[1], own[3]), strict=True):
        inside = entry["__bnb_optimizer_quant_state__"]
        inside["state2"], inside["absmax2"] = in_codes(wide["exp_avg_sq"].view(inside["state2"].shape), inside["qmap2"])
        expected += int((inside["state2"] == 0).sum())
    torch.save(content, tmp_path / "optimizer.pt")
    found = adam_state_from_file(tmp_path / "optimizer.pt", model)
    assert 100 < expected < 9000
    (note,) = [note for note in found.notes if "codes of 8 bits" in note]
    assert f"{expected / 9600:.2%} of their 9600 elements are at code 0" in note
    registry = ParameterRegistry.build(model, found.group_of)
    step = preconditioner_of(read_optimizer(found, model, any_kind=False), registry, EstimateOptions(), next_step=False)
    assert step.excluded([torch.ones_like(p) for p in model.parameters()]).zero_moment == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.pop("absmax2"), "expected codes 'state2' in uint8"),
        (lambda e: e.update(qmap1=None), "expected codes 'state1' in uint8"),
        (lambda e: e.update(state1=e["state1"].float()), "expected codes 'state1' in uint8"),
        (lambda e: e.update(absmax2=e["absmax2"][:-1]), r"scales 'absmax2' of shape \[18\] do not fit 4800 codes"),
        (lambda e: e.update(absmax2=-e["absmax2"]), "or are no possible numbers"),
        (lambda e: e.update(absmax1=e["absmax1"] * float("nan")), "or are no possible numbers"),
        (lambda e: e.update(qmap2=e["qmap2"][:255]), r"table 'qmap2' of shape \[255\]"),
        (lambda e: e.update(qmap2=e["qmap1"]), "or are no possible numbers"),
        (lambda e: e.update(qmap1=e["qmap1"] / 0), "or are no possible numbers"),
        (lambda e: e.update(state2=e["state2"][:, :79]), "do not fit 4740 codes|has shape"),
    ],
)
def test_codes_that_cannot_be_read_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    model, optimizer = stepped(bitsandbytes.optim.AdamW8bit, steps=1)
    content = get_optimizer_state_dict(model, optimizer)
    change(content["state"]["first.weight"]["__bnb_optimizer_quant_state__"])
    torch.save(content, tmp_path / "optimizer.pt")
    with pytest.raises(OptimizerStateError, match=message):
        adam_state_from_file(tmp_path / "optimizer.pt", model)


def test_codes_without_bitsandbytes_say_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    model, optimizer = stepped(bitsandbytes.optim.AdamW8bit, steps=1)
    path = saved(model, optimizer, tmp_path)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(OptimizerStateError, match="is 8-bit, and bitsandbytes, which reads it, cannot be imported"):
        adam_state_from_file(path, model)


@pytest.mark.parametrize("kind", ["Lion8bit", "RMSprop8bit", "Adagrad8bit", "AdEMAMix8bit"])
def test_other_optimizers_in_8_bits_are_refused(tmp_path: Path, kind: str) -> None:
    model = Model()
    optimizer = getattr(bitsandbytes.optim, kind)(model.parameters(), lr=1e-3)
    for p, g in zip(model.parameters(), gradients(model, 0, 1.0), strict=True):
        p.grad = g
    optimizer.step()
    called = "AdEMAMix" if "AdEMAMix" in kind else "an optimizer with one state"
    with pytest.raises(OptimizerStateError, match=f"that of {called}.*, which is not read from a file") as refusal:
        adam_state_from_file(saved(model, optimizer, tmp_path), model)
    assert "give the live optimizer" in refusal.value.fix
