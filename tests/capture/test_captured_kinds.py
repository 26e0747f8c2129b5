"""Every kind of parameter that is captured: exact on every way through a microbatch, with nothing on the slower path.

Legend: A and B factors of an adapter, s its scaling, W the base weight.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator

import peft
import pytest
import torch
from engine_sums import Observed, assert_same_estimate, assert_same_sums, median_error, observe, ratio_of, relative
from exactness import BATCHES, BUDGET, CHECKPOINTING, batch_of_every_kind, checkpointed
from probe_models.adapters import ia3_over, lora_over, with_adapter
from probe_models.architectures import build_model, quantize_nf4, stepped_adamw
from probe_models.batches import pack
from probe_models.own_dtype import computing_in_own_dtype
from refused_ways import refuse
from torch import Tensor, nn

from entropy_fast import Rollouts
from entropy_fast.capture import CapturedModules
from entropy_fast.capture.dora import dora_magnitude
from entropy_fast.capture.lora import lora_linear
from entropy_fast.errors import EntropyFastWarning
from entropy_fast.step import AdamState
from entropy_fast.ways.packed import PackedWay
from entropy_fast.ways.padded import HiddenStatesWay

ATTENTION_AND_MLP = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"], "opt": ["q_proj", "fc1"]}
ON_EMBEDDINGS = ["embed_tokens", "q_proj"]

KINDS: dict[str, Callable[[], nn.Module]] = {
    "learned positions": lambda: build_model("opt", dtype=torch.float64),
    "scaled embeddings": lambda: build_model("gemma3", dtype=torch.float64),
    "dora": lambda: lora_over("llama", use_dora=True, target_modules=ATTENTION_AND_MLP["llama"]),
    "dora, biases": lambda: lora_over("opt", use_dora=True, target_modules=ATTENTION_AND_MLP["opt"]),
    "dora, transposed": lambda: lora_over("gpt2", use_dora=True, target_modules=ATTENTION_AND_MLP["gpt2"]),
    "transposed": lambda: lora_over("gpt2", target_modules=ATTENTION_AND_MLP["gpt2"]),
    "trained biases": lambda: lora_over("opt", bias="all", target_modules=ATTENTION_AND_MLP["opt"]),
    "biases of adapted maps": lambda: lora_over("gpt2", bias="lora_only", target_modules=["c_attn"]),
    "adapters with biases": lambda: lora_over("llama", lora_bias=True, target_modules=["q_proj"]),
    "adapted embeddings": lambda: lora_over("llama", target_modules=ON_EMBEDDINGS),
    "adapted scaled embeddings": lambda: lora_over("gemma3", target_modules=ON_EMBEDDINGS),
    "adapted embeddings with padding": lambda: lora_over("opt", target_modules=ON_EMBEDDINGS),
    "dora on embeddings": lambda: lora_over("llama", use_dora=True, target_modules=ON_EMBEDDINGS),
    "dora on scaled embeddings": lambda: lora_over("gemma3", use_dora=True, target_modules=ON_EMBEDDINGS),
    "modules to save": lambda: lora_over("llama", target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
    "ia3": lambda: ia3_over("llama"),
    "ia3, transposed": lambda: ia3_over("gpt2"),
}


@contextlib.contextmanager
def no_slower_path() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*one-pass engine does not know.*", category=EntropyFastWarning)
        yield


def with_padding_tokens(seed: int = 5) -> Rollouts:
    """Four prompts; some responses hold the token that several families keep out of the gradient of their embeddings."""
    samples = BATCHES["uneven groups"](seed)
    mixed = [dataclasses.replace(s, response=(0, *s.response[1:])) if i % 3 else s for i, s in enumerate(samples)]
    return pack(mixed, max_lengths=BUDGET)


def way_of(observed: Observed) -> str:
    plan = observed.result.diagnostics.plan
    assert plan is not None
    return plan.way


@pytest.mark.parametrize("kind", KINDS)
def test_exact_on_every_way(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = KINDS[kind]()
    optimizer = stepped_adamw(model)
    rollouts = with_padding_tokens()
    with computing_in_own_dtype(model):
        expected = observe("two_pass", model, optimizer, rollouts)
        for refused, way in (
            ((), "packed"),
            ((PackedWay,), "whole sequences"),
            ((HiddenStatesWay,), "whole sequences, the model's own logits"),
        ):
            refuse(monkeypatch, *refused)
            with no_slower_path():
                found = observe("one_pass", model, optimizer, rollouts)
            assert way_of(found).startswith(way)
            assert_same_sums(found, expected, 1e-10)
            assert_same_estimate(found, expected, 1e-10)


@pytest.mark.parametrize("how", CHECKPOINTING[1:])
@pytest.mark.parametrize("kind", ["dora", "adapted scaled embeddings", "dora on embeddings", "ia3"])
def test_exact_with_checkpointing(kind: str, how: str) -> None:
    """Forwards run a second time within the backward."""
    model = KINDS[kind]()
    optimizer = stepped_adamw(model)
    rollouts = with_padding_tokens()
    with computing_in_own_dtype(model), checkpointed(model, how):
        with no_slower_path():
            found = observe("one_pass", model, optimizer, rollouts)
        expected = observe("two_pass", model, optimizer, rollouts)
    assert_same_sums(found, expected, 1e-10)
    assert_same_estimate(found, expected, 1e-10)


def test_under_autocast_rounds_no_more_than_the_reference() -> None:
    """Against fp64 of the same weights, two batches a kind.

    Ratios of errors spread as in `test_exactness_matrix`, with four prompts by less than 0.4 (0.34 in 17 draws): 1.5 for 34
    draws is six standard errors away.
    """
    errors: dict[str, list[float]] = {"one_pass": [], "two_pass": []}
    for build in KINDS.values():
        model = build().float()
        state = AdamState.from_optimizer(stepped_adamw(model), model)
        wide = copy.deepcopy(model).double()
        for seed in (5, 6):
            rollouts = with_padding_tokens(seed)
            with computing_in_own_dtype(wide):
                truth = observe("two_pass", wide, state, rollouts)
            for engine, found in errors.items():
                with no_slower_path():
                    result = observe(engine, model, state, rollouts, autocast_dtype=torch.bfloat16)
                found.append(median_error(result.kernel, truth.kernel))
    assert min(errors["two_pass"]) > 1e-6  # it really computes in bf16
    assert ratio_of(errors) <= 1.5, errors


SLOWER: dict[str, Callable[[], nn.Module]] = {
    # The layer takes the bias off again outside of the map that adds it.
    "dora, trained biases": lambda: lora_over("opt", use_dora=True, bias="lora_only", target_modules=["q_proj"]),
    "rows of a table": lambda: lora_over("llama", target_modules=["q_proj"], trainable_token_indices=[3, 5, 7]),
}


@pytest.mark.parametrize("kind", SLOWER)
def test_exact_on_the_slower_path(kind: str) -> None:
    model = SLOWER[kind]()
    optimizer = stepped_adamw(model)
    rollouts = with_padding_tokens()
    with computing_in_own_dtype(model):
        with pytest.warns(EntropyFastWarning, match="does not know"):
            found = observe("one_pass", model, optimizer, rollouts)
        expected = observe("two_pass", model, optimizer, rollouts)
    assert_same_sums(found, expected, 1e-10)
    assert_same_estimate(found, expected, 1e-10)


class _Sum:
    """Adds signals up over rows and positions."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def per_position(self, name: str, values: Tensor) -> None:
        self.found[name] = values.flatten(0, -2).sum(0)

    def product(self, name: str, left: Tensor, right: Tensor) -> None:
        self.found[name] = left.flatten(0, -2).t() @ right.flatten(0, -2)


