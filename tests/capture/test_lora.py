"""A linear map and its adapters as one function, against the layer's own forward and autograd; and layers left alone."""

from __future__ import annotations

from collections.abc import Callable

import peft
import pytest
import torch
from torch import Tensor, nn

from entropy_fast.capture import CapturedModules, GradientRecorder
from entropy_fast.capture.lora import lora_linear


class Recorded:
    """Ordinary gradients of what is recorded."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def product(self, name: str, left: Tensor, right: Tensor) -> None:
        assert name not in self.gradients
        self.gradients[name] = left.flatten(0, -2).double().t() @ right.flatten(0, -2).double()


def lora_model(*, bias: bool = True, dtype: torch.dtype = torch.float64, **options: object) -> peft.PeftModel:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5, bias=bias))
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": ["0"], **options})  # type: ignore[arg-type]
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model.to(dtype)


def layer_of(model: peft.PeftModel) -> nn.Module:
    return model.get_submodule("base_model.model.0")


def trained(model: peft.PeftModel) -> dict[int, str]:
    return {id(p): name for name, p in model.named_parameters() if p.requires_grad}


def fused(model: peft.PeftModel, recorder: Recorded) -> Callable[[Tensor], Tensor]:
    captured = lora_linear(layer_of(model), trained(model))
    assert captured is not None
    return captured.maker(layer_of(model).forward, recorder)  # type: ignore[arg-type]


# So few that the low-rank part is added to every output, and so many that the factors are merged into the base.
TOKENS = (4, 40)


def compare(
    model: peft.PeftModel, tolerance: float, autocast: torch.dtype | None = None, tokens: int = TOKENS[0]
) -> set[str]:
    """Hold the fused function against the layer; names of what it recorded."""
    wide = torch.promote_types(torch.float32, layer_of(model).weight.dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, tokens, 6, generator=generator, dtype=torch.float64).to(wide)
    above = torch.randn(2, tokens, 5, generator=generator, dtype=torch.float64)
    recorder = Recorded()
    results = []
    for run in (fused(model, recorder), layer_of(model)):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            output = run(leaf)
        output.backward(above.to(output.dtype))
        assert leaf.grad is not None
        results.append((output.detach(), leaf.grad))
    (output, dx), (plain, plain_dx) = results
    assert (output.dtype, dx.dtype) == (plain.dtype, plain_dx.dtype)
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert recorder.gradients.keys() == own.keys()
    pairs = [(output, plain), (dx, plain_dx), *((recorder.gradients[name], own[name]) for name in own)]
    for found, expected in pairs:
        assert float((found.double() - expected.double()).norm()) <= tolerance * float(expected.double().norm())
    return set(own)


@pytest.mark.parametrize("tokens", TOKENS)
def test_one_adapter(tokens: int) -> None:
    assert len(compare(lora_model(), 1e-13, tokens=tokens)) == 2
    assert len(compare(lora_model(bias=False, use_rslora=True), 1e-13, tokens=tokens)) == 2


@pytest.mark.parametrize("tokens", TOKENS)
def test_several_adapters(tokens: int) -> None:
    model = lora_model()
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=1, target_modules=["0"]))
    for name, parameter in model.named_parameters():
        if "second" in name:
            nn.init.normal_(parameter)
    model.double()
    model.base_model.set_adapter(["default", "second"])
    assert len(compare(model, 1e-13, tokens=tokens)) == 4
    model.base_model.set_adapter(["second"])
    for parameter in model.parameters():
        parameter.grad = None
    assert all("second" in name for name in compare(model, 1e-13, tokens=tokens))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_frozen_factor(factor: str, tokens: int) -> None:
    model = lora_model()
    for name, parameter in model.named_parameters():
        if factor in name:
            parameter.requires_grad_(False)
    (found,) = compare(model, 1e-13, tokens=tokens)
    assert factor not in found


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype, tokens: int) -> None:
    """Products in bf16 and their sums in the dtype of the input, as the layer's own."""
    model = lora_model(dtype=dtype)
    assert len(compare(model, 3 * 2**-8, autocast=torch.bfloat16, tokens=tokens)) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_factors_are_not_lost_beside_a_large_base(dtype: torch.dtype) -> None:
    """Merged in 16 bits, factors a thousand times smaller than the base would be rounded away."""
    model = lora_model(bias=False, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter *= 1e-3
    x = torch.randn(1, TOKENS[1], 6, dtype=torch.float64).to(dtype)
    layer = layer_of(model)
    with torch.no_grad():
        low_rank = fused(model, Recorded())(x).double() - torch.nn.functional.linear(x, layer.weight).double()
        plain = layer(x).double() - torch.nn.functional.linear(x, layer.weight).double()
    assert float((low_rank - plain).norm()) <= 1e-2 * float(plain.norm())


def merged(model: peft.PeftModel) -> None:
    model.merge_adapter()


def disabled(model: peft.PeftModel) -> None:
    model.base_model.disable_adapter_layers()
    for parameter in model.parameters():
        parameter.requires_grad_("lora" in str(trained(model).get(id(parameter), "lora")))


def base_trained(model: peft.PeftModel) -> None:
    layer_of(model).base_layer.weight.requires_grad_()


def hook_on(path: str) -> Callable[[peft.PeftModel], None]:
    def register(model: peft.PeftModel) -> None:
        layer_of(model).get_submodule(path).register_forward_hook(lambda *_: None)

    return register


def pre_hook(model: peft.PeftModel) -> None:
    layer_of(model).lora_A["default"].register_forward_pre_hook(lambda *_: None)


def forward_of_its_own(model: peft.PeftModel) -> None:
    layer_of(model).forward = layer_of(model).forward


def other_dropout(model: peft.PeftModel) -> None:
    layer_of(model).lora_dropout["default"] = nn.AlphaDropout(0.1)


def other_dtype(model: peft.PeftModel) -> None:
    layer_of(model).lora_A.float()
    layer_of(model).lora_B.float()


CHANGES = {
    "merged": merged,
    "disabled": disabled,
    "hook on A": hook_on("lora_A.default"),
    "hook on B": hook_on("lora_B.default"),
    "hook on dropout": hook_on("lora_dropout.default"),
    "pre-hook": pre_hook,
    "forward of its own": forward_of_its_own,
    "other dropout": other_dropout,
}


# The base runs by itself then, hooks and all; only its adapters are one function.
BESIDE_THE_BASE = {
    "trained base": base_trained,
    "hook on the base": hook_on("base_layer"),
    "other dtype": other_dtype,
}


@pytest.mark.parametrize("change", BESIDE_THE_BASE)
def test_a_base_that_does_something_besides_runs_by_itself(change: str) -> None:
    model = lora_model()
    BESIDE_THE_BASE[change](model)
    layer = layer_of(model)
    ran = []
    layer.base_layer.register_forward_hook(lambda *_: ran.append(True))
    captured = lora_linear(layer, trained(model))
    assert captured is not None
    assert id(layer.base_layer) not in captured.stands_for
    x = torch.randn(4, 6, dtype=torch.float64)
    found = captured.maker(layer.forward, GradientRecorder({}, 1, 2))(x)
    assert len(ran) == 1
    torch.testing.assert_close(found, layer(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("change", CHANGES)
def test_layers_that_do_something_besides_are_left_alone(change: str) -> None:
    model = lora_model(lora_dropout=0.1)
    assert lora_linear(layer_of(model), trained(model)) is not None
    CHANGES[change](model)
    assert lora_linear(layer_of(model), trained(model)) is None


@pytest.mark.parametrize("options", [{"lora_bias": True}, {"use_dora": True}], ids=["lora_bias", "DoRA"])
def test_other_kinds_are_left_alone(options: dict[str, object]) -> None:
    model = lora_model(**options)
    assert lora_linear(layer_of(model), trained(model)) is None


def test_parameters_that_may_not_be_captured() -> None:
    model = lora_model()
    names = trained(model)
    assert CapturedModules(model, names).captured == set(names.values())
    # The layer is captured whole or not at all.
    assert CapturedModules(model, names, frozenset(list(names.values())[:1])).captured == set()
    assert lora_linear(nn.Linear(2, 2), names) is None
