"""Shares by layer and kind of module are the shares by parameter, added up."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from saved_results import made_result

from entropy_fast.report.html.sections import layers as section
from entropy_fast.report.html.sections.layers import kind_of, layers_section


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight", "self_attn.q_proj"),
        ("base_model.model.model.layers.11.mlp.up_proj.lora_B.default.weight", "mlp.up_proj"),
        ("base_model.model.model.layers.1.mlp.down_proj.lora_magnitude_vector.default.weight", "mlp.down_proj"),
        ("base_model.model.model.layers.1.mlp.down_proj.base_layer.bias", "mlp.down_proj"),
        ("model.layers.3.input_layernorm.weight", "input_layernorm"),
        ("transformer.h.2.attn.c_attn.bias", "attn.c_attn"),
        ("model.layers.3.mlp.experts.7.w1.weight", "mlp.experts.7.w1"),
        ("model.layers.3.scale", "scale"),
        ("model.embed_tokens.weight", ""),
        ("lm_head.weight", ""),
    ],
)
def test_the_kind_of_a_module(name, kind):
    assert kind_of(name) == kind


SHARES = {
    "model.embed_tokens.weight": 1.0,
    "model.layers.0.attn.q.weight": 2.0,
    "model.layers.0.attn.q.bias": 3.0,
    "model.layers.1.attn.q.weight": -7.0,
    "model.layers.1.mlp.weight": 0.5,
    "lm_head.weight": -0.25,
}


def of(shares):
    result = made_result()
    forecast = dataclasses.replace(result.forecast, by_parameter=shares)
    direct = dataclasses.replace(result.split.direct, by_parameter=shares)
    return dataclasses.replace(result, forecast=forecast, split=dataclasses.replace(result.split, direct=direct))


def test_cells_add_up(monkeypatch):
    seen = []
    drawn = section.heat_map
    monkeypatch.setattr(
        section, "heat_map", lambda values, *a, **k: (seen.append((values, a)), drawn(values, *a, **k))[1]
    )
    found = layers_section(of(SHARES))
    for values, (rows, columns) in seen:
        np.testing.assert_array_equal(values, [[5.0, -7.0], [np.nan, 0.5]])
        assert rows == ["attn.q", "mlp"] and columns == ["layer 0", "layer 1"]
    assert [title for title, _ in found.figures] == ["Direct part", "In all"]
    assert [(k.name, k.share) for k in found.kinds] == [("attn.q", "−2.00"), ("mlp", "+0.500")]
    assert [(k.name, k.share) for k in found.others] == [("model.embed_tokens", "+1.00"), ("lm_head", "−0.250")]
    assert [label.text for label in found.figures[0][1].column_labels] == ["0", "1"]


def test_parameters_in_no_layer_have_no_map():
    found = layers_section(of({"a.weight": 1.0, "b.bias": 2.0}))
    assert found.figures == () and len(found.others) == 2
    assert layers_section(of(None)) is None