@pytest.mark.parametrize("hooked", [False, True], ids=["with its base", "added to its base"])
def test_wide_adapters_compute_in_their_own_dtype(hooked: bool) -> None:
    """A base in bf16 rounds what it gives, not what its adapters in fp32 learn from."""
    model = wide_adapters_over_bf16(0)
    layer = next(m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear))
    if hooked:
        layer.base_layer.register_forward_hook(lambda *_: None)
    factors = {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}
    captured = lora_linear(layer, {id(p): name for name, p in factors.items()})
    assert captured is not None
    recorder = _Sum()
    x = torch.randn(2, 9, layer.in_features).bfloat16().requires_grad_()
    above = torch.randn(2, 9, layer.out_features).bfloat16()
    outputs, of_input = [], []
    for forward in (layer.forward, captured.maker(layer.forward, recorder)):
        outputs.append(forward(x))
        assert outputs[-1].dtype == torch.bfloat16
        found = torch.autograd.grad(outputs[-1], [x, *factors.values()], above, allow_unused=True)
        of_input.append(found[0])
        if forward == layer.forward:
            expected = dict(zip(factors, found[1:], strict=True))
        else:
            assert found[1:] == (None, None)
    assert relative(outputs[1], outputs[0]) < 2**-8
    assert relative(of_input[1], of_input[0]) < 2**-8
    for name, gradient in expected.items():
        assert relative(recorder.found[name], gradient) < 1e-6, name


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("base_given", [False, True])
def test_magnitude_against_the_module_itself(base_given: bool, transposed: bool) -> None:
    """With the base's result at hand and, as peft has it under dropout, without."""
    family, target = ("gpt2", "c_attn") if transposed else ("opt", "q_proj")
    model = lora_over(family, use_dora=True, target_modules=[target])
    layer = next(m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear))
    magnitude = layer.lora_magnitude_vector["default"]
    options = {"lora_A": layer.lora_A["default"], "lora_B": layer.lora_B["default"], "scaling": 2.0}
    x = torch.randn(2, 3, layer.in_features, dtype=torch.float64, requires_grad=True)
    above = torch.randn(2, 3, layer.out_features, dtype=torch.float64)
    recorder = _Sum()
    captured = dora_magnitude(magnitude, {id(magnitude.weight): "m"})
    assert captured is not None
    outputs, gradients = [], []
    for forward in (magnitude.forward, captured.maker(magnitude.forward, recorder)):
        base_result = layer.base_layer(x) if base_given else None
        output = forward(x, base_layer=layer.base_layer, base_result=base_result, **options)
        outputs.append(output)
        gradients.append(torch.autograd.grad(output, [x, magnitude.weight], above, allow_unused=True))
    assert gradients[1][1] is None
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients[1][0], gradients[0][0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(recorder.found["m"], gradients[0][1], rtol=1e-12, atol=1e-12)


class _OwnPositions(nn.Module):
    """A model that counts positions itself, the same for all rows: its look-up is one row, broadcast over the batch."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        del position_ids
        return self.base(input_ids=input_ids, attention_mask=attention_mask).logits


def test_positions_broadcast_over_the_batch_are_refused() -> None:
    model = _OwnPositions(build_model("gpt2", dtype=torch.float64))
    optimizer = stepped_adamw(model)
    rollouts = with_padding_tokens()
    with pytest.warns(EntropyFastWarning, match=r"1 of .* trainable parameters .*'base\.transformer\.wpe\.weight'"):
        found = observe("one_pass", model, optimizer, rollouts)
    assert_same_sums(found, observe("two_pass", model, optimizer, rollouts), 1e-10)


def wide_adapters_over_bf16(seed: int) -> nn.Module:
    """As peft makes them by default: A and B in fp32 over a base in bf16."""
    config = peft.LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", target_modules="all-linear")
    model = with_adapter(build_model("qwen2", dtype=torch.bfloat16, seed=seed), config, seed=seed)
    dtypes = {name.rpartition(".lora_")[1]: p.dtype for name, p in model.named_parameters()}
    assert dtypes == {"": torch.bfloat16, ".lora_": torch.float32}
    return model


@pytest.mark.exhaustive
def test_wide_adapters_over_a_narrow_base_round_no_more_than_the_reference() -> None:
    """Without autocast, against fp64 of the same weights.

    Both engines round activations to bf16 alike: the logarithms of the ratios spread by less than 0.13 (0.07 in four draws of
    sixteen prompts), so that 1.5 is six standard errors away.
    """
    errors: dict[str, list[float]] = {"one_pass": [], "two_pass": []}
    for seed in range(4):
        model = wide_adapters_over_bf16(seed)
        state = AdamState.from_optimizer(stepped_adamw(model), model)
        wide = copy.deepcopy(model).double()
        rollouts = batch_of_every_kind(seed)
        with computing_in_own_dtype(wide):
            truth = observe("two_pass", wide, state, rollouts)
        for engine, found in errors.items():
            with no_slower_path():
                found.append(median_error(observe(engine, model, state, rollouts).kernel, truth.kernel))
    assert min(errors["two_pass"]) > 1e-6  # it really computes in bf16
    assert ratio_of(errors) <= 1.5, errors


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_over_a_four_bit_base(options: dict[str, bool]) -> None:
    """It cannot be widened: the two engines must agree as fp32 does."""
    config = peft.LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", target_modules=["q_proj", "fc1"], **options)
    model = with_adapter(quantize_nf4(build_model("opt")), config)
    optimizer = stepped_adamw(model)
    rollouts = with_padding_tokens()
    with no_slower_path():
        one, two = (observe(engine, model, optimizer, rollouts) for engine in ("one_pass", "two_pass"))
    assert_same_sums(one, two, 1e-4)
    assert relative(one.kernel, two.kernel) <= 1e-4


def run_as_one(model: nn.Module) -> set[str]:
    """Types of the layers and bases whose low-rank parts run as one function."""
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    modules = CapturedModules(model, names)
    layers = [module for module, _ in modules._layers if hasattr(module, "lora_A")]
    return {f"{type(m).__name__} over {type(m.base_layer).__name__}" for m in layers}


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: lora_over("llama", target_modules=["q_proj"]), {"Linear over Linear"}),
        (lambda: wide_adapters_over_bf16(0), {"Linear over Linear"}),
        (lambda: lora_over("gpt2", target_modules=["c_attn"]), {"Linear over Conv1D"}),
        (lambda: lora_over("llama", use_dora=True, target_modules=["q_proj"]), set()),
        (
            lambda: with_adapter(quantize_nf4(build_model("llama")), peft.LoraConfig(r=2, target_modules=["q_proj"])),
            {"Linear4bit over Linear4bit"},
        ),
    ],
    ids=["plain", "wide adapters", "transposed", "dora", "four bits"],
)
def test_which_layers_run_as_one_function(build: Callable[[], nn.Module], expected: set[str]) -> None:
    assert run_as_one(build()) == expected
