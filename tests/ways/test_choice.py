"""The ways through a microbatch: which is taken, and that they give the same."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from engine_results import GROUPS, TOLERANCE, assert_same, distance, results
from probe_models.architectures import (
    BUILDERS,
    VOCABULARY,
    add_lora,
    build_model,
    disable_checkpointing,
    enable_checkpointing,
    stepped_adamw,
)
from probe_models.batches import make_samples, pack
from probe_options import options_of
from refused_ways import refuse
from torch import nn

from entropy_fast import DeltaH1Result, fast_delta_h1
from entropy_fast.errors import GraphDetachedError
from entropy_fast.ways.packed import PackedWay, way
from entropy_fast.ways.padded import HiddenStatesWay


def plan_of(result: DeltaH1Result) -> str:
    assert result.diagnostics.plan is not None
    return result.diagnostics.plan.way


PACKED = "packed without padding, prompts' tokens shared by their responses"
PACKED_WHOLE = "packed without padding, whole sequences"
WHOLE = "whole sequences, log-probs from hidden states"
LOGITS = "whole sequences, the model's own logits"


@pytest.mark.parametrize("family", BUILDERS)
def test_the_ways_give_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way through a microbatch leads to one kernel, and the plan says which it was."""
    dtype = torch.float32 if family == "gemma2" else torch.float64
    model = add_lora(build_model(family, dtype=dtype)).to(dtype)
    optimizer = stepped_adamw(model)

    def run(expected: str) -> DeltaH1Result:
        result = results(model, optimizer=optimizer)["one_pass"]
        assert plan_of(result).startswith(expected)
        return result

    packed = run(PACKED)
    with monkeypatch.context() as patch:
        patch.setattr(way, "reentrant_checkpointing", lambda *_: "as if")
        others = [run(PACKED_WHOLE)]
    refuse(monkeypatch, PackedWay)
    others.append(run(WHOLE))
    refuse(monkeypatch, HiddenStatesWay)
    others.append(run(LOGITS))
    for other in others:
        assert_same(packed, other, TOLERANCE.get(family, 1e-10))


@pytest.mark.parametrize("reentrant", [False, True])
def test_packing_under_checkpointing(reentrant: bool) -> None:
    """Reentrant checkpointing loses the graph of a prompt's keys and values, so whole sequences are packed there."""
    model = add_lora(build_model("gpt2", dtype=torch.float64)).double()
    enable_checkpointing(model, reentrant=reentrant)
    try:
        both = results(model)
    finally:
        disable_checkpointing(model)
    assert plan_of(both["one_pass"]).startswith(PACKED_WHOLE if reentrant else PACKED)
    assert_same(both["one_pass"], both["two_pass"], 1e-10)


def test_an_output_layer_that_does_more_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = add_lora(build_model("qwen2"))
    inner = type(model.get_base_model())
    plain = inner.forward

    def scaled(self: nn.Module, *arguments: object, **options: object) -> object:
        output = plain(self, *arguments, **options)
        output.logits = output.logits * 0.9
        return output

    monkeypatch.setattr(inner, "forward", scaled)
    both = results(model)
    assert plan_of(both["one_pass"]).startswith(LOGITS)
    assert distance(both["one_pass"].kernel, both["two_pass"].kernel) < 1e-4


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_frequencies_that_depend_on_length_forbid_sharing(kind: str) -> None:
    model = add_lora(build_model("llama"))
    config = model.get_base_model().model.config
    config.rope_parameters = {**config.rope_parameters, "rope_type": kind}
    assert plan_of(results(model)["one_pass"]).startswith(WHOLE)


def test_a_nan_in_a_later_prompt_is_an_error() -> None:
    model = add_lora(build_model("gpt2"))
    optimizer = stepped_adamw(model)
    samples = make_samples(GROUPS, interleave=False)
    token = samples[-1].response[0]
    used = {t for s in samples[:-4] for t in (*s.prompt, *s.response)}
    assert token not in used or len(used) < VOCABULARY
    fresh = next(t for t in range(1, VOCABULARY) if t not in used)
    with torch.no_grad():
        model.get_input_embeddings().weight[fresh] = float("nan")
        model.get_base_model().lm_head.weight = nn.Parameter(
            model.get_base_model().lm_head.weight.nan_to_num(), requires_grad=False
        )
    last = [dataclasses.replace(s, prompt=(*s.prompt, fresh)) for s in samples[-4:]]
    with pytest.raises(GraphDetachedError, match="log-probs are NaN"):
        fast_delta_h1(model, optimizer, pack(samples[:-4] + last), **options_of(engine="one_pass"))
