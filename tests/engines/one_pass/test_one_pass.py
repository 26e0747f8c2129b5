"""The one-pass engine against the two-pass one: every family, adapters, checkpointing, precisions, slower paths."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator

import peft
import pytest
import torch
from engine_results import GROUPS, TOLERANCE, assert_same, distance, results
from probe_models.adapters import with_adapter
from probe_models.architectures import (
    BUILDERS,
    HIDDEN,
    VOCABULARY,
    WIDTH,
    add_lora,
    build_model,
    disable_checkpointing,
    enable_checkpointing,
    quantize_nf4,
    stepped_adamw,
)
from probe_models.batches import make_rollouts, make_samples, pack
from probe_options import options_of
from refused_ways import refuse
from torch import Tensor, nn
from transformers import FalconConfig, FalconForCausalLM

from entropy_fast import DeltaH1Result, OfflineEntropyProbe, fast_delta_h1
from entropy_fast.engines import one_pass
from entropy_fast.errors import (
    ConfigError,
    EntropyFastWarning,
    GradientCoverageError,
    ModelStateError,
)
from entropy_fast.ways.packed import PackedWay


@contextlib.contextmanager
def no_slower_path() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*one-pass engine does not know.*", category=EntropyFastWarning)
        yield


@pytest.mark.parametrize("checkpointing", ["off", "on", "reentrant"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", BUILDERS)
def test_every_family(family: str, adapter: bool, checkpointing: str) -> None:
    # In fp64, transformers' eager attention, which is all that gemma2 has, gives NaN to rows that only see padding.
    dtype = torch.float32 if family == "gemma2" else torch.float64
    model = build_model(family, dtype=dtype)
    if adapter:
        model = add_lora(model).to(dtype)
    if checkpointing != "off":
        enable_checkpointing(model, reentrant=checkpointing == "reentrant")
    try:
        with no_slower_path():
            both = results(model)
    finally:
        disable_checkpointing(model)
    assert_same(both["one_pass"], both["two_pass"], TOLERANCE.get(family, 1e-10))


def results_within(budget: int, model: nn.Module, **options: object) -> dict[str, DeltaH1Result]:
    """By engine; the budget, and whether it leaves room for the whole kernel, is a matter of the one-pass engine alone."""
    optimizer, rollouts = stepped_adamw(model), make_rollouts(GROUPS)
    own = {"one_pass": {"memory_budget": budget, "full_kernel": budget > 0}, "two_pass": {"full_kernel": True}}
    return {
        engine: OfflineEntropyProbe(model, optimizer, **options_of(engine=engine, **given, **options)).compute_delta_h1(
            rollouts
        )
        for engine, given in own.items()
    }


@pytest.mark.parametrize("budget", [0, 4 * 2**30], ids=["two sweeps", "kernel kept"])
@pytest.mark.parametrize("accumulate_on", ["device", "cpu"])
@pytest.mark.parametrize("microbatch", [1, 3, 10])
def test_ways_through_the_batch(microbatch: int, accumulate_on: str, budget: int) -> None:
    model = build_model("gpt2", dtype=torch.float64)
    both = results_within(
        budget, model, accumulate_on=accumulate_on, prompts_per_microbatch=microbatch, weighting="per_token"
    )
    if budget:
        assert_same(both["one_pass"], both["two_pass"], 1e-10)
    else:
        assert both["one_pass"].kernel is None
        assert distance(both["one_pass"].diagonal, both["two_pass"].diagonal) < 1e-10
        assert distance(both["one_pass"].row_sums, both["two_pass"].row_sums) < 1e-10
        assert distance(both["one_pass"].column_sums, both["two_pass"].column_sums) < 1e-10


@pytest.mark.parametrize("budget", [0, 4 * 2**30])
def test_blocks(budget: int) -> None:
    model = build_model("gpt2", dtype=torch.float64)
    both = results_within(budget, model, blocks=3, prompts_per_microbatch=1)
    assert distance(both["one_pass"].diagonal, both["two_pass"].diagonal) < 1e-10
    assert distance(both["one_pass"].row_sums, both["two_pass"].row_sums) < 1e-10
    assert both["one_pass"].delta_h1 == pytest.approx(both["two_pass"].delta_h1, rel=1e-9)


@pytest.mark.parametrize("budget", [0, 4 * 2**30])
def test_two_batches(budget: int) -> None:
    model = add_lora(build_model("gpt2", dtype=torch.float64)).double()
    optimizer = stepped_adamw(model)
    options = {"one_pass": {"memory_budget": budget}, "two_pass": {}}
    found, expected = (
        fast_delta_h1(
            model,
            optimizer,
            make_rollouts(GROUPS, seed=1),
            entropy_rollouts=make_rollouts((3, 2, 2), seed=2),
            **options_of(engine=engine, prompts_per_microbatch=2, **own),
        )
        for engine, own in options.items()
    )
    assert (found.engine, found.estimate) == ("one_pass", "two_batch")
    assert found.delta_h1 == pytest.approx(expected.delta_h1, rel=1e-9)
    assert found.std_error == pytest.approx(expected.std_error, rel=1e-9)
    assert distance(found.row_sums, expected.row_sums) < 1e-10
    assert distance(found.column_sums, expected.column_sums) < 1e-10


def test_four_bit_base() -> None:
    """It cannot be widened: the two engines must agree as fp32 does."""
    model = add_lora(quantize_nf4(build_model("qwen2")))
    with no_slower_path():
        both = results(model)
    assert distance(both["one_pass"].kernel, both["two_pass"].kernel) < 1e-4


class _Tied(nn.Module):
    """A weight used by a linear map and once more by itself, and a parameter of the model's own."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        out = self.base(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids).logits
        extra = self.base.transformer.h[0].mlp.c_fc.weight.square().mean()
        return out * self.scale * (1 + extra)


