"""What a cost model reads off a model, and what a sweep costs."""

from __future__ import annotations

import pytest
import torch
from probe_models.architectures import (
    HIDDEN,
    VOCABULARY,
    add_lora,
    build_model,
    disable_checkpointing,
    enable_checkpointing,
    quantize_nf4,
)
from torch import nn

from entropy_fast.engines.one_pass.costs import CostModel

CPU = torch.device("cpu")
# Of one layer of qwen2: q and o, k and v, and the three maps of the MLP.
MAPS = [(HIDDEN, HIDDEN)] * 2 + [(HIDDEN, HIDDEN // 2)] * 2 + [(HIDDEN, 64)] * 3
LAYERS = 2
RANK = 4


def test_costs_of_full_fine_tuning() -> None:
    costs = CostModel.of(model := build_model("qwen2"), model, CPU)
    weights = LAYERS * sum(a * b for a, b in MAPS)
    assert (costs.linear, costs.trained, costs.output) == (weights, weights, HIDDEN * VOCABULARY)
    assert costs.bytes_per_token == LAYERS * sum(4 * (a + b) for a, b in MAPS)


@pytest.mark.parametrize("base", ["fp32", "bf16", "nf4"])
def test_costs_of_adapters(base: str) -> None:
    """A 4-bit map has the weights of the map that it stands for, not those of its storage."""
    model = build_model("qwen2", dtype=torch.bfloat16 if base == "bf16" else torch.float32)
    adapted = add_lora(quantize_nf4(model) if base == "nf4" else model)
    costs = CostModel.of(adapted, adapted, CPU)
    adapters = LAYERS * sum(RANK * (a + b) for a, b in MAPS)
    trained = [p.numel() for p in adapted.parameters() if p.requires_grad]
    assert costs.trained == adapters == sum(trained)
    assert costs.linear == adapters + LAYERS * sum(a * b for a, b in MAPS)
    assert costs.output == HIDDEN * VOCABULARY
    in_base = LAYERS * sum(a + b for a, b in MAPS) * (4 if base == "fp32" else 2)
    in_adapters = LAYERS * sum(a + RANK + RANK + b for a, b in MAPS) * 4
    assert costs.bytes_per_token == in_base + in_adapters


def test_costs_of_transposed_maps() -> None:
    costs = CostModel.of(model := build_model("gpt2"), model, CPU)
    assert costs.linear == 2 * (HIDDEN * 3 * HIDDEN + HIDDEN * HIDDEN + 2 * HIDDEN * 4 * HIDDEN)


def test_checkpointing_keeps_one_layer_and_its_input() -> None:
    model = build_model("qwen2")
    plain = CostModel.of(model, model, CPU).bytes_per_token
    enable_checkpointing(model, reentrant=False)
    try:
        kept = CostModel.of(model, model, CPU).bytes_per_token
    finally:
        disable_checkpointing(model)
    assert kept == plain // LAYERS * 2


def test_a_module_that_is_no_transformers_model() -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    module[0].requires_grad_(False)
    costs = CostModel.of(module, module, CPU)
    assert (costs.linear, costs.trained, costs.output) == (25, 10, 0)


def test_operations() -> None:
    """By hand: what P, Q and M tokens cost in matrix products, X and g counted apart."""
    costs = CostModel(linear=100, trained=30, output=7, bytes_per_token=1, full_rate_tokens=1)
    assert costs.operations(0, 1, 0, 1) == 200 + 200 + 60
    assert costs.operations(0, 1, 0, 2) == 200 + 200 + 120
    # Through a prompt there is a backward for each of X and g.
    assert costs.operations(1, 0, 0, 1) == 200 + 200 + 60
    assert costs.operations(1, 0, 0, 2) == 200 + 2 * (200 + 60)
    assert costs.operations(0, 0, 3, 2) == 3 * 28
    # In the row of the responses a prompt runs forward for each of them, too.
    assert costs.operations(1, 0, 0, 2, prompt_forwards=2) == 2 * (200 + 200 + 60)
    assert costs.operations(2, 5, 3, 2) == 2 * 720 + 5 * 520 + 84
    # Where coefficients differ from token to token: a backward for X and one for Y.
    assert costs.operations(0, 5, 3, 2, backwards=2, entropies=True) == 5 * 720 + 3 * 42
