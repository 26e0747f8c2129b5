"""A model's attention exchanged for as long as a context lasts, and what the exchanged one refuses."""

from __future__ import annotations

import pytest
import torch
from probe_models.architectures import build_model
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from entropy_fast import Rollouts
from entropy_fast.libraries import attention_configurations, attention_function
from entropy_fast.ways.packed.exchange import PackedRun
from entropy_fast.ways.packed.layout import pack_microbatch

CPU = torch.device("cpu")


def run_of_two_sequences() -> PackedRun:
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 6]])
    loss = torch.tensor([[0, 0, 1, 1]] * 2)
    rollouts = Rollouts(ids, torch.ones_like(ids), loss, torch.zeros(2).long(), advantages=torch.zeros(2))
    return PackedRun(pack_microbatch(rollouts, torch.arange(2), [0, 0], CPU, share=True), CPU)


def registered() -> set[str]:
    return {name for name in AttentionInterface._global_mapping if name.startswith("entropy_fast")}


def implementation(model: PreTrainedModel) -> str:
    return str(model.config._attn_implementation)


def test_configurations_come_back_after_an_exception() -> None:
    model = build_model("qwen2", attention="eager")
    configurations = attention_configurations(model)
    assert len(configurations) == 1 and configurations[0] is model.config
    model.register_forward_pre_hook(lambda *_: seen.append(implementation(model)) or 1 / 0)
    seen: list[str] = []
    with pytest.raises(ZeroDivisionError), attention_function(configurations, run_of_two_sequences().attention):
        model(torch.tensor([[1]]))
    assert len(seen) == 1 and seen[0].startswith("entropy_fast")
    assert implementation(model) == "eager"
    assert registered() == set()


def test_configurations_within_configurations() -> None:
    """A decoder that shares a model with something else has a configuration of its own; each gets back what it had."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = build_model("opt", attention="eager")
            self.text = build_model("qwen2", attention="sdpa")
            self.again = self.text
            self.config = object()

    both = Both()
    configurations = attention_configurations(both)
    assert [id(c) for c in configurations] == [id(both.tower.config), id(both.text.config)]
    with attention_function(configurations, run_of_two_sequences().attention):
        assert implementation(both.tower) == implementation(both.text)
        with attention_function(configurations[1:], run_of_two_sequences().attention):
            assert implementation(both.tower) != implementation(both.text)
        assert implementation(both.tower) == implementation(both.text)
    assert (implementation(both.tower), implementation(both.text)) == ("eager", "sdpa")
    assert attention_configurations(both.text.model) == [both.text.config]


def test_the_exchanged_function_is_the_one_that_runs() -> None:
    model = build_model("qwen2")
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = model(ids).logits
        calls: list[str] = []

        def zeros(module: nn.Module, query: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
            calls.append(type(module).__name__)
            return torch.zeros_like(query).transpose(1, 2), None

        with attention_function(attention_configurations(model), zeros):
            assert not torch.equal(model(ids).logits, before)
        assert calls == ["Qwen2Attention"] * 2
        assert torch.equal(model(ids).logits, before)


class TestRefusals:
    def attention(self, **others: object) -> Tensor:
        heads, size = 2, 4
        query, key, value = (torch.ones(1, heads, 2, size, dtype=torch.float64) for _ in range(3))
        found, weights = run_of_two_sequences().attention(nn.Identity(), query, key, value, **others)  # type: ignore[arg-type]
        assert weights is None
        return found

    def test_what_changes_nothing_is_taken(self) -> None:
        positions = torch.arange(2)[None]
        found = self.attention(
            position_ids=positions, cache_position=positions[0], is_causal=True, output_attentions=False
        )
        assert torch.equal(found, torch.ones(1, 2, 2, 4, dtype=torch.float64))

    @pytest.mark.parametrize("name", ["head_mask", "sinks", "position_bias", "something_new"])
    def test_tensors_that_are_not_known(self, name: str) -> None:
        with pytest.raises(NotImplementedError, match=f"attention of Identity: {name}"):
            self.attention(**{name: torch.zeros(2)})

    def test_sinks_that_are_trained(self) -> None:
        assert self.attention(s_aux=torch.zeros(2)).shape == (1, 2, 2, 4)
        with pytest.raises(NotImplementedError, match="attention of Identity: sinks that are trained"):
            self.attention(s_aux=torch.zeros(2, requires_grad=True))

    @pytest.mark.parametrize("given", [{"dropout": 0.1}, {"attention_mask": torch.zeros(1, 1, 2, 2)}])
    def test_masks_and_dropout(self, given: dict[str, object]) -> None:
        with pytest.raises(NotImplementedError, match="mask or dropout"):
            self.attention(**given)

    def test_several_rows(self) -> None:
        tensors = [torch.ones(2, 2, 2, 4) for _ in range(3)]
        with pytest.raises(NotImplementedError):
            run_of_two_sequences().attention(nn.Identity(), *tensors)
