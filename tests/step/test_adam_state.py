"""What is read from a live optimizer, and which optimizers are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from probe_oracle.models import stepped_adam
from torch import nn

from entropy_fast.checks.parameter_registry import ParameterRegistry
from entropy_fast.errors import ModelStateError, OptimizerStateError
from entropy_fast.step import AdamPreconditioner, AdamState


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_groups_and_moments_are_the_optimizers(kind: type[torch.optim.Adam]) -> None:
    model = small_model()
    optimizer = stepped_adam(model, kind=kind)
    state = AdamState.from_optimizer(optimizer, model)
    assert [(g.learning_rate, g.beta2, g.eps, g.amsgrad) for g in state.groups] == [
        (1e-3, 0.99, 1e-8, False),
        (3e-3, 0.95, 1e-2, False),
        (5e-4, 0.9, 1e-6, True),
    ]
    named = dict(model.named_parameters())
    assert {name: state.group_of[name] for name in named} == {name: i % 3 for i, name in enumerate(named)}
    for index, (name, parameter) in enumerate(named.items()):
        entry = optimizer.state[parameter]
        key = "max_exp_avg_sq" if index % 3 == 2 else "exp_avg_sq"
        assert torch.equal(state.moments[name].second_moment, entry[key])
        assert state.moments[name].step == (3 if index % 2 else 4)
        assert isinstance(state.moments[name].step, float)


def test_a_wrapper_as_accelerate_makes_it_is_looked_through() -> None:
    model = small_model()
    inner = stepped_adam(model)

    class Wrapper(torch.optim.Optimizer):
        """Like accelerate's AcceleratedOptimizer: a torch Optimizer by type, that keeps the real one inside."""

        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    found = AdamState.from_optimizer(Wrapper(inner), model)
    assert found.groups == AdamState.from_optimizer(inner, model).groups
    assert set(found.moments) == {name for name, _ in model.named_parameters()}


def test_the_wrapper_of_accelerate_itself() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = small_model()
    inner = stepped_adam(model)
    try:
        wrapped = accelerate.Accelerator(cpu=True).prepare_optimizer(inner)
        assert wrapped is not inner
        assert AdamState.from_optimizer(wrapped, model).group_of == AdamState.from_optimizer(inner, model).group_of
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_parameters_of_other_models_and_missing_ones_are_told_apart() -> None:
    model, other = small_model(), nn.Linear(2, 2)
    parameters = [*other.parameters(), *model[1].parameters()]  # type: ignore[index]
    state = AdamState.from_optimizer(torch.optim.AdamW(parameters), model)
    assert dict(state.group_of) == {"1.weight": 0, "1.bias": 0}
    assert dict(state.moments) == {}


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(OptimizerStateError, match="none of the model's parameters"):
        AdamState.from_optimizer(torch.optim.AdamW(nn.Linear(2, 2).parameters()), small_model())


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adamax])
def test_other_optimizers_are_refused_by_name(kind: Any) -> None:
    model = small_model()
    with pytest.raises(OptimizerStateError, match=kind.__name__):
        AdamState.from_optimizer(kind(model.parameters(), lr=1e-3), model)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("exp_avg_sq", torch.zeros(3), r"'0\.weight' has shape \[3\], the parameter \[4, 3\]"),
        ("exp_avg_sq", None, r"'0\.weight' has keys .*expected 'exp_avg_sq' and 'step'"),
        ("exp_avg_sq", torch.full((4, 3), torch.nan), "12 second moments that are not finite"),
        ("step", None, "expected 'exp_avg_sq' and 'step'"),
        ("step", torch.ones(2), "expected 'exp_avg_sq' and 'step'"),
        ("step", torch.tensor(0.0), r"has step 0\.0"),
        ("step", torch.tensor(torch.inf), "has step inf"),
    ],
)
def test_damaged_state_is_refused_and_the_parameter_named(key: str, value: Any, message: str) -> None:
    model = small_model()
    optimizer = stepped(model, torch.optim.AdamW(model.parameters()))
    optimizer.state[next(model.parameters())][key] = value
    with pytest.raises(OptimizerStateError, match=message):
        AdamState.from_optimizer(optimizer, model)


