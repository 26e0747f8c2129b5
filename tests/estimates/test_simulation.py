"""Every standard error against the spread that simulated batches really have.

Batches come from a policy that can be enumerated, so the population value is known. Legend: B prompts, G responses per
prompt, K_nm = X_n · Y_m, θ = X̄ · Ȳ the population value of U, R replicates (a spread is known to 1 / sqrt(2 R): 1.1 % for
4,000). Signal and noise are comparable in these policies (θ is 1 to 4 spreads of U); below that, see the last tests.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from probe_oracle.toy_policy import ToyPolicy
from torch import Tensor

from entropy_fast.estimates import TwoBatchEstimate, UEstimate, two_batch_estimate, u_estimate

REPLICATES = 4000
CHUNK = 500
BY_CHANCE = 6.2  # a normal number is larger once in 1.8 · 10^9 draws
GROUP_SIZE = 8
POLICIES = {
    "moderate": ToyPolicy(prompts=6, seed=1),
    "peaked": ToyPolicy(prompts=6, preference=3.0, scale=1.0, seed=1),
    "flat": ToyPolicy(prompts=6, preference=0.0, scale=0.2, seed=1),
}


@dataclasses.dataclass(frozen=True)
class World:
    """A policy with its weights [R], preconditioner [D] and population values X̄ and Ȳ [D]."""

    policy: ToyPolicy
    weight: Tensor
    precondition: Tensor
    x: Tensor
    y: Tensor

    @property
    def theta(self) -> float:
        return float(self.x @ self.y)

    def batches(self, replicates: int, batch: int, seed: int) -> tuple[Tensor, Tensor]:
        """X_n and Y_n [replicates, batch, D]."""
        generator = torch.Generator().manual_seed(seed)
        return self.policy.sample(replicates, batch, GROUP_SIZE, self.weight, self.precondition, generator)


def world(policy: str, weighting: str) -> World:
    toy = POLICIES[policy]
    lengths = toy.lengths
    weights = {"dr_grpo": torch.full_like(lengths, 1 / toy.limit), "per_token": 1 / lengths}
    generator = torch.Generator().manual_seed(0)
    precondition = 0.5 + torch.rand(len(toy.theta), generator=generator, dtype=torch.float64)
    return World(toy, weights[weighting], precondition, *toy.population(weights[weighting], GROUP_SIZE, precondition))


def same_batch(kernel: Tensor) -> UEstimate:
    return u_estimate(float(kernel.sum()), kernel.diagonal(), kernel.sum(1), kernel.sum(0), kernel=kernel)


def mean_of(estimates: list[UEstimate], field: str) -> float:
    return math.fsum(getattr(e, field) for e in estimates) / len(estimates)


def z_score(values: Tensor, truth: float) -> float:
    return float((values.mean() - truth) / (values.std() / math.sqrt(len(values))))


@pytest.mark.parametrize(
    ("policy", "weighting"), [("moderate", "dr_grpo"), ("moderate", "per_token"), ("peaked", "dr_grpo")]
)
def test_mean_of_u_over_batches_is_the_population_value(policy: str, weighting: str) -> None:
    here = world(policy, weighting)
    x, y = here.batches(8000, 6, seed=1)
    kernels = x @ y.transpose(1, 2)
    values = (kernels.sum((1, 2)) - kernels.diagonal(dim1=1, dim2=2).sum(1)) / (6 * 5)
    some = torch.tensor([same_batch(kernel).value for kernel in kernels[:100]], dtype=torch.float64)
    torch.testing.assert_close(some, values[:100], rtol=1e-12, atol=1e-12)
    assert abs(z_score(values, here.theta)) < BY_CHANCE
    # The same test sees through the estimates one might take by mistake, which are at 14 and more.
    if weighting == "dr_grpo":
        assert abs(z_score(kernels.mean((1, 2)), here.theta)) > BY_CHANCE  # diagonal included
    assert abs(z_score(values * 6 / 5, here.theta)) > BY_CHANCE  # B instead of B - 1
    assert abs(z_score(values * 8 / 7, here.theta)) > BY_CHANCE  # G instead of G - 1 in the baseline or the advantage


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("weighting", ["dr_grpo", "per_token"])
def test_standard_errors_are_the_spread_of_what_they_cover(policy: str, weighting: str) -> None:
    here = world(policy, weighting)
    estimates: list[UEstimate] = []
    own_update = []  # the change that the batch's own update makes: population X̄ · Ȳ of the batch
    for chunk in range(REPLICATES // CHUNK):
        x, y = here.batches(CHUNK, 32, seed=100 + chunk)
        estimates += [same_batch(kernel) for kernel in x @ y.transpose(1, 2)]
        own_update.append(y.mean(1) @ here.x)
    values = torch.tensor([e.value for e in estimates], dtype=torch.float64)
    spread = float(values.std())
    about_own_update = float((values - torch.cat(own_update)).std())
    ratios = {
        "jackknife": mean_of(estimates, "se_jackknife") / spread,
        "plug_in": mean_of(estimates, "se_plug_in") / spread,
        "given_update": mean_of(estimates, "se_given_update") / about_own_update,
        "unbiased": math.sqrt(mean_of(estimates, "unbiased_variance")) / spread,
    }
    assert {name: ratio for name, ratio in ratios.items() if not 0.85 < ratio < 1.15} == {}
    assert 0.95 < ratios["unbiased"] < 1.05
    # Each covers its own quantity: the errors differ by more than the tolerance, so that a mix-up is seen.
    if policy == "moderate":
        assert abs(about_own_update / spread - 1) > 0.1


def two_batches(kernel: Tensor) -> TwoBatchEstimate:
    return two_batch_estimate(float(kernel.sum()), kernel.sum(1), kernel.sum(0))


@pytest.mark.parametrize("policy", POLICIES)
def test_two_batch_errors_conditional_and_total(policy: str) -> None:
    here = world(policy, "dr_grpo")
    _, y = here.batches(1, 32, seed=7)  # one update, kept
    x, _ = here.batches(REPLICATES, 32, seed=8)
    conditional = [two_batches(kernel) for kernel in x @ y[0].T]
    values = torch.tensor([e.value for e in conditional], dtype=torch.float64)
    mean_error = math.fsum(e.se_conditional or 0.0 for e in conditional) / REPLICATES
    assert 0.85 < mean_error / float(values.std()) < 1.15
    mean_variance = math.fsum(e.v_x or 0.0 for e in conditional) / REPLICATES
    assert 0.95 < math.sqrt(mean_variance) / float(values.std()) < 1.05
    assert abs(z_score(values, float(here.x @ y[0].mean(0)))) < BY_CHANCE
    # A new update batch every time: the total error, an upper bound.
    _, y = here.batches(REPLICATES, 32, seed=9)
    both = [two_batches(kernel) for kernel in x @ y.transpose(1, 2)]
    values = torch.tensor([e.value for e in both], dtype=torch.float64)
    assert abs(z_score(values, here.theta)) < BY_CHANCE
    variance = math.fsum((e.v_x or 0.0) + (e.v_y or 0.0) for e in both) / REPLICATES
    ratio = math.sqrt(variance) / float(values.std())
    assert 0.97 < ratio < 1.15
    # V_X + V_Y exceeds the variance by the cross term, the trace of Cov X · Cov Y over B_E · B_U.
    flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    cross = float((torch.cov(flat_x.T) * torch.cov(flat_y.T)).sum()) / 32**2
    assert math.isclose(variance - cross, float(values.var()), rel_tol=0.08)


def gaussian_kernels(signal: float, dimension: int, batch: int, seed: int) -> Tensor:
    """Kernels [R, B, B] of vectors X_n and Y_n with means of length ``signal`` and unit noise, X_n and Y_n correlated."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(REPLICATES, batch, dimension, generator=generator, dtype=torch.float64)
    y = 0.6 * x + 0.8 * torch.randn(REPLICATES, batch, dimension, generator=generator, dtype=torch.float64)
    x[..., 0] += signal
    y[..., 0] += signal
    return x @ y.transpose(1, 2)


