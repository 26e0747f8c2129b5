"""Attention sinks in a model's run: the logits that only a softmax's denominator knows of."""

from __future__ import annotations

import pytest
import torch
from engine_sums import assert_same_estimate, assert_same_sums, observe
from exactness import batch_of
from probe_models.adapters import gpt_oss_with_lora
from probe_models.architectures import stepped_adamw
from probe_models.own_dtype import computing_in_own_dtype
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from entropy_fast import Rollouts
from entropy_fast.ways.packed.exchange import PackedRun
from entropy_fast.ways.packed.layout import pack_microbatch

CPU = torch.device("cpu")


def run_of_two_sequences() -> PackedRun:
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 6]])
    loss = torch.tensor([[0, 0, 1, 1]] * 2)
    rollouts = Rollouts(ids, torch.ones_like(ids), loss, torch.zeros(2).long(), advantages=torch.zeros(2))
    return PackedRun(pack_microbatch(rollouts, torch.arange(2), [0, 0], CPU, share=True), CPU)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sinks_are_those_of_transformers(backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against its eager attention of GPT-OSS, forward and backward, for two sequences of one token and of two."""
    monkeypatch.setenv("ENTROPY_FAST_BACKEND", backend)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    layer = nn.Module()
    layer.num_key_value_groups, layer.sinks = 2, draw(4)
    # The prompt's two tokens, which nothing else is in the row of.
    leaves = [draw(1, heads, 2, 8).requires_grad_() for heads in (4, 2, 2)]
    above = draw(1, 2, 4, 8)
    mask = torch.tensor([[0.0, -torch.inf], [0.0, 0.0]], dtype=torch.float64)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    layer.sinks = layer.sinks.double()
    expected, _ = eager_attention_forward(layer, *wide, mask, scaling=0.4)
    expected.backward(above.double())
    found, _ = run_of_two_sequences().attention(layer, *leaves, scaling=0.4, s_aux=layer.sinks.to(dtype))
    found.backward(above)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    for one, two in zip(leaves, wide, strict=True):
        assert one.grad is not None and two.grad is not None
        torch.testing.assert_close(one.grad.double(), two.grad, rtol=tolerance, atol=2 * tolerance)


def test_a_model_with_sinks_is_packed() -> None:
    """Two layers, one of which has a window: sums and S are those of the plain forward."""
    model = gpt_oss_with_lora()
    optimizer = stepped_adamw(model)
    with computing_in_own_dtype(model):
        expected = observe("two_pass", model, optimizer, batch_of("uneven groups"))
        found = observe("one_pass", model, optimizer, batch_of("uneven groups"))
    plan = found.result.diagnostics.plan
    assert plan is not None and plan.way.startswith("packed")
    assert_same_sums(found, expected, 1e-10)
    assert_same_estimate(found, expected, 1e-10)
