"""Shares of sequences and parameters against their definition: a gradient for every sequence, products of all pairs."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator

import pytest
import torch
from probe_models.architectures import (
    add_lora,
    build_model,
    disable_checkpointing,
    enable_checkpointing,
    stepped_adamw,
)
from probe_models.batches import Sample, make_samples, pack
from probe_models.own_dtype import computing_in_own_dtype
from probe_models.shares import Shares, shares_by_definition
from probe_options import options_of
from refused_ways import refuse
from torch import Tensor, nn

from entropy_fast import DeltaH1Result, OfflineEntropyProbe
from entropy_fast.errors import ConfigError, EntropyFastWarning
from entropy_fast.ways.packed import PackedWay
from entropy_fast.ways.padded import HiddenStatesWay

GROUPS = (2, 3, 2, 4)


def model_of(family: str, adapter: bool) -> nn.Module:
    model = build_model(family, dtype=torch.float64)
    return add_lora(model).double() if adapter else model


def probe_of(model: nn.Module, optimizer: torch.optim.Optimizer, **options: object) -> OfflineEntropyProbe:
    return OfflineEntropyProbe(model, optimizer, **options_of(by_sequence=True, engine="one_pass", **options))


def assert_close(found: Tensor, expected: Tensor) -> None:
    """To 1e-9 of the largest; shares of different signs nearly cancel in their sum."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


def assert_parameters(result: DeltaH1Result, expected: Shares) -> None:
    assert result.by_parameter is not None
    assert list(result.by_parameter) == expected.names
    assert_close(torch.tensor(list(result.by_parameter.values()), dtype=torch.float64), expected.terms.sum((1, 2)))
    assert sum(result.by_parameter.values()) == pytest.approx(result.delta_h1, rel=1e-9)
    assert sum(result.by_layer.values()) == pytest.approx(result.delta_h1, rel=1e-9)


def assert_same_batch(result: DeltaH1Result, expected: Shares, samples: list[Sample]) -> None:
    found = result.by_sequence["both"]
    assert_close(found.as_entropy, expected.as_entropy)
    assert_close(found.as_update, expected.as_update)
    assert_close(found.delta_h1, (expected.as_entropy + expected.as_update) / 2)
    for name in ("delta_h1", "as_entropy", "as_update"):
        shares = getattr(found, name)
        assert float(shares.sum()) == pytest.approx(result.delta_h1, rel=1e-9), name
        for prompt in result.per_prompt:
            own = [i for i, s in enumerate(samples) if s.group in prompt.group_ids]
            size = float(shares.abs().max())
            assert float(shares[own].sum()) == pytest.approx(getattr(prompt, name), rel=1e-9, abs=1e-10 * size), name
    assert bool(found.counted.all())
    assert_parameters(result, expected)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=EntropyFastWarning)
        yield


@pytest.mark.parametrize(
    ("family", "adapter", "options"),
    [
        ("gpt2", False, {}),
        ("gpt2", True, {"weighting": "per_token", "blocks": 3}),
        ("qwen2", False, {"weighting": "sequence", "accumulate_on": "cpu"}),
        ("qwen2", True, {"blocks": 2, "prompts_per_microbatch": 1}),
        ("qwen2", True, {"prompts_per_microbatch": 2}),
    ],
)
def test_one_batch(family: str, adapter: bool, options: dict) -> None:
    model, samples = model_of(family, adapter), make_samples(GROUPS)
    optimizer = stepped_adamw(model)
    with computing_in_own_dtype(model):
        result = probe_of(model, optimizer, **options).compute_delta_h1(pack(samples))
        reference = OfflineEntropyProbe(model, optimizer, **options_of(**options)).compute_delta_h1(pack(samples))
        known = {name: options[name] for name in ("weighting", "blocks") if name in options}
        expected = shares_by_definition(model, optimizer, samples, **known)
    assert "packed" in result.plan.way
    assert_same_batch(result, expected, samples)
    assert_parameters(reference, expected)


@pytest.mark.parametrize("budget", [0, 4 * 2**30])
def test_two_batches(budget: int) -> None:
    """Nothing of a unit's own is left out, so that no unit's gradients need be kept."""
    model = model_of("qwen2", True)
    optimizer = stepped_adamw(model)
    entropy, update = make_samples((3, 2, 2), seed=2), make_samples(GROUPS, seed=1)
    with computing_in_own_dtype(model):
        result = probe_of(model, optimizer, memory_budget=budget).run_mixed_probe(
            entropy_rollouts=pack(entropy), update_rollouts=pack(update)
        )
        expected = shares_by_definition(model, optimizer, entropy, update)
    assert result.by_sequence.keys() == {"entropy", "update"}
    of_entropy, of_update = result.by_sequence["entropy"], result.by_sequence["update"]
    assert (of_entropy.as_update, of_update.as_entropy) == (None, None)
    assert_close(of_entropy.as_entropy, expected.as_entropy)
    assert_close(of_update.as_update, expected.as_update)
    for shares in (of_entropy, of_update):
        assert float(shares.delta_h1.sum()) == pytest.approx(result.delta_h1, rel=1e-9)
    assert_parameters(result, expected)
    reference = OfflineEntropyProbe(model, optimizer).run_mixed_probe(
        entropy_rollouts=pack(entropy), update_rollouts=pack(update)
    )
    assert sum(reference.by_parameter.values()) == pytest.approx(reference.delta_h1, rel=1e-9)