@pytest.mark.parametrize("step", [7, 7.0, torch.tensor(7.0), torch.tensor([7])])
def test_every_form_in_which_a_step_count_is_kept(step: Any) -> None:
    model = small_model()
    optimizer = stepped(model, torch.optim.AdamW(model.parameters()))
    optimizer.state[next(model.parameters())]["step"] = step
    assert AdamState.from_optimizer(optimizer, model).moments["0.weight"].step == 7


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_a_scaler_skips_leaves_no_moments(fused: bool) -> None:
    """A fused optimizer is called all the same, and makes its state: step 0, and nothing in it."""
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.full((1, 3), torch.inf)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert bool(optimizer.state) == fused
    found = AdamState.from_optimizer(optimizer, model)
    assert not found.moments and set(found.group_of) == {name for name, _ in model.named_parameters()}
    # Once it has stepped, another that is skipped changes nothing.
    stepped(model, optimizer)
    assert AdamState.from_optimizer(optimizer, model).moments["0.weight"].step == 1


def test_a_compiled_or_data_parallel_wrapper_does_not_change_names() -> None:
    model = small_model()
    optimizer = stepped_adam(model)
    compiled = torch.compile(model, backend="eager")
    assert AdamState.from_optimizer(optimizer, compiled).group_of == AdamState.from_optimizer(optimizer, model).group_of  # type: ignore[arg-type]


def test_deepspeed_is_refused_by_its_name_also_inside_a_wrapper() -> None:
    """As DeepSpeed has it: not a torch optimizer by type, with a torch one of flattened copies inside."""
    model = small_model()
    kind = type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})
    zero, wrapper = kind(), torch.optim.AdamW(model.parameters())
    zero.optimizer = stepped(model, torch.optim.AdamW(model.parameters()))
    wrapper.optimizer = zero  # type: ignore[attr-defined]
    with pytest.raises(
        OptimizerStateError, match=r"a deepspeed\.runtime\.zero\.stage_1_and_2\.DeepSpeedZeroOptimizer: "
    ):
        AdamState.from_optimizer(zero, model)
    kind = type("DeepSpeedOptimizerWrapper", (type(wrapper),), {"__module__": "accelerate.utils.deepspeed"})
    with pytest.raises(OptimizerStateError, match="DeepSpeedOptimizerWrapper: DeepSpeed keeps"):
        AdamState.from_optimizer(kind(model.parameters()), model)


def test_a_model_under_fsdp1_is_refused_by_its_name() -> None:
    """Its optimizer is torch's, over flattened shards (or views of them, under the parameters' own names)."""
    inner = small_model()
    optimizer = stepped(inner, torch.optim.AdamW(inner.parameters()))
    kind = type("FullyShardedDataParallel", (nn.Sequential,), {"__module__": "torch.distributed.fsdp"})
    with pytest.raises(ModelStateError, match=r"torch\.distributed\.fsdp\.FullyShardedDataParallel.*flattened shards"):
        AdamState.from_optimizer(optimizer, nn.Sequential(kind(*inner)))


def test_bitsandbytes_is_told_which_kinds_are_read() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = small_model()
    for kind in ("AdamW8bit", "PagedAdamW32bit", "Lion"):
        with pytest.raises(
            OptimizerStateError,
            match=rf"{kind}: .* not read live\. Adam and AdamW with 32-bit or 8-bit states .* from a file",
        ):
            AdamState.from_optimizer(getattr(bitsandbytes.optim, kind)(model.parameters(), lr=1e-3), model)


def test_the_identity_state_leaves_gradients_as_they_are() -> None:
    model = small_model()
    model[0].bias.requires_grad_(False)  # type: ignore[union-attr]
    state = AdamState.identity(model)
    preconditioner = AdamPreconditioner(state, ParameterRegistry.build(model, state.group_of))
    gradients = [torch.randn_like(p) for p in model.parameters() if p.requires_grad]
    for found, gradient in zip(preconditioner.apply_preconditioner(gradients), gradients, strict=True):
        assert torch.equal(found, gradient)
    assert preconditioner.excluded(gradients).share == 0
