"""The step an optimizer will take, against the one it does take, on every optimizer that can be had.

A model of a few tensors is stepped several times with random gradients; then the next step is asked for, and taken.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from entropy_fast import EstimateOptions
from entropy_fast.checks.parameter_registry import ParameterRegistry
from entropy_fast.errors import ConfigError, LearningRateError, OptimizerStateError
from entropy_fast.step import NextStep, next_step_of, preconditioner_of, read_optimizer
from entropy_fast.step.next_step import clip_factor

Make = Callable[[nn.Module], torch.optim.Optimizer]


class Model(nn.Module):
    """A matrix, a vector, and a matrix that is used last."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, shape in (("a", (5, 7)), ("b", (6,)), ("c", (3, 4))):
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)))


def groups(model: nn.Module, **second: Any) -> list[dict[str, Any]]:
    a, b, c = model.parameters()
    return [{"params": [a, b]}, {"params": [c], "lr": 3e-4, **second}]


def adam(kind: type[torch.optim.Optimizer], **options: Any) -> Make:
    return lambda model: kind(groups(model, betas=(0.8, 0.95)), **{"lr": 1e-3, **options})  # type: ignore[call-arg]


LINEAR: dict[str, Make] = {
    "adamw": adam(torch.optim.AdamW, weight_decay=0.1),
    "adam": adam(torch.optim.Adam),
    "adam with L2": adam(torch.optim.Adam, weight_decay=0.1),
    "amsgrad": adam(torch.optim.AdamW, amsgrad=True),
    "amsgrad with L2": adam(torch.optim.Adam, amsgrad=True, weight_decay=0.1),
    "ascending": adam(torch.optim.AdamW, maximize=True, weight_decay=0.1),
    "ascending with L2": adam(torch.optim.Adam, maximize=True, weight_decay=0.1),
    "foreach": adam(torch.optim.AdamW, foreach=True),
    "fused": adam(torch.optim.AdamW, fused=True),
    "tensor lr": adam(torch.optim.AdamW, lr=torch.tensor(1e-3, dtype=torch.float64)),
    "sgd": lambda m: torch.optim.SGD(groups(m), lr=0.1, weight_decay=0.1),
    "momentum": lambda m: torch.optim.SGD(groups(m), lr=0.1, momentum=0.9, weight_decay=0.1),
    "dampened": lambda m: torch.optim.SGD(groups(m), lr=0.1, momentum=0.9, dampening=0.3),
    "nesterov": lambda m: torch.optim.SGD(
        groups(m, momentum=0.5), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1
    ),
    "ascending sgd": lambda m: torch.optim.SGD(groups(m), lr=0.1, momentum=0.9, maximize=True, weight_decay=0.1),
}


