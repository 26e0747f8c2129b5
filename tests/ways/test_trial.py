"""What a way leaves out of a model must do nothing, and is found out also where numbers do not tell."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from probe_models.architectures import VOCABULARY, add_lora, build_model, stepped_adamw
from probe_models.batches import Sample, make_samples, pack
from probe_options import options_of
from torch import nn
from transformers import Gemma4ForCausalLM, Gemma4TextConfig, GPTJConfig, GPTJForCausalLM

from entropy_fast import DeltaH1Result, Rollouts, fast_delta_h1
from entropy_fast.errors import CheckpointingError, RolloutsError

END = 2


def both(model: nn.Module, rollouts: Rollouts, **options: Any) -> tuple[DeltaH1Result, DeltaH1Result]:
    """By the one-pass engine and by the reference."""
    optimizer = stepped_adamw(model)
    one, two = (
        fast_delta_h1(model, optimizer, rollouts, **options_of(engine=engine, full_kernel=True, **options))
        for engine in ("one_pass", "two_pass")
    )
    return one, two


def assert_same_kernel(one: DeltaH1Result, two: DeltaH1Result, tolerance: float) -> None:
    assert one.kernel is not None and two.kernel is not None
    assert float((one.kernel - two.kernel).norm() / two.kernel.norm()) <= tolerance


def certain_answers() -> Rollouts:
    """Two answers to the shortest prompt are one token, which the policy is all but certain of."""
    samples = make_samples((4, 3, 2), seed=3)
    shortest = min(samples, key=lambda sample: len(sample.prompt)).group
    own = [sample for sample in samples if sample.group == shortest][:2]
    return pack([Sample(s.group, s.prompt, (END,), s.advantage) if s in own else s for s in samples])


def test_attention_that_does_not_go_through_the_interface_is_not_packed() -> None:
    torch.manual_seed(3)
    model = GPTJForCausalLM(
        GPTJConfig(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, rotary_dim=4, n_positions=64)
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        model.lm_head.bias[END] = 14.0
    one, two = both(add_lora(model), certain_answers())
    assert_same_kernel(one, two, 1e-9)
    (reason,) = [said for said in one.plan.not_taken if said.startswith("packed: ")]
    assert "0 of its 2 layers" in reason
    assert reason in str(one.plan)


@pytest.mark.parametrize("how", ["hook", "forward"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_is_done_to_logits_is_not_skipped(how: str, dtype: torch.dtype) -> None:
    base = build_model("llama").to(dtype)
    model = add_lora(base)

    def colder(output: Any) -> Any:
        output.logits = output.logits / 0.9
        return output

    if how == "hook":
        base.register_forward_hook(lambda module, arguments, output: colder(output))
    else:
        plain = base.forward
        base.forward = lambda *arguments, **options: colder(plain(*arguments, **options))
    one, two = both(model, pack(make_samples((2, 3, 2))))
    assert_same_kernel(one, two, 1e-5 if dtype == torch.float64 else 0.05)
    assert "the model's own logits" in one.plan.way
    assert ("forward hooks" if how == "hook" else "a forward of its own") in one.plan.not_taken[0]


def test_a_model_that_accelerate_prepared_in_bf16_packs() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # one process, one precision: another test may have chosen
    model = add_lora(build_model("llama"))
    rollouts = pack(make_samples((4, 3, 4, 3), seed=8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = stepped_adamw(model)
    expected = fast_delta_h1(model, state, rollouts, **options_of(autocast_dtype="bfloat16"))
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    found = fast_delta_h1(prepared, state, rollouts, **options_of())
    assert "packed" in found.plan.way
    assert found.delta_h1 == expected.delta_h1
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompt_tuning_keeps_its_tokens(dtype: torch.dtype) -> None:
    base = build_model("llama").to(dtype)
    model = peft.get_peft_model(base, peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    one, two = both(model, pack(make_samples((2, 3, 2))))
    assert_same_kernel(one, two, 1e-5 if dtype == torch.float32 else 0.05)
    assert any("tokens of its own" in reason for reason in one.plan.not_taken)


@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
@pytest.mark.parametrize("row", [0, 3])
def test_a_token_of_probability_0_is_named(engine: str, row: int) -> None:
    class CutOff(nn.Module):
        """A vocabulary padded with logits of -inf."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            keep = self.inner(x)[..., : VOCABULARY - 4]
            return torch.nn.functional.pad(keep, (0, 4), value=float("-inf"))

    model = build_model("llama")
    model.lm_head = CutOff(model.lm_head)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    samples = [
        Sample(s.group, s.prompt, tuple(min(t, VOCABULARY - 5) for t in s.response), s.advantage)
        for s in make_samples((2, 3, 2))
    ]
    bad = samples[row]
    samples[row] = Sample(bad.group, bad.prompt, (*bad.response[:-1], VOCABULARY - 1), bad.advantage)
    with pytest.raises(RolloutsError) as caught:
        fast_delta_h1(model, stepped_adamw(model), pack(samples), **options_of(engine=engine))
    said = f"response token {len(bad.response) - 1} of row {row} (empty responses not counted), id {VOCABULARY - 1}"
    assert said in caught.value.problem


def test_shared_keys_under_reentrant_checkpointing_are_refused() -> None:
    config = Gemma4TextConfig(
        vocab_size=VOCABULARY,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        global_head_dim=8,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    model = add_lora(Gemma4ForCausalLM(config))
    optimizer, rollouts = stepped_adamw(model), pack(make_samples((2, 3)))
    for reentrant in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        if reentrant:
            with pytest.raises(CheckpointingError, match="2 layers use the keys and values of other layers"):
                fast_delta_h1(model, optimizer, rollouts)
        else:
            fast_delta_h1(model, optimizer, rollouts)
