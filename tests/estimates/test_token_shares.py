"""Shares of response tokens: (c_t ∇s_t + e_t ∇H_t) along the other prompts' updates, token by token with plain autograd.

Legend: s_t log-prob and H_t entropy of response token t, c_t and e_t coefficients, Y_m preconditioned update gradient of prompt
m, V_n = Σ_{m ≠ n} Y_m (one batch) or Σ_m Y_m (two).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from probe_options import options_of
from probe_oracle import models
from probe_oracle.batches import Shape, make_rollouts
from probe_oracle.oracle import prompt_gradients, relative_error
from probe_oracle.token_gradients import flat_gradient, groups_of, token_values
from torch import Tensor, nn

from entropy_fast import Rollouts, fast_delta_h1
from entropy_fast.errors import ConfigError

Setup = tuple[nn.Module, torch.optim.Optimizer]
SHAPE = Shape(sizes=(2, 3, 2), longest_response=3, budget=1, empty=1)

pytestmark = pytest.mark.filterwarnings("ignore:.*without response tokens were left out")


def coefficients_of(rollouts: Rollouts, h: Tensor) -> tuple[Tensor, Tensor]:
    """[N, T] c_t and e_t with weights 1/L_max."""
    order = list(dict.fromkeys(rollouts.group_ids.tolist()))
    c, e = torch.zeros_like(h), torch.zeros_like(h)
    for members in groups_of(rollouts):
        w = 1 / float(rollouts.max_lengths[order.index(int(rollouts.group_ids[members[0]]))])  # type: ignore[index]
        places = {row: (rollouts.loss_mask[row] == 1).nonzero().flatten().tolist() for row in members}
        for row in members:
            for t, column in enumerate(places[row]):
                others = [j for j in members if j != row and len(places[j]) > t]
                to_go = {j: w * sum(float(h[j, k]) for k in places[j][t + 1 :]) for j in (row, *others)}
                compared = sum(to_go[j] for j in others) / len(others) if others else 0.0
                c[row, column] = (to_go[row] - compared) / len(members)
                e[row, column] = w / len(members)
    return c, e


def shares_of(setup: Setup, rollouts: Rollouts, directions: list[Tensor]) -> tuple[Tensor, Tensor]:
    """[N, T] of the whole and of the direct part, for a direction a prompt."""
    s, h = token_values(setup[0], rollouts)
    c, e = coefficients_of(rollouts, h.detach())
    whole, direct = torch.zeros_like(c), torch.zeros_like(c)
    for members, direction in zip(groups_of(rollouts), directions, strict=True):
        for row in members:
            for column in (rollouts.loss_mask[row] == 1).nonzero().flatten().tolist():
                of_s, of_h = (float(flat_gradient(t[row, column], setup[0]) @ direction) for t in (s, h))
                direct[row, column] = e[row, column] * of_h
                whole[row, column] = c[row, column] * of_s + direct[row, column]
    return whole, direct


def assert_shares(result: Any, whole: Tensor, direct: Tensor, factor: float) -> None:
    for found, expected in (
        (result.split.total, whole),
        (result.split.direct, direct),
        (result.split.visitation, whole - direct),
    ):
        assert relative_error(found.by_token, factor * expected) < 1e-9
        assert abs(float(found.by_token.sum()) - found.value) <= 1e-9 * float(found.by_token.abs().sum())


@pytest.mark.parametrize("family", ["tiny", "qwen2"])
def test_one_batch(setups: dict[str, Setup], family: str) -> None:
    setup, rollouts = setups[family], make_rollouts(SHAPE, models.VOCABULARY, 0)
    options = options_of(entropy_estimator="rao_blackwell", learning_rate=2.0, engine="one_pass", by_token=True)
    result = fast_delta_h1(*setup, rollouts, **options)
    y = prompt_gradients(*setup, rollouts, "dr_grpo").y
    B = len(y)
    whole, direct = shares_of(setup, rollouts, [y.sum(0) - own for own in y])
    assert_shares(result, whole, direct, 2.0 / (B * (B - 1)))


@pytest.mark.parametrize("engine", ["one_pass", "jvp"])
def test_two_batches(setups: dict[str, Setup], engine: str) -> None:
    setup = setups["qwen2"]
    entropy, update = (make_rollouts(SHAPE, models.VOCABULARY, seed) for seed in (1, 2))
    asked = {"by_token": True} if engine == "one_pass" else {}
    options = options_of(entropy_estimator="rao_blackwell", learning_rate=2.0, engine=engine, **asked)
    result = fast_delta_h1(*setup, update, entropy_rollouts=entropy, **options)
    y = prompt_gradients(*setup, update, "dr_grpo").y
    B = len(y)
    assert_shares(result, *shares_of(setup, entropy, [y.sum(0)] * B), 2.0 / B**2)


def test_they_are_not_known_unasked_and_not_to_be_had_without_the_gradients(setups: dict[str, Setup]) -> None:
    setup, rollouts = setups["tiny"], make_rollouts(SHAPE, models.VOCABULARY, 0)
    assert fast_delta_h1(*setup, rollouts, **options_of(engine="one_pass")).by_token is None
    with pytest.raises(ConfigError, match="by_token needs every unit's own gradients"):
        fast_delta_h1(*setup, rollouts, **options_of(engine="one_pass", by_token=True, memory_budget=1))
    with pytest.raises(ConfigError, match="'two_pass' has no use for it"):
        fast_delta_h1(*setup, rollouts, **options_of(engine="two_pass", by_token=True))


@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
def test_shares_of_parameters_and_sequences_of_every_part(setups: dict[str, Setup], engine: str) -> None:
    setup, rollouts = setups["qwen2"], make_rollouts(SHAPE, models.VOCABULARY, 3)
    asked = {"by_sequence": True} if engine == "one_pass" else {}
    result = fast_delta_h1(*setup, rollouts, **options_of(entropy_estimator="rao_blackwell", engine=engine, **asked))
    parts = (result.split.total, result.split.direct, result.split.visitation)
    for part in parts:
        assert abs(sum(part.by_parameter.values()) - part.value) <= 1e-9 * abs(parts[0].value)
        assert abs(sum(part.by_layer.values()) - part.value) <= 1e-9 * abs(parts[0].value)
        if engine == "one_pass":
            shares = part.by_sequence["both"]
            size = float(shares.delta_h1.abs().sum())
            for role in (shares.delta_h1, shares.as_entropy, shares.as_update):
                assert abs(float(role.sum()) - part.value) <= 1e-9 * size
            by_prompt = [float(shares.delta_h1[rows].sum()) for rows in groups_of(rollouts)]
            assert relative_error(by_prompt, part.by_unit) < 1e-9
