"""Which layers of a model run compiled, and that they are left as they were."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from entropy_fast.ops import backend_report
from entropy_fast.ways.packed import frozen_layers
from entropy_fast.ways.packed.frozen_layers import FrozenLayers

LLAMA_LIKE = ("Llama", "Qwen2", "Qwen3", "Mistral")


def tiny(family: str, dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        **options,
    }
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}Model")(config).to(dtype)
    model.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0, 0.2)
    return model.eval()


def calls(model: nn.Module, layers: FrozenLayers) -> tuple[torch.Tensor, int]:
    before = _native_calls()
    with torch.no_grad(), layers.exchanged():
        output = model(torch.arange(30).view(2, 15)).last_hidden_state
    return output, _native_calls() - before


def _native_calls() -> int:
    return {record.name: record.calls for record in backend_report()}["native"]


@pytest.mark.parametrize("family", LLAMA_LIKE)
def test_norms_and_gates_run_compiled_and_give_the_same(family: str) -> None:
    model = tiny(family)
    with torch.no_grad():
        expected = model(torch.arange(30).view(2, 15)).last_hidden_state
    layers = FrozenLayers(model)
    # Two norms and a gate in each layer, Qwen3 with two more norms, and the last norm.
    expected_layers = 2 * (5 if family == "Qwen3" else 3) + 1
    assert len(layers) == expected_layers
    output, n_calls = calls(model, layers)
    assert n_calls == expected_layers
    assert torch.allclose(output, expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(model(torch.arange(30).view(2, 15)).last_hidden_state, expected)


def test_the_one_that_gemma_adds_to_its_weights() -> None:
    model = tiny("Gemma2", hidden_activation="gelu_pytorch_tanh", sliding_window=8)
    with torch.no_grad():
        expected = model(torch.arange(30).view(2, 15)).last_hidden_state
    layers = FrozenLayers(model)
    assert len(layers) == 2 * 4 + 1, "four norms in each layer; its gate is no SiLU"
    output, _ = calls(model, layers)
    assert torch.allclose(output, expected, rtol=0, atol=1e-5)


def test_what_computes_otherwise_is_left_alone() -> None:
    """A norm with another formula, and one whose formula is known but not for this dtype."""
    model = tiny("Llama")
    kind = type(model.norm)

    def twice(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return 2 * kind.forward(self, x)

    model.norm.__class__ = type("LlamaRMSNorm", (kind,), {"forward": twice, "__module__": kind.__module__})
    assert model.norm not in [module for module, _ in FrozenLayers(model)._forwards]
    # Its norms compute in fp32, whatever the weight is.
    assert not [m for m, _ in FrozenLayers(tiny("Llama", torch.float64))._forwards if isinstance(m, kind)]


def test_trained_norms_and_exchanged_forwards_are_left_alone() -> None:
    model = tiny("Llama")
    model.norm.weight.requires_grad_(True)
    model.layers[0].mlp.forward = model.layers[0].mlp.forward
    chosen = [module for module, _ in FrozenLayers(model)._forwards]
    assert model.norm not in chosen
    assert model.layers[0].mlp not in chosen
    assert model.layers[1].mlp in chosen


def test_an_exception_puts_every_forward_back() -> None:
    model = tiny("Llama")
    layers = FrozenLayers(model)

    def fail() -> None:
        with layers.exchanged():
            assert "forward" in model.norm.__dict__
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_the_random_state_is_not_moved() -> None:
    model = tiny("Llama")
    model.layers[0].mlp.down_proj = nn.Sequential(nn.Dropout(0.5), model.layers[0].mlp.down_proj).train()
    before = torch.get_rng_state()
    FrozenLayers(model)
    assert torch.equal(before, torch.get_rng_state())


def test_a_class_that_had_another_forward_when_it_was_first_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("Llama")
    monkeypatch.setattr(frozen_layers, "_written", {})
    with monkeypatch.context() as patch:
        patch.setattr(type(model.norm), "forward", lambda self, x: x.clamp(-1, 1) * self.weight)
        assert len(FrozenLayers(model)) == 2, "the gates alone"
    assert len(FrozenLayers(model)) == 2 * 3 + 1
