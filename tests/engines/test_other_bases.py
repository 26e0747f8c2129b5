"""The one-pass engine over routed experts, 8-bit linear maps and real weights."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from engine_sums import assert_same_estimate, assert_same_sums, observe, relative
from exactness import BATCHES, BUDGET, batch_of
from probe_models.architectures import add_lora, build_model, stepped_adamw
from probe_models.batches import make_samples, pack
from probe_models.oracle import kernel_by_definition
from probe_models.other_bases import MIXTURES, build_mixture, quantize_int8, smollm2_with_lora
from probe_models.own_dtype import computing_in_own_dtype

from entropy_fast.errors import EntropyFastWarning
from entropy_fast.step import AdamState

# Routers take their softmax in fp32 whatever the model's dtype is.
ROUTERS = 2e-6


@pytest.mark.parametrize("router_logits", [False, True])
@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_exact_on_the_slower_path(family: str, router_logits: bool) -> None:
    """The load-balancing loss that comes with router logits is no part of a log-prob, and changes nothing."""
    model = build_mixture(family, router_logits=router_logits)
    assert model.config.output_router_logits is router_logits
    optimizer = stepped_adamw(model)
    rollouts = batch_of("uneven groups")
    with computing_in_own_dtype(model):
        with pytest.warns(EntropyFastWarning, match="6 of .* trainable parameters are used in ways"):
            one = observe("one_pass", model, optimizer, rollouts)
        two = observe("two_pass", model, optimizer, rollouts)
        expected = kernel_by_definition(model, optimizer, BATCHES["uneven groups"](5), budget=BUDGET)
    assert relative(one.kernel, expected.matrix) <= ROUTERS
    assert_same_sums(one, two, ROUTERS)
    assert_same_estimate(one, two, ROUTERS)
    for name, tensor in one.sums["X"].items():
        assert bool((tensor != 0).any()), name


@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize("family", ["qwen2", "llama", "opt"])
def test_lora_over_8_bit_maps(family: str, threshold: float) -> None:
    """Both engines round activations to 8 bits alike, row by row, so that they agree as fp32 does; all is captured."""
    model = add_lora(quantize_int8(build_model(family), threshold=threshold))
    assert "Linear8bitLt" in {type(m).__name__ for m in model.modules()}
    optimizer = stepped_adamw(model)
    rollouts = batch_of("uneven groups")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*one-pass engine does not know.*", category=EntropyFastWarning)
        one, two = (observe(engine, model, optimizer, rollouts) for engine in ("one_pass", "two_pass"))
    plain = observe("two_pass", add_lora(build_model(family)), AdamState.from_optimizer(optimizer, model), rollouts)
    assert relative(plain.kernel, two.kernel) > 1e-3  # it really rounds
    assert relative(one.kernel, two.kernel) <= 1e-4
    assert abs(one.u - two.u) <= 1e-4 * two.std_error


@pytest.mark.slow
@pytest.mark.exhaustive
def test_real_weights() -> None:
    """Thirty layers with the activations of a trained model, against fp64 of the same weights."""
    model = smollm2_with_lora()
    optimizer = stepped_adamw(model)
    rollouts = pack(make_samples((2, 3, 2), seed=3))
    one, two = (observe(engine, model, optimizer, rollouts) for engine in ("one_pass", "two_pass"))
    wide = copy.deepcopy(model).double()
    wide_optimizer = torch.optim.AdamW([p for p in wide.parameters() if p.requires_grad])
    wide_optimizer.load_state_dict(optimizer.state_dict())
    with computing_in_own_dtype(wide):
        exact, truth = (observe(engine, wide, wide_optimizer, rollouts) for engine in ("one_pass", "two_pass"))
    assert_same_sums(exact, truth, 1e-10)
    assert_same_estimate(exact, truth, 1e-10)
    assert relative(one.kernel, truth.kernel) <= 1.5 * relative(two.kernel, truth.kernel)
    assert abs(one.u - truth.u) <= 0.1 * truth.std_error