@pytest.mark.parametrize(("signal", "too_large"), [(0.0, math.sqrt(2)), (3.0, 1.0)])
def test_without_signal_jackknife_and_plug_in_are_sqrt_2_too_large_and_the_unbiased_error_is_right(
    signal: float, too_large: float
) -> None:
    """With X̄ = Ȳ = 0 the first-order term of U vanishes and both count the second-order one twice."""
    estimates = [same_batch(kernel) for kernel in gaussian_kernels(signal, dimension=24, batch=32, seed=3)]
    values = torch.tensor([e.value for e in estimates], dtype=torch.float64)
    assert abs(z_score(values, signal**2)) < BY_CHANCE
    spread = float(values.std())
    for field in ("se_jackknife", "se_plug_in"):
        root_mean_square = math.sqrt(math.fsum(getattr(e, field) ** 2 for e in estimates) / REPLICATES)
        assert math.isclose(root_mean_square / spread, too_large, rel_tol=0.08), field
    assert 0.95 < math.sqrt(mean_of(estimates, "unbiased_variance")) / spread < 1.05
    if signal == 0:
        # The X row means see K_nm but not that K_mn goes along with it when X_n and Y_n are correlated (0.6 here): the one
        # error that is too small without signal, by 1 / sqrt(1 + 0.6²), at worst 1 / sqrt(2).
        root_mean_square = math.sqrt(math.fsum((e.se_given_update or 0.0) ** 2 for e in estimates) / REPLICATES)
        assert math.isclose(root_mean_square / spread, 1 / math.sqrt(1 + 0.6**2), rel_tol=0.05)


def test_unbiased_variance_is_unbiased_at_four_prompts_where_it_is_often_negative() -> None:
    estimates = [same_batch(kernel) for kernel in gaussian_kernels(1.5, dimension=6, batch=4, seed=4)]
    values = torch.tensor([e.value for e in estimates], dtype=torch.float64)
    variances = torch.tensor([e.unbiased_variance for e in estimates], dtype=torch.float64)
    assert 0.05 < float((variances < 0).double().mean()) < 0.95
    assert all((e.se_unbiased is None) == (e.unbiased_variance < 0) for e in estimates)  # type: ignore[operator]
    uncertainty = float(variances.std()) / math.sqrt(REPLICATES) + float(values.var()) * math.sqrt(2 / REPLICATES)
    assert abs(float(variances.mean()) - float(values.var())) < BY_CHANCE * uncertainty
