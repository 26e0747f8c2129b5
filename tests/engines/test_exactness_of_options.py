"""The one-pass engine in fp64 against the definition, sequence by sequence, and under options of optimizer and probe."""

from __future__ import annotations

import warnings
from typing import get_args

import pytest
import torch
from engine_sums import assert_same_estimate, assert_same_sums, observe, relative
from exactness import BATCHES, BUDGET, FAMILIES, batch_of, padded
from probe_models.architectures import add_lora, build_model, stepped_adamw
from probe_models.batches import make_samples, pack
from probe_models.oracle import kernel_by_definition
from probe_models.own_dtype import computing_in_own_dtype
from torch import nn

from entropy_fast.config import Weighting
from entropy_fast.errors import EntropyFastWarning


def wide_model(family: str, *, lora: bool, targets: str | list[str] = "all-linear") -> nn.Module:
    base = build_model(family, dtype=torch.float64, tied=not lora)
    return add_lora(base, targets=targets).double() if lora else base


def optimizer_in_groups(model: nn.Module) -> torch.optim.AdamW:
    """Every third parameter in the same group; learning rates, decay of moments, eps and numbers of steps all differ."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    options = (
        {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-6},
        {"lr": 3e-3, "betas": (0.8, 0.999), "eps": 1e-2},
        {"lr": 2e-5, "betas": (0.95, 0.5), "eps": 1e-8},
    )
    optimizer = torch.optim.AdamW(
        [{"params": parameters[start::3], **chosen} for start, chosen in enumerate(options)], weight_decay=0.0
    )
    generator = torch.Generator().manual_seed(2)
    for step in range(3):
        for index, parameter in enumerate(parameters):
            values = 0.05 + torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            # Without a gradient a parameter does not step.
            parameter.grad = None if step == 1 and index % 2 else values.to(parameter.dtype)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


@pytest.mark.parametrize("grouped", [False, True], ids=["one group", "groups"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full, tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_definition(family: str, lora: bool, grouped: bool) -> None:
    """Unpadded sequences, one at a time. X_sum is the sum of the definition's own gradients, tensor by tensor."""
    model = wide_model(family, lora=lora)
    optimizer = optimizer_in_groups(model) if grouped else stepped_adamw(model)
    samples = make_samples((2, 4, 3), seed=8)
    with computing_in_own_dtype(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*one-pass engine does not know", category=EntropyFastWarning)
        expected = kernel_by_definition(model, optimizer, samples, budget=BUDGET)
        found = observe("one_pass", model, optimizer, padded(samples, 4, 2))
    assert relative(found.kernel, expected.matrix) <= 1e-10
    assert abs(found.result.delta_h1 - expected.same_batch) <= 1e-10 * abs(found.result.std_error or 0.0)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    total = [torch.stack(parts).sum(0) for parts in zip(*expected.x_gradients, strict=True)]
    largest = max(float(t.norm()) for t in total)
    for name, tensor in zip(names, total, strict=True):
        error = float((found.sums["X"][name] - tensor).norm())
        assert error <= 1e-10 * max(float(tensor.norm()), 1e-3 * largest), name


@pytest.mark.parametrize("weighting", get_args(Weighting))
@pytest.mark.parametrize("batch", BATCHES)
def test_every_weighting(weighting: str, batch: str) -> None:
    model = wide_model("qwen3", lora=True)
    optimizer = optimizer_in_groups(model)
    with computing_in_own_dtype(model):
        one, two = (
            observe(engine, model, optimizer, batch_of(batch), weighting=weighting)
            for engine in ("one_pass", "two_pass")
        )
    assert_same_sums(one, two, 1e-10)
    assert_same_estimate(one, two, 1e-10)


SOME_MAPS = (["q_proj"], ["k_proj"], ["v_proj"], ["q_proj", "v_proj"], ["o_proj"], ["down_proj"])


@pytest.mark.parametrize("targets", SOME_MAPS, ids=" ".join)
def test_adapters_on_some_maps(targets: list[str]) -> None:
    """In the first layer what has no adapter before it needs no gradient: queries, keys or values, one without the others."""
    model = wide_model("llama", lora=True, targets=targets)
    optimizer = stepped_adamw(model)
    with computing_in_own_dtype(model):
        one, two = (observe(engine, model, optimizer, batch_of("uneven groups")) for engine in ("one_pass", "two_pass"))
    assert_same_sums(one, two, 1e-10)
    assert_same_estimate(one, two, 1e-10)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "gemma3"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full, tied"])
@pytest.mark.filterwarnings("ignore:.*one-pass engine does not know")
def test_padding_of_the_batch_does_not_matter(family: str, lora: bool) -> None:
    """Learned positions, offset ones, rotary ones and a sliding window: bit for bit the same, whatever the padding."""
    model = build_model(family, tied=not lora)
    model = add_lora(model) if lora else model
    optimizer = stepped_adamw(model)
    samples = make_samples((2, 3, 2), seed=8)
    plain = observe("one_pass", model, optimizer, pack(samples, max_lengths=BUDGET))
    for left, right in ((1, 0), (9, 0), (0, 4), (13, 7)):
        found = observe("one_pass", model, optimizer, padded(samples, left, right))
        assert torch.equal(found.kernel, plain.kernel)
        assert found.result.delta_h1 == plain.result.delta_h1
