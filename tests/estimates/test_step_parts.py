"""The optimizer's whole next step: its forecast and parts, against loops in which the real optimizer steps.

Legend: X_n entropy gradient of prompt n, g_n its ascent gradient, B prompts, Δθ(g) what the optimizer adds to the parameters
when it sees the loss gradient g. The forecast is the mean over prompts of X_n · Δθ(-mean of the other prompts' g, clipped).
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from probe_options import options_of
from probe_oracle import models
from probe_oracle.batches import Shape, make_rollouts
from probe_oracle.oracle import prompt_gradients
from torch import Tensor, nn

from entropy_fast import DeltaH1Result, Rollouts, fast_delta_h1
from entropy_fast.errors import ConfigError, GradientCoverageError

SHAPE = Shape(budget=2)
MOST = 0.05  # of the gradient's norm: less than it is, so that clipping does something
PARTS = ("momentum", "decay", "fresh", "scale")

Make = Callable[[nn.Module], torch.optim.Optimizer]


def stepped(make: Make) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = models.tiny_transformer().train()
    optimizer = make(model)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for p in model.parameters():
            p.grad = 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, betas=(0.8, 0.9), weight_decay=0.1),
    "nesterov": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-3, momentum=0.5, weight_decay=0.1),
    "never stepped": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3),
}


@pytest.fixture(scope="module")
def setups() -> dict[str, tuple[nn.Module, torch.optim.Optimizer]]:
    found = {name: stepped(make) for name, make in OPTIMIZERS.items() if name != "never stepped"}
    model = models.tiny_transformer().train()
    return {**found, "never stepped": (model, OPTIMIZERS["never stepped"](model))}


def batch(seed: int = 0) -> Rollouts:
    return make_rollouts(SHAPE, models.VOCABULARY, seed)


def forecast(setup: tuple[nn.Module, torch.optim.Optimizer], **options: Any) -> DeltaH1Result:
    entropy = options.pop("entropy", None)
    rollouts = options.pop("rollouts", None)
    return fast_delta_h1(
        *setup,
        batch() if rollouts is None else rollouts,
        entropy_rollouts=entropy,
        **options_of(step="next", **options),
    )


def gradients(model: nn.Module, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """[B, D] X_n and g_n, by loops."""
    plain = torch.optim.Adam(model.parameters(), lr=1.0, betas=(0.0, 0.0), eps=0.0)  # P = 1
    for p in model.parameters():
        plain.state[p] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.ones_like(p)}
    found = prompt_gradients(model, plain, rollouts, "dr_grpo")
    return found.x, found.y


def moved(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    """[D] what a real step on a copy adds."""
    model, optimizer = copy.deepcopy((model, optimizer))
    parameters = list(model.parameters())
    before = torch.nn.utils.parameters_to_vector(parameters).detach()
    for p, g in zip(parameters, loss.split([p.numel() for p in parameters]), strict=True):
        p.grad = g.view_as(p).clone()
    optimizer.step()
    return torch.nn.utils.parameters_to_vector(parameters).detach() - before


def clipping(g: Tensor, most: float | None) -> float:
    return 1.0 if most is None else min(1.0, most / (float(g.norm()) + 1e-6))


def rows(setup: tuple[nn.Module, torch.optim.Optimizer], most: float | None, *, alone: bool = False) -> Tensor:
    """[B] X_n · Δθ of the other prompts; of the whole batch where ``alone``."""
    x, g = gradients(setup[0], batch())
    factor = clipping(g.mean(0), most)
    others = [g if alone else torch.cat([g[:n], g[n + 1 :]]) for n in range(len(g))]
    return torch.stack([own @ moved(*setup, -factor * rest.mean(0)) for own, rest in zip(x, others, strict=True)])


def close(found: float, expected: float, scale: float) -> None:
    assert abs(found - expected) <= 1e-9 * scale


WAYS: dict[str, dict[str, Any]] = {
    "one_pass": {"engine": "one_pass"},
    "in two sweeps": {"engine": "one_pass", "memory_budget": 2000},
    "two_pass": {"engine": "two_pass"},
}

USUAL = {("adamw", way, MOST) for way in WAYS} | {(name, "one_pass", None) for name in OPTIMIZERS}
COMBINATIONS = [
    pytest.param(*case, marks=[] if case in USUAL else pytest.mark.exhaustive)
    for case in itertools.product(OPTIMIZERS, WAYS, (None, MOST))
]


@pytest.mark.parametrize(("name", "way", "most"), COMBINATIONS)
def test_one_batch_is_the_mean_over_prompts_of_the_others_step(
    setups: dict[str, tuple[nn.Module, torch.optim.Optimizer]], name: str, way: str, most: float | None
) -> None:
    expected = rows(setups[name], most)
    scale = float(expected.abs().sum())
    result = forecast(setups[name], max_grad_norm=most, **WAYS[way])
    close(result.delta_h1, float(expected.mean()), scale)
    close(result.std_error, float(expected.std() / math.sqrt(len(expected))), scale)
    torch.testing.assert_close(result.forecast.by_unit * len(expected), expected, rtol=0, atol=1e-9 * scale)
    assert [p.as_entropy for p in result.per_prompt] == [p.delta_h1 for p in result.per_prompt]
    by_parameter = result.by_parameter
    assert by_parameter is not None
    close(sum(by_parameter.values()), result.delta_h1, scale)
    _, g = gradients(setups[name][0], batch())
    close(result.diagnostics.clip_factor, clipping(g.mean(0), most), 1.0)
    assert result.geometry == "next_step"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parts_add_up(setups: dict[str, tuple[nn.Module, torch.optim.Optimizer]], name: str) -> None:
    result = forecast(setups[name], entropy_estimator="rao_blackwell")
    parts = result.step_parts
    assert tuple(parts) == (PARTS[:3] if name == "rmsprop" else PARTS)
    assert result.split is not None
    scale = sum(abs(part.forecast.value) for part in parts.values())
    for pick in (
        lambda r: r.forecast.value,
        lambda r: r.split.direct.value,
        lambda r: r.split.visitation.value,
        lambda r: r.split.on_batch,
    ):
        close(sum(pick(part) for part in parts.values()), pick(result), scale)
    # Momentum and decay are no sample's: such updates are as well known as this one.
    for fixed in ("momentum", "decay"):
        assert parts[fixed].forecast.std_error == parts[fixed].forecast.population_std_error
    # Of other batches' steps nothing is known where none of it is linear, or no element has a scale yet.
    assert math.isnan(result.forecast.population_std_error) == (name in ("rmsprop", "never stepped"))
    if name == "never stepped":
        assert parts["momentum"].forecast.value == parts["fresh"].forecast.value == 0.0


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("way", ["one_pass", "two_pass"])
def test_two_batches_meet_the_whole_step(
    setups: dict[str, tuple[nn.Module, torch.optim.Optimizer]], name: str, way: str
) -> None:
    model, optimizer = setups[name]
    x, _ = gradients(model, batch(1))
    _, g = gradients(model, batch())
    step = moved(model, optimizer, -clipping(g.mean(0), MOST) * g.mean(0))
    expected = x @ step
    scale = float(expected.abs().sum())
    result = forecast(setups[name], entropy=batch(1), max_grad_norm=MOST, **WAYS[way])
    close(result.delta_h1, float(expected.mean()), scale)
    close(result.std_error, float(expected.std() / math.sqrt(len(expected))), scale)


def test_shares_of_sequences_and_tokens_are_along_the_step(
    setups: dict[str, tuple[nn.Module, torch.optim.Optimizer]],
) -> None:
    for entropy in (None, batch(1)):
        result = forecast(
            setups["adamw"], entropy=entropy, entropy_estimator="rao_blackwell", by_sequence=True, by_token=True
        )
        scale = float(result.forecast.by_unit.abs().sum())
        assert result.by_sequence is not None and result.by_token is not None
        of_sequences = result.by_sequence["both" if entropy is None else "entropy"]
        close(float(of_sequences.delta_h1.sum()), result.delta_h1, scale)
        torch.testing.assert_close(result.by_token.sum(1), of_sequences.delta_h1, rtol=0, atol=1e-9 * scale)
        if entropy is None:
            assert of_sequences.as_update is not None
            close(float(of_sequences.as_update.sum()), result.step_parts["fresh"].forecast.value, scale)


def test_momentum_moves_the_entropy_where_no_advantage_does(
    setups: dict[str, tuple[nn.Module, torch.optim.Optimizer]],
) -> None:
    rollouts = batch()
    assert rollouts.advantages is not None
    rollouts = dataclasses.replace(rollouts, advantages=torch.zeros_like(rollouts.advantages))
    result = forecast(setups["adamw"], rollouts=rollouts)
    model, optimizer = setups["adamw"]
    x, _ = gradients(model, batch())
    expected = x @ moved(model, optimizer, torch.zeros(x.shape[1], dtype=torch.float64))
    close(result.delta_h1, float(expected.mean()), float(expected.abs().sum()))
    assert any("exactly 0" in note for note in result.diagnostics.warnings)
    with pytest.raises(ConfigError, match="one direction"):
        forecast(setups["adamw"], engine="jvp", entropy=batch(1))


def test_unequal_blocks_have_no_shares_along_the_step(
    setups: dict[str, tuple[nn.Module, torch.optim.Optimizer]],
) -> None:
    result = forecast(setups["adamw"], blocks=2)
    assert [p.n_responses for p in result.per_prompt] and math.isfinite(result.delta_h1)
    with pytest.raises(ConfigError, match="unequal blocks"):
        forecast(setups["adamw"], blocks=2, by_sequence=True)


def test_the_step_is_chosen_by_what_is_given(
    setups: dict[str, tuple[nn.Module, torch.optim.Optimizer]], tmp_path: Any
) -> None:
    model, optimizer = setups["adamw"]
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    live = forecast(setups["adamw"])
    for step, given, geometry in (
        (None, optimizer, "next_step"),
        (None, tmp_path / "optimizer.pt", "adam_static"),
        ("next", tmp_path / "optimizer.pt", "next_step"),
        ("adam_static", optimizer, "adam_static"),
    ):
        result = fast_delta_h1(model, given, batch(), **options_of(step=step))
        assert result.geometry == geometry
        if geometry == "next_step":
            close(result.delta_h1, live.delta_h1, abs(live.delta_h1))
    # An engine that cannot take the whole step says so where nobody asked for it by name.
    result = fast_delta_h1(model, optimizer, batch(), entropy_rollouts=batch(1), **options_of(step=None, engine="jvp"))
    assert result.geometry == "adam_static" and any("static geometry" in note for note in result.diagnostics.warnings)
    with pytest.raises(GradientCoverageError):
        fast_delta_h1(*setups["never stepped"], batch(), **options_of(step="adam_static"))


class TestLive:
    """The gradient that stands in .grad."""

    @staticmethod
    def filled(setup: tuple[nn.Module, torch.optim.Optimizer], factor: float = 1.0) -> Tensor:
        model = setup[0]
        _, g = gradients(model, batch())
        loss = -factor * g.mean(0)
        for p, own in zip(model.parameters(), loss.split([p.numel() for p in model.parameters()]), strict=True):
            p.grad = own.view_as(p).clone()
        return loss

    @pytest.mark.parametrize(
        ("name", "factor"),
        [
            ("adamw", 1.0),
            ("adamw", 0.25),
            ("rmsprop", 0.25),
            *(pytest.param(name, 1.0, marks=pytest.mark.exhaustive) for name in OPTIMIZERS if name != "adamw"),
        ],
    )
    def test_of_the_whole_batch_it_is_what_the_rollouts_say(self, name: str, factor: float) -> None:
        model = models.tiny_transformer().train()
        setup = stepped(OPTIMIZERS[name]) if name != "never stepped" else (model, OPTIMIZERS[name](model))
        most = None if factor == 1 else factor * (float(gradients(setup[0], batch())[1].mean(0).norm()) + 1e-6)
        expected = forecast(setup, max_grad_norm=most)
        loss = self.filled(setup, factor)
        found = forecast(setup, gradient="live")
        scale = float(expected.forecast.by_unit.abs().sum())
        close(found.delta_h1, expected.delta_h1, scale)
        close(found.std_error, expected.std_error, scale)
        agreement = found.diagnostics.live_gradient
        assert agreement is not None and agreement.prompts == agreement.of == len(SHAPE.sizes)
        close(agreement.cosine, 1.0, 1.0)
        close(agreement.scale, factor, 1.0)
        kept = torch.cat([p.grad.flatten() for p in setup[0].parameters() if p.grad is not None])
        assert torch.equal(kept, loss)
        assert math.isnan(found.forecast.population_std_error) and not math.isnan(found.std_error)
        assert math.isnan(found.x_dot_y) and found.kernel is None and found.diagonal is None

    def test_a_sample_is_the_mean_over_the_sampled_prompts(self) -> None:
        setup = stepped(OPTIMIZERS["adamw"])
        loss = self.filled(setup)
        found = forecast(setup, gradient="live", sample=3)
        taken = [p.group_ids for p in found.per_prompt]
        x, g = gradients(setup[0], batch())
        groups = list(dict.fromkeys(batch().group_ids.tolist()))
        places = [groups.index(ids[0]) for ids in taken]
        own = g[places]
        # Loss gradient = -scale · mean of g over all five prompts, as three of them say.
        between = sum(float(own[i] @ own[j]) for i in range(3) for j in range(3) if i != j) / 6
        squares = float(own.square().sum(1).mean())
        scale = float(-(own @ loss).mean()) / (squares / 5 + 4 / 5 * max(0.0, between))
        expected = torch.stack([x[n] @ moved(*setup, (5 * loss + scale * g[n]) / 4) for n in places])
        close(found.delta_h1, float(expected.mean()), float(expected.abs().sum()))
        close(found.std_error, float(expected.std() / 3**0.5), float(expected.abs().sum()))
        agreement = found.diagnostics.live_gradient
        assert agreement is not None and (agreement.prompts, agreement.of) == (3, 5)
        close(agreement.scale, scale, 1.0)
        again = forecast(setup, gradient="live", sample=3)
        assert [p.group_ids for p in again.per_prompt] == taken and again.delta_h1 == found.delta_h1

    def test_it_goes_on_until_the_direct_part_is_known(self) -> None:
        setup = stepped(OPTIMIZERS["adamw"])
        self.filled(setup)
        rollouts = make_rollouts(Shape(sizes=(3,) * 20, budget=2), models.VOCABULARY, 0)
        options = {"entropy_estimator": "rao_blackwell", "gradient": "live", "rollouts": rollouts}
        every = forecast(setup, **options)
        assert every.split is not None
        reached = every.split.direct.std_error / abs(every.split.direct.value)
        loose = forecast(setup, relative_error=20 * reached, **options)
        tight = forecast(setup, relative_error=0.9 * reached, **options)
        assert len(loose.per_prompt) < len(tight.per_prompt) == rollouts.n_prompts
        assert loose.split is not None and tight.split is not None
        assert abs(tight.split.direct.value - every.split.direct.value) < 0.2 * every.split.direct.std_error

    def test_what_does_not_go_with_it(self) -> None:
        setup = stepped(OPTIMIZERS["adamw"])
        self.filled(setup)
        for options, message in (
            ({"by_sequence": True}, "by_sequence with gradient"),
            ({"engine": "two_pass"}, "two_pass"),
            ({"memory_budget": 1000}, "sampled prompt's own gradients"),
        ):
            with pytest.raises(ConfigError, match=message):
                forecast(setup, gradient="live", **options)
        with pytest.raises(ConfigError, match="all of which is gone through"):
            forecast(setup, gradient="live", sample=2, entropy=batch(1))
        with pytest.raises(ConfigError, match="what stands in"):
            fast_delta_h1(*setup, batch(), update=lambda s, h: s.sum(), **options_of(step="next", gradient="live"))

    def test_coefficients_say_exactly_what_is_each_prompts_own(self) -> None:
        setup = stepped(OPTIMIZERS["adamw"])
        loss, factor, rollouts = self.filled(setup, 0.5), 0.5, batch()
        sizes = torch.bincount(rollouts.prompt_index)
        assert rollouts.advantages is not None
        given = factor * rollouts.advantages / (rollouts.length_budgets * sizes * len(sizes))[rollouts.prompt_index]
        x, g = gradients(setup[0], rollouts)
        groups = list(dict.fromkeys(rollouts.group_ids.tolist()))
        for sample in (None, 3, 2):
            found = fast_delta_h1(
                *setup, rollouts, coefficients=given, **options_of(step="next", gradient="live", sample=sample)
            )
            places = [groups.index(p.group_ids[0]) for p in found.per_prompt]
            # Whatever is sampled, a prompt meets the step of the others: its own part of .grad is known, not estimated.
            expected = torch.stack([x[n] @ moved(*setup, (5 * loss + factor * g[n]) / 4) for n in places])
            close(found.delta_h1, float(expected.mean()), float(expected.abs().sum()))

    def test_chunks_are_never_one_prompt_and_keep_the_mask(self) -> None:
        setup = stepped(OPTIMIZERS["adamw"])
        self.filled(setup)
        rollouts = make_rollouts(Shape(sizes=(3,) * 9, budget=2), models.VOCABULARY, 0)
        options = {"entropy_estimator": "rao_blackwell", "gradient": "live", "rollouts": rollouts}
        assert len(forecast(setup, relative_error=1e-6, **options).per_prompt) == 9
        rollouts = make_rollouts(Shape(sizes=(3,) * 20, budget=2), models.VOCABULARY, 0)
        mask = rollouts.loss_mask.clone()
        mask[::2, -3:] = 0
        chosen = options_of(step="next", entropy_estimator="rao_blackwell", gradient="live", relative_error=1e-6)
        chunked = fast_delta_h1(*setup, rollouts, entropy_mask=mask, **chosen)
        whole = fast_delta_h1(
            *setup,
            rollouts,
            entropy_mask=mask,
            **options_of(step="next", entropy_estimator="rao_blackwell", gradient="live"),
        )
        assert len(chunked.per_prompt) == 20
        assert chunked.entropy_level == pytest.approx(whole.entropy_level, rel=1e-12)
        for options, message in (({"blocks": 2}, "single prompts"), ({"weighting": "pooled"}, "whole batch")):
            with pytest.raises(ConfigError, match=message):
                forecast(setup, gradient="live", entropy_estimator="rao_blackwell", relative_error=0.1, **options)

    def test_another_loss_is_seen(self) -> None:
        setup = stepped(OPTIMIZERS["adamw"])
        self.filled(setup)
        generator = torch.Generator().manual_seed(0)
        for p in setup[0].parameters():
            assert p.grad is not None
            p.grad += p.grad.norm() * torch.randn(p.shape, generator=generator, dtype=p.dtype) / p.numel() ** 0.5
        notes = forecast(setup, gradient="live").diagnostics.warnings
        assert any("its loss is another one" in note for note in notes)
