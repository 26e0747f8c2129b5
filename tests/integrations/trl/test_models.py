"""Kinds of models under TRL's trainer: compiled, checkpointed, over 4-bit weights, with learned positions, of images."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_trl import tiny_model, tiny_trainer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl_runs import own_gradient, refused, trained_with_and_without
from trl_stand_ins import image_trainer

exhaustive = pytest.mark.exhaustive
BF16 = {
    "cosine": 1 - 1e-2,
    "scale": 5e-2,
}  # what rounding to it leaves of the agreement, in forwards that lie otherwise
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
NOT_REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


@exhaustive
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("options", [REENTRANT, NOT_REENTRANT], ids=["reentrant", "not reentrant"])
def test_gradient_checkpointing(tmp_path: Path, options: dict[str, Any], lora: bool) -> None:
    _, seen, caught = trained_with_and_without(lambda: tiny_trainer(tmp_path, lora=lora, **options))
    own_gradient(seen)
    assert not caught


@exhaustive
@pytest.mark.parametrize(
    ("backend", "options", "bounds"),
    [
        ("eager", {}, {}),
        ("aot_eager", {}, {}),
        pytest.param("inductor", {"max_steps": 1}, {}, marks=pytest.mark.timeout(1800)),
        ("aot_eager", {"lora": True, "bf16": True}, BF16),
    ],
    ids=["eager", "aot_eager", "inductor", "aot_eager, lora, bf16"],
)
def test_a_compiled_model(tmp_path: Path, backend: str, options: dict[str, Any], bounds: dict[str, float]) -> None:
    torch.compiler.reset()
    compiled = {"torch_compile": True, "torch_compile_backend": backend, **options}
    probed, seen, caught = trained_with_and_without(lambda: tiny_trainer(tmp_path, **compiled))
    assert hasattr(probed.model_wrapped, "_orig_mod")
    own_gradient(seen, **bounds)
    assert not caught


@exhaustive
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"bf16": True, **NOT_REENTRANT}], ids=["", "bf16, checkpointing"])
def test_lora_over_4_bit_weights(tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_model().save_pretrained(tmp_path / "base")
    quantized = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=bool(options)
    )  # fmt: skip

    def trainer() -> Any:
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantized, dtype=dtype)
        return tiny_trainer(tmp_path, model=base, lora=True, **options)

    probed, seen, caught = trained_with_and_without(trainer)
    # TRL trains adapters over quantised weights in bfloat16, whatever the rest computes in.
    assert {p.dtype for p in probed.model.parameters() if p.requires_grad} == {torch.bfloat16}
    own_gradient(seen, **BF16)
    assert not caught


@exhaustive
def test_a_kl_term_against_the_adapters_base(tmp_path: Path) -> None:
    _, seen, _ = trained_with_and_without(lambda: tiny_trainer(tmp_path, lora=True, beta=0.1))
    own_gradient(seen)


@exhaustive
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("bf16", [False, True])
def test_learned_positions_with_padding_on_the_left(tmp_path: Path, dropout: float, bf16: bool) -> None:
    def trainer(rows: list[dict[str, Any]] | None = None) -> Any:
        model = tiny_model(family="gpt2", dropout=dropout)
        # In the dataset's order, in which short and long prompts take turns: every step has both.
        return tiny_trainer(tmp_path, model=model, bf16=bf16, rows=rows, shuffle_dataset=False, max_steps=2)

    _, seen, caught = trained_with_and_without(trainer)
    # TRL passes no position ids: a padded row runs at other positions than those at which it was sampled.
    refused(seen, caught, "nats a token away from the model's")
    assert "position_ids" in str(seen[0].reason)
    # Prompts of one length are not padded, and both number positions alike.
    _, seen, caught = trained_with_and_without(lambda: trainer([{"prompt": f"{n} plus {n} is"} for n in range(25)]))
    assert all(forecast.result is not None for forecast in seen) and not caught


@exhaustive
@pytest.mark.parametrize("options", [{}, {"lora": True, "bf16": True, **NOT_REENTRANT}], ids=["", "lora, bf16"])
def test_dropout_hides_nothing_where_positions_agree(tmp_path: Path, options: dict[str, Any]) -> None:
    _, seen, caught = trained_with_and_without(lambda: tiny_trainer(tmp_path, model=tiny_model(dropout=0.2), **options))
    assert all(forecast.result is not None for forecast in seen) and not caught


@exhaustive
def test_a_wrapper_around_the_trainers_log_probs_is_found_behind_dropout_too(tmp_path: Path) -> None:
    from trl import GRPOTrainer

    class Other(GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            logprobs, entropies, rest = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            return 0.9 * logprobs, entropies, rest

    def trainer() -> Any:
        return tiny_trainer(tmp_path, kind=Other, model=tiny_model(dropout=0.1))

    _, seen, caught = trained_with_and_without(trainer)
    refused(seen, caught, "without dropout the trainer's log-probs")


def test_images_are_refused_with_the_reason(tmp_path: Path) -> None:
    _, seen, caught = trained_with_and_without(lambda: image_trainer(tmp_path, images=True, max_steps=1))
    refused(seen, caught, "the batch holds images (pixel_values)")


@exhaustive
def test_text_alone_is_forecast_for_a_model_of_images(tmp_path: Path) -> None:
    _, seen, caught = trained_with_and_without(lambda: image_trainer(tmp_path, images=False))
    own_gradient(seen)
    assert not caught


@exhaustive
@pytest.mark.parametrize("lora", [False, True])
def test_layers_that_write_over_what_they_saved(tmp_path: Path, lora: bool) -> None:
    """As Liger's do. Theirs need a GPU; this one is theirs in name and in what it does to memory."""

    class Gated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(gate, up)
            return torch.nn.functional.silu(gate) * up

        @staticmethod
        def backward(ctx: Any, above: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            gate, up = ctx.saved_tensors
            sigmoid = torch.sigmoid(gate)
            by_gate = above * up * sigmoid * (1 + gate * (1 - sigmoid))
            by_up = above * gate * sigmoid
            gate.data.copy_(by_gate)
            up.data.copy_(by_up)
            return gate.data, up.data

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(Gated.apply(self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-untyped-call]

    forward.__module__ = "liger_kernel.transformers.swiglu"

    def patched() -> Any:
        model = tiny_model()
        for layer in model.model.layers:
            layer.mlp.forward = types.MethodType(forward, layer.mlp)
        return model

    # With its usual ε an Adam's first steps make a whole step of every element, also of one that is all rounding.
    options = {"lora": lora, "adam_epsilon": 1e-2}
    _, plain, _ = trained_with_and_without(lambda: tiny_trainer(tmp_path, model=tiny_model(), **options))
    _, seen, caught = trained_with_and_without(lambda: tiny_trainer(tmp_path, model=patched(), **options))
    own_gradient(seen)
    assert not caught
    for found, expected in zip(seen, plain, strict=True):
        for name in ("direct", "visitation", "direct_error"):
            assert found.metrics()[name] == pytest.approx(expected.metrics()[name], rel=1e-3, abs=1e-8)