@pytest.mark.parametrize("how", ["checkpointing", "reentrant", "padded", "logits"])
def test_other_ways_through_the_batch(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = model_of("qwen2", True), make_samples(GROUPS)
    optimizer = stepped_adamw(model)
    with computing_in_own_dtype(model):
        expected = shares_by_definition(model, optimizer, samples)
        refuse(monkeypatch, *{"padded": (PackedWay,), "logits": (PackedWay, HiddenStatesWay)}.get(how, ()))
        if how in ("checkpointing", "reentrant"):
            enable_checkpointing(model, reentrant=how == "reentrant")
        try:
            result = probe_of(model, optimizer, prompts_per_microbatch=3).compute_delta_h1(pack(samples))
        finally:
            disable_checkpointing(model)
    assert ("packed" in result.plan.way) == (how in ("checkpointing", "reentrant"))
    assert_same_batch(result, expected, samples)


def test_parameters_on_the_slower_path() -> None:
    """A layer's own weight used once more, outside of any module: its shares come from a backward for every sequence."""
    model, samples = model_of("gpt2", False), make_samples(GROUPS)
    weight = model.transformer.h[1].mlp.c_fc.weight
    model.register_forward_hook(
        lambda _m, _i, out: out.__setitem__("logits", out.logits * (1 + weight.square().mean()))
    )
    optimizer = stepped_adamw(model)
    with quiet():
        result = probe_of(model, optimizer).compute_delta_h1(pack(samples))
    assert any("does not know" in note for note in result.diagnostics.warnings)
    assert_same_batch(result, shares_by_definition(model, optimizer, samples), samples)


def test_rows_without_response_tokens_have_a_share_of_nothing() -> None:
    model, samples = model_of("gpt2", True), make_samples(GROUPS)
    optimizer = stepped_adamw(model)
    # The first sequence of the prompt with four, and a whole prompt of its own.
    first = next(i for i, s in enumerate(samples) if s.group == 13)
    alone = dataclasses.replace(samples[0], group=99, response=())
    empty = [i if i != first else None for i in range(len(samples))]
    given = [dataclasses.replace(s, response=()) if i == first else s for i, s in enumerate(samples)] + [alone]
    with quiet():
        result = probe_of(model, optimizer).compute_delta_h1(pack(given))
    kept = [i for i in empty if i is not None]
    expected = shares_by_definition(model, optimizer, [samples[i] for i in kept])
    found = result.by_sequence["both"]
    assert found.counted.tolist() == [i in kept for i in range(len(given))]
    assert_close(found.as_entropy[kept], expected.as_entropy)
    assert found.delta_h1[~found.counted].tolist() == [0.0, 0.0]
    assert float(found.delta_h1.sum()) == pytest.approx(result.delta_h1, rel=1e-9)


def test_what_cannot_be_is_refused_before_any_work() -> None:
    model = model_of("gpt2", True)
    optimizer = stepped_adamw(model)
    model.register_forward_pre_hook(lambda *_: 1 / 0)
    rollouts = pack(make_samples(GROUPS))
    with pytest.raises(ConfigError, match=r"memory_budget is 0 bytes(.|\n)*independent entropy batch"):
        probe_of(model, optimizer, memory_budget=0).compute_delta_h1(rollouts)
    for engine in ("two_pass", "jvp"):
        with pytest.raises(ConfigError, match=f"`by_sequence` is True, and engine '{engine}' has no use"):
            OfflineEntropyProbe(model, optimizer, **options_of(by_sequence=True, engine=engine))


def test_nothing_is_said_of_sequences_unless_asked() -> None:
    model = model_of("gpt2", True)
    probe = OfflineEntropyProbe(model, stepped_adamw(model), **options_of(engine="one_pass"))
    result = probe.compute_delta_h1(pack(make_samples(GROUPS)))
    assert result.by_sequence is None
    assert result.plan.sweeps == 1


def test_rounding_that_keeps_shares_from_adding_up_is_named() -> None:
    model = add_lora(build_model("qwen2"))
    probe = probe_of(model, stepped_adamw(model), autocast_dtype=torch.bfloat16)
    gaps = []
    # That eight bits happen to leave a gap of less than a millionth takes a luck of about 10^-4 in each batch.
    for seed in range(3):
        result = probe.compute_delta_h1(pack(make_samples(GROUPS, seed=seed)))
        gap = abs(float(result.by_sequence["both"].delta_h1.sum()) - result.delta_h1)
        said = any(f"add up to δH₁ but for {gap:.2g}" in note for note in result.diagnostics.warnings)
        assert said == (gap > 1e-6 * abs(result.delta_h1))
        gaps.append(gap / abs(result.delta_h1))
    assert max(gaps) > 1e-6