def test_uses_that_no_module_shows_take_the_slower_path() -> None:
    model = _Tied(build_model("gpt2", dtype=torch.float64))
    with pytest.warns(EntropyFastWarning, match="3 of .* trainable parameters are used in ways .*the first: 'scale'"):
        both = results(model)
    assert_same(both["one_pass"], both["two_pass"], 1e-10)
    assert any("does not know" in note for note in both["one_pass"].diagnostics.warnings)
    assert not any("does not know" in note for note in both["two_pass"].diagnostics.warnings)


def test_several_adapters_at_once() -> None:
    model = add_lora(build_model("gpt2", dtype=torch.float64))
    config = peft.LoraConfig(
        r=3, use_rslora=True, target_modules=["c_fc"], rank_pattern={"h.0.mlp.c_fc": 5}, fan_in_fan_out=True
    )
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.second" in name:
                parameter.normal_(std=0.2)
    with no_slower_path():
        both = results(model)
    assert_same(both["one_pass"], both["two_pass"], 1e-10)


def test_the_model_comes_back_as_it_was() -> None:
    model = add_lora(build_model("gpt2"))
    optimizer = stepped_adamw(model)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    fast_delta_h1(model, optimizer, make_rollouts(GROUPS), **options_of(engine="one_pass"))
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys(), name
        assert "forward" not in module.__dict__ or module.__dict__["forward"] is before[name]["forward"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert parameter.grad is None
    broken = make_rollouts(GROUPS)
    handle = model.base_model.model.transformer.h[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fast_delta_h1(model, optimizer, broken, **options_of(engine="one_pass"))
    handle.remove()
    assert all("forward" not in module.__dict__ or name in before for name, module in model.named_modules())
    assert all(module.__dict__.keys() == before[name].keys() for name, module in model.named_modules())


def test_an_adapter_out_of_the_forward_is_an_error() -> None:
    model = add_lora(build_model("gpt2"))
    optimizer = stepped_adamw(model)
    for module in model.modules():
        if hasattr(module, "_disable_adapters"):
            module._disable_adapters = True
    enable = model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: out.requires_grad_())
    with pytest.raises(GradientCoverageError, match="none of the"):
        fast_delta_h1(model, optimizer, make_rollouts(GROUPS), **options_of(engine="one_pass"))
    enable.remove()


def test_randomness_that_is_left_is_an_error() -> None:
    model = build_model("gpt2")
    optimizer = stepped_adamw(model)
    model.transformer.register_forward_hook(
        lambda _m, _i, out: out.__setitem__("last_hidden_state", nn.functional.dropout(out[0], 0.5))
    )
    with pytest.raises(ModelStateError, match="two forwards of sequence"):
        fast_delta_h1(model, optimizer, make_rollouts(GROUPS), **options_of(engine="one_pass"))


def test_no_such_engine() -> None:
    model = build_model("gpt2")
    with pytest.raises(ConfigError, match="'three_pass'"):
        OfflineEntropyProbe(model, stepped_adamw(model), **options_of(engine="three_pass"))
    assert one_pass.KIND.name == "one_pass"


def test_a_prompt_whose_coefficients_are_all_zero() -> None:
    """Equal responses with equal rewards: neither entropy nor update comes from them."""
    model = add_lora(build_model("gpt2", dtype=torch.float64)).double()
    optimizer = stepped_adamw(model)
    samples = make_samples(GROUPS, interleave=False)
    same = [dataclasses.replace(s, response=samples[0].response, advantage=0.0) for s in samples[:2]]
    rollouts = pack(same + samples[2:])
    for refused in ((), (PackedWay,)):
        with pytest.MonkeyPatch.context() as patch:
            refuse(patch, *refused)
            both = [
                OfflineEntropyProbe(model, optimizer, **options_of(full_kernel=True, engine=engine)).compute_delta_h1(
                    rollouts
                )
                for engine in ("one_pass", "two_pass")
            ]
        assert_same(both[0], both[1], 1e-10)
        assert both[0].diagonal[0] == 0


def test_one_probe_many_calls() -> None:
    model = add_lora(build_model("gpt2", dtype=torch.float64)).double()
    probe = OfflineEntropyProbe(model, stepped_adamw(model), **options_of(engine="one_pass"))
    large, small, other = (
        make_rollouts(groups, seed=seed) for groups, seed in (((3, 4, 3), 1), ((2, 2), 2), ((2, 3), 3))
    )
    first = probe.run_mixed_probe(entropy_rollouts=small, update_rollouts=large)
    probe.compute_delta_h1(large)
    probe.run_mixed_probe(entropy_rollouts=other, update_rollouts=small)
    assert probe.run_mixed_probe(entropy_rollouts=small, update_rollouts=large).delta_h1 == first.delta_h1


def test_options_it_has_no_use_for_and_a_kernel_that_does_not_fit_are_errors() -> None:
    model = add_lora(build_model("gpt2"))
    optimizer = stepped_adamw(model)
    with pytest.raises(ConfigError, match="`conditional_variance` is 'alpha', and engine 'one_pass' has no use for it"):
        OfflineEntropyProbe(model, optimizer, **options_of(engine="one_pass", conditional_variance="alpha"))
    probe = OfflineEntropyProbe(model, optimizer, **options_of(engine="one_pass", memory_budget=0, full_kernel=True))
    with pytest.raises(
        ConfigError, match=r"full_kernel needs every unit's own gradients(.|\n)*memory_budget is 0 bytes"
    ):
        probe.compute_delta_h1(make_rollouts(GROUPS))


def test_a_hook_on_a_parameter_s_gradient_runs() -> None:
    """On the slower path, where there is a gradient for it to see."""
    model = add_lora(build_model("qwen2", dtype=torch.float64)).double()
    hooked = [p for name, p in model.named_parameters() if "lora_B" in name]
    handles = [p.register_hook(lambda gradient: gradient * 0.1) for p in hooked]
    optimizer = stepped_adamw(model)
    with pytest.warns(EntropyFastWarning, match="trainable parameters are used in ways"):
        both = results(model, optimizer=optimizer)
    assert_same(both["one_pass"], both["two_pass"], TOLERANCE["qwen2"])
    for handle in handles:
        handle.remove()
    # It did change what was found.
    assert distance(results(model, optimizer=optimizer)["one_pass"].kernel, both["one_pass"].kernel) > 0.1


def test_lora_whose_output_is_added_to_in_place() -> None:
    """Falcon adds its attention to what the MLP's adapted layer gives."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = FalconConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
            initializer_range=WIDTH,
        )
        base = FalconForCausalLM(config).double()
    targets = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    model = with_adapter(base, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")).double()
    with no_slower_path():
        both = results(model)
    assert_same(both["one_pass"], both["two_pass"], 1e-10)


@pytest.mark.parametrize(
    "config",
    [
        peft.VBLoRAConfig(r=4, num_vectors=16, vector_length=8, topk=2, target_modules=["q_proj", "o_proj"]),
        peft.GraloraConfig(r=4, gralora_k=2, target_modules=["q_proj", "o_proj"]),
    ],
    ids=["vb-lora", "gralora"],
)
def test_linear_layers_without_a_parameter_of_their_own(config: peft.PeftConfig) -> None:
    config.task_type = "CAUSAL_LM"
    model = with_adapter(build_model("llama", dtype=torch.float64), config).double()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=EntropyFastWarning)
        both = results(model, max_excluded_share=1.0)
    assert_same(both["one_pass"], both["two_pass"], TOLERANCE["llama"])
