"""Parameter names to layers."""

from __future__ import annotations

import pytest

from entropy_fast.estimates.attribution import by_layer, layer_of


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "model.layers.3"),
        ("transformer.h.11.mlp.c_fc.bias", "transformer.h.11"),
        (
            "base_model.model.model.layers.0.mlp.experts.5.up_proj.lora_A.default.weight",
            "base_model.model.model.layers.0",
        ),
        ("layers.2.norm.weight", "layers.2"),
        ("0.model.layers.1.mlp.weight", "0.model.layers.1"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("model.norm.weight", "model.norm"),
        ("model.my_layers.3.weight", "model.my_layers.3"),
        ("scale", ""),
    ],
)
def test_layer_of(name: str, layer: str) -> None:
    assert layer_of(name) == layer


def test_layers_come_in_model_order_and_add_up() -> None:
    shares = {"embed.weight": 1.0, "h.10.a.weight": 2.0, "h.2.a.weight": 4.0, "h.10.b.weight": 8.0, "norm.weight": 16.0}
    found = by_layer(shares)
    assert list(found.items()) == [("embed", 1.0), ("h.10", 10.0), ("h.2", 4.0), ("norm", 16.0)]