def transformers_adafactor(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    from transformers import Adafactor

    options = {"lr": 1e-3, "relative_step": False, "scale_parameter": False, "weight_decay": 0.1, **options}
    return Adafactor(model.parameters(), **options)


def schedule_free(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = pytest.importorskip("schedulefree").AdamWScheduleFree(groups(model), lr=1e-3, weight_decay=0.1)
    optimizer.train()
    return optimizer  # type: ignore[no-any-return]


def bitsandbytes(kind: str, **options: Any) -> Make:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        found: torch.optim.Optimizer = getattr(pytest.importorskip("bitsandbytes").optim, kind)(
            groups(model), lr=1e-3, **options
        )
        return found

    return make


OTHERS: dict[str, Make] = {
    "muon": lambda m: torch.optim.Muon([m.a, m.c], lr=1e-2, weight_decay=0.1),  # type: ignore[list-item]
    "adafactor": lambda m: torch.optim.Adafactor(groups(m), lr=1e-2, weight_decay=0.1),
    "transformers' adafactor": transformers_adafactor,
    "schedule-free": schedule_free,
    "lion": lambda m: pytest.importorskip("lion_pytorch").Lion(groups(m), lr=1e-3, weight_decay=0.1),
    "nadam": lambda m: torch.optim.NAdam(groups(m), lr=1e-3, weight_decay=0.1),
    "rmsprop": lambda m: torch.optim.RMSprop(groups(m), lr=1e-3, momentum=0.9),
}
# Their states are fp32 or codes of 8 bits, whatever the parameters are.
QUANTIZED: dict[str, Make] = {
    "bnb adamw 8-bit": bitsandbytes("AdamW8bit", min_8bit_size=1, weight_decay=0.1),
    "bnb paged adamw": bitsandbytes("PagedAdamW32bit", weight_decay=0.1),
    "bnb lion": bitsandbytes("Lion", weight_decay=0.1),
}


def stepped(make: Make, steps: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Model, torch.optim.Optimizer]:
    model = Model(dtype)
    optimizer = make(model)
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        fill(model, generator)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def fill(model: nn.Module, generator: torch.Generator) -> list[Tensor]:
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def read(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> NextStep:
    estimate = EstimateOptions(step="next", **options)
    at_hand = read_optimizer(optimizer, model, any_kind=True)
    registry = ParameterRegistry.build(model, at_hand.state.group_of)
    return next_step_of(at_hand, registry, preconditioner_of(at_hand, registry, estimate, next_step=True), estimate)


def taken(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What the optimizer really adds; the model moves."""
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    return [p.detach() - was for p, was in zip(model.parameters(), before, strict=True)]


def total(step: NextStep, gradients: list[Tensor]) -> list[Tensor]:
    return [
        torch.zeros_like(g) if parts is None else sum(parts.values(), torch.zeros((), dtype=g.dtype))
        for parts, g in zip(step.of(gradients), gradients, strict=True)
    ]


def close(found: list[Tensor], expected: list[Tensor], allowed: float) -> None:
    size = torch.cat([e.flatten() for e in expected]).norm()
    gap = torch.cat([(f - e).flatten() for f, e in zip(found, expected, strict=True)]).norm()
    assert gap <= allowed * size


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("name", [*LINEAR, *OTHERS])
def test_parts_add_up_to_the_real_step(name: str, steps: int) -> None:
    model, optimizer = stepped({**LINEAR, **OTHERS}[name], steps)
    gradients = fill(model, torch.Generator().manual_seed(3))
    step = read(model, optimizer)
    found = total(step, gradients)
    assert set(step.parts) >= {"momentum", "decay", "fresh"} and ("scale" in step.parts) == (name in LINEAR)
    close(found, taken(model, optimizer), 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*LINEAR, *OTHERS, *QUANTIZED])
def test_a_dry_run_has_the_bits_of_the_real_step(name: str, dtype: torch.dtype) -> None:
    model, optimizer = stepped({**LINEAR, **OTHERS, **QUANTIZED}[name], dtype=dtype)
    gradients = fill(model, torch.Generator().manual_seed(3))
    found = read(model, optimizer).exactly(gradients)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    for moved, p, was in zip(found, model.parameters(), before, strict=True):
        expected = p.detach().float() - was.float()
        assert torch.equal(torch.zeros_like(expected) if moved is None else moved, expected)


@pytest.mark.parametrize("name", ["adamw", "amsgrad with L2", "nesterov"])
def test_fp32_agrees_to_a_millionth(name: str) -> None:
    model, optimizer = stepped(LINEAR[name], dtype=torch.float32)
    gradients = fill(model, torch.Generator().manual_seed(3))
    wide_model, wide = copy.deepcopy((model, optimizer))
    found = total(read(model, optimizer), gradients)
    wide_model.double()
    for p, g in zip(wide_model.parameters(), gradients, strict=True):
        p.grad = g.double()
        for key, value in wide.state[p].items():
            if isinstance(value, Tensor) and value.dim():
                wide.state[p][key] = value.double()
    close([f.double() for f in found], taken(wide_model, wide), 1e-6)


@pytest.mark.parametrize("name", [*LINEAR, *OTHERS, *QUANTIZED])
def test_nothing_of_the_users_changes(name: str) -> None:
    dtype = torch.float32 if name in QUANTIZED else torch.float64
    model, optimizer = stepped({**LINEAR, **OTHERS, **QUANTIZED}[name], dtype=dtype)
    gradients = fill(model, torch.Generator().manual_seed(3))
    called: list[str] = []
    optimizer.register_step_post_hook(lambda *_: called.append("hook"))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)  # wraps optimizer.step
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    random = torch.get_rng_state()
    step = read(model, optimizer)
    step.of(gradients)
    step.exactly(gradients)
    now = (model.state_dict(), optimizer.state_dict())
    assert not called and torch.equal(torch.get_rng_state(), random)
    assert [p.grad is not None and torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True)]
    assert str(kept[1]["param_groups"]) == str(now[1]["param_groups"])
    flat_kept, flat_now = (torch.utils._pytree.tree_leaves(tree) for tree in (kept, now))
    for was, one in zip(flat_kept, flat_now, strict=True):
        assert torch.equal(was, one) if isinstance(was, Tensor) else was == one or name == "transformers' adafactor"


@pytest.mark.parametrize("size", [1e-6, 1e-8])
def test_adafactors_smallest_root_is_that_of_the_parameters_type(size: float) -> None:
    """Unless ε₁ is given, torch takes it from the parameter's type; gradients of RL are that small. Copies are wider."""
    model = Model(torch.float32)
    optimizer = torch.optim.Adafactor(groups(model), lr=1e-2)
    for seed in range(3):
        for p in fill(model, torch.Generator().manual_seed(seed)) and model.parameters():
            p.grad = p.grad * size if p.grad is not None else None
        optimizer.step()
    gradients = [size * g for g in fill(model, torch.Generator().manual_seed(3))]
    for p, g in zip(model.parameters(), gradients, strict=True):
        p.data.zero_()  # so that θ rounds nothing of the step away
        p.grad = g.clone()
    found = total(read(model, optimizer), gradients)
    close([f.double() for f in found], [m.double() for m in taken(model, optimizer)], 1e-5)


def test_what_gets_no_gradient_stays() -> None:
    model, optimizer = stepped(LINEAR["adamw"])
    gradients: list[Tensor | None] = list(fill(model, torch.Generator().manual_seed(3)))
    model.b.grad = gradients[1] = None  # type: ignore[assignment]
    step = read(model, optimizer)
    assert step.of(gradients)[1] is None and step.exactly(gradients)[1] is None
    assert not taken(model, optimizer)[1].any()


def test_parts_are_what_they_are_called() -> None:
    model, optimizer = stepped(LINEAR["adamw"])
    gradients = fill(model, torch.Generator().manual_seed(3))
    step = read(model, optimizer)
    parts = step.of(gradients)
    doubled = step.of([2 * g for g in gradients])
    for name, own, twice in zip("abc", parts, doubled, strict=True):
        assert own is not None and twice is not None
        p = getattr(model, name)
        group = optimizer.param_groups[name == "c"]
        state, (beta1, beta2) = optimizer.state[p], group["betas"]
        count = float(state["step"])
        denominator = (state["exp_avg_sq"] / (1 - beta2**count)).sqrt() + group["eps"]
        rate = group["lr"] / (1 - beta1 ** (count + 1))
        torch.testing.assert_close(own["momentum"], -rate * beta1 * state["exp_avg"] / denominator, rtol=1e-12, atol=0)
        torch.testing.assert_close(own["decay"], -group["lr"] * group["weight_decay"] * p.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(twice["fresh"], 2 * own["fresh"], rtol=1e-12, atol=0)
        assert torch.equal(own["momentum"], twice["momentum"]) and torch.equal(own["decay"], twice["decay"])


def test_another_rate_scales_all_of_it() -> None:
    for name in ("adamw", "momentum", "rmsprop"):
        model, optimizer = stepped({**LINEAR, **OTHERS}[name])
        gradients = fill(model, torch.Generator().manual_seed(3))
        rate = optimizer.param_groups[0]["lr"]
        own, other = (read(model, optimizer, learning_rate=r) for r in (None, 3 * rate))
        close(total(other, gradients), [3 * moved for moved in total(own, gradients)], 1e-12)
        assert other.dry is None


@pytest.mark.parametrize("name", ["adamw", "amsgrad with L2", "nesterov"])
def test_what_is_computed_with_casts_is_stepped_as_the_optimizer_knows_it(name: str) -> None:
    model, optimizer = stepped(LINEAR[name], dtype=torch.float32)
    gradients = fill(model, torch.Generator().manual_seed(3))
    estimate = EstimateOptions(step="next", gradient="live")
    at_hand = read_optimizer(optimizer, model, any_kind=True)
    values = dict(model.named_parameters())
    narrow = Model().to(torch.bfloat16)
    for own, p in zip(narrow.parameters(), values.values(), strict=True):
        own.data = p.detach().to(torch.bfloat16)
    registry = ParameterRegistry.build(narrow, at_hand.state.group_of)
    of_casts = dataclasses.replace(at_hand, values=values)
    geometry = preconditioner_of(of_casts, registry, estimate, next_step=True)
    found = next_step_of(of_casts, registry, geometry, estimate)
    assert found.live is not None and all(map(torch.equal, found.live, gradients))  # type: ignore[arg-type]
    moved, parts = [own for own in found.exactly(gradients) if own is not None], total(found, gradients)
    assert all(map(torch.equal, parts, total(read(model, optimizer), gradients)))
    real = taken(model, optimizer)
    assert len(moved) == len(real) and all(map(torch.equal, moved, real))


def test_a_file_has_the_same_step(tmp_path: Any) -> None:
    model, optimizer = stepped(LINEAR["amsgrad with L2"])
    gradients = fill(model, torch.Generator().manual_seed(3))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    expected = total(read(model, optimizer), gradients)
    close(total(read(model, tmp_path / "optimizer.pt"), gradients), expected, 1e-14)  # type: ignore[arg-type]


def test_a_file_without_first_moments_is_refused(tmp_path: Any) -> None:
    model, optimizer = stepped(LINEAR["adamw"])
    saved = optimizer.state_dict()
    for entry in saved["state"].values():
        entry["exp_avg"] = entry["exp_avg"] * float("nan")
    torch.save(saved, tmp_path / "optimizer.pt")
    with pytest.raises(OptimizerStateError, match="no usable first ones"):
        read(model, tmp_path / "optimizer.pt")  # type: ignore[arg-type]


def test_what_cannot_step_says_so() -> None:
    model = Model()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1)
    gradients = fill(model, torch.Generator().manual_seed(3))
    with pytest.raises(OptimizerStateError, match="cannot step on copies"):
        read(model, optimizer).of(gradients)
    with pytest.raises(LearningRateError, match="Adafactor has None"):
        read(model, transformers_adafactor(model, lr=None, relative_step=True, warmup_init=True))


def test_what_a_step_changes_beside_its_state_stays() -> None:
    class Counting(torch.optim.SGD):
        def __init__(self, *given: Any, **options: Any) -> None:
            super().__init__(*given, **options)
            self.counts = {"steps": 0}

        def step(self, closure: Any = None) -> Any:
            self.counts["steps"] += 1
            return super().step(closure)

    model = Model()
    optimizer = Counting(model.parameters(), lr=0.1)
    gradients = fill(model, torch.Generator().manual_seed(3))
    read(model, optimizer).of(gradients)
    assert optimizer.counts == {"steps": 0}


def test_a_rate_of_nothing_cannot_be_scaled() -> None:
    model, optimizer = stepped(OTHERS["rmsprop"])
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    with pytest.raises(LearningRateError, match="RMSprop's first group has 0"):
        read(model, optimizer, learning_rate=1e-3)


def test_a_live_gradient_has_to_be_there() -> None:
    model, optimizer = stepped(LINEAR["adamw"])
    with pytest.raises(ConfigError, match="no trainable parameter has a"):
        read(model, optimizer, gradient="live")


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_clipping_is_torch_s(size: float, most: float) -> None:
    parameters = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in (3, 5)]
    for p in parameters:
        p.grad = size * torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = [p.grad.clone() for p in parameters if p.grad is not None]
    factor = clip_factor(gradients, most)
    torch.nn.utils.clip_grad_norm_(parameters, most)
    for p, g in zip(parameters, gradients, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, factor * g, rtol=1e-10, atol=0)
