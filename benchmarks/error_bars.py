"""How right the error bars are: simulated on a policy whose every response can be enumerated.

    python -m benchmarks.error_bars                  # the table of docs/theory.md; two or three minutes
    python -m benchmarks.error_bars --batches 200    # rougher

Batches of B prompts (drawn with replacement) and G responses each go through the package's own columns and statistics. A ratio
is the root mean square of a standard error over the true spread of the estimate: for *this update* around the population's
gradient times this very batch's update, and for *such updates* around the population's gradient times the population's update.
1 is right, above is careful. The last column says what the baseline from other prompts makes of the visitation part's spread.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from entropy_fast.columns import Column, ScoredTokens, TokenScores
from entropy_fast.columns.entropy import BatchEntropy, DirectEntropy, EntropyMeasure, RaoBlackwellEntropy
from entropy_fast.estimates.u_statistic import u_estimate
from entropy_fast.rollouts import Rollouts

SUPPORT = Path(__file__).parents[1] / "tests" / "_support"
PARTS = ("total", "direct", "visitation")
SETTINGS = ((16, 4), (32, 4), (16, 8), (32, 8))


class Simulation:
    """Batches from a policy, as sums of its enumerated gradients.

    Args:
        policy: `probe_oracle.toy_policy.ToyPolicy`.
        fitted: whether the visitation part's baseline comes from other prompts; else from other responses.
        seed: of the batches.
    """

    def __init__(self, policy: object, *, fitted: bool, seed: int = 0) -> None:
        self.policy, self.fitted = policy, fitted
        gradients = torch.autograd.functional.jacobian(policy.token_values, policy.theta, vectorize=True)
        values = policy.token_values(policy.theta)
        self.s, self.h, self.ds, self.dh = (t.detach() for t in (*values, *gradients))
        self.generator = torch.Generator().manual_seed(seed)
        self.measure = EntropyMeasure("sequence")
        # Some uneven preconditioner.
        self.P = 0.5 + torch.rand(policy.theta.shape, generator=self.generator, dtype=torch.float64)

    def batch(self, prompts: int, size: int) -> tuple[dict[str, Tensor], Tensor]:
        """X_n [B, D] of every part, and Y_n [B, D], of one batch."""
        policy = self.policy
        prompt = torch.randint(policy.prompts, (prompts,), generator=self.generator)
        probability = policy.logprob_table.exp()[prompt]
        drawn = torch.multinomial(probability, size, replacement=True, generator=self.generator)
        flat, at = drawn.flatten(), prompt.repeat_interleave(size)
        lengths = policy.lengths.long()[flat]
        columns = torch.arange(1 + policy.limit)
        rewards = policy.rewards[at, flat]
        rollouts = Rollouts(
            input_ids=torch.zeros(len(flat), len(columns), dtype=torch.int64),
            attention_mask=(columns <= lengths[:, None]).long(),
            loss_mask=((columns >= 1) & (columns <= lengths[:, None])).long(),
            group_ids=torch.arange(prompts).repeat_interleave(size),
            rewards=rewards,
        )
        exists = rollouts.loss_mask[:, 1:] == 1
        s, h = self.s[at, flat], self.h[at, flat]
        scored = ScoredTokens(rollouts, torch.arange(len(flat)), s.sum(1), s[exists], h[exists])
        ds, dh = self.ds[at, flat][exists], self.dh[at, flat][exists]
        owner = torch.arange(prompts).repeat_interleave(size).repeat_interleave(lengths)
        column: Column = RaoBlackwellEntropy(self.measure)
        if self.fitted:
            scores = TokenScores(*(torch.nn.functional.pad(t, (1, 0)) for t in (s, h)))
            column = BatchEntropy(RaoBlackwellEntropy(self.measure), fitted=True).resolved(scores, rollouts)
        whole = column.weigh(scored)
        e = DirectEntropy(self.measure).weigh(scored).of_entropy

        def summed(rows: Tensor) -> Tensor:
            return torch.zeros(prompts, rows.shape[1], dtype=torch.float64).index_add_(0, owner, rows)

        direct = summed(e[:, None] * dh)
        visitation = summed(whole.of_logprob[:, None] * ds)
        a = (rollouts.advantages.double() / size).repeat_interleave(lengths)
        return {"total": direct + visitation, "direct": direct, "visitation": visitation}, self.P * summed(
            a[:, None] * ds
        )

    def population(self, size: int) -> tuple[dict[str, Tensor], Tensor]:
        """X̄ of every part and Ȳ, summed over all responses."""
        policy = self.policy
        probability = policy.logprob_table.exp()
        direct = torch.einsum("pr,prtd->d", probability, self.dh) / policy.prompts
        to_go = self.h.sum(-1, keepdim=True) - self.h.cumsum(-1)
        visitation = torch.einsum("pr,prt,prtd->d", probability, to_go, self.ds) / policy.prompts
        centred = policy.rewards - (probability * policy.rewards).sum(-1, keepdim=True)
        g = torch.einsum("pr,pr,prtd->d", probability, centred, self.ds) / policy.prompts
        return {"total": direct + visitation, "direct": direct, "visitation": visitation}, self.P * g * (1 - 1 / size)


def ratios(simulation: Simulation, prompts: int, size: int, batches: int) -> dict[str, tuple[float, float, float]]:
    """By part: of the error for this update, and of the one for such updates; and the spread around this update's change."""
    x_population, y_population = simulation.population(size)
    found: dict[str, list[tuple[float, float, float, float]]] = {part: [] for part in PARTS}
    for _ in range(batches):
        x, y = simulation.batch(prompts, size)
        for part in PARTS:
            kernel = x[part] @ y.T
            estimate = u_estimate(float(kernel.sum()), kernel.diagonal(), kernel.sum(1), kernel.sum(0))
            this = float(x_population[part] @ y.mean(0))
            assert estimate.se_given_update is not None and estimate.se_jackknife is not None
            found[part].append((estimate.value - this, estimate.value, estimate.se_given_update, estimate.se_jackknife))
    result = {}
    for part, rows in found.items():
        off, values, this, population = torch.tensor(rows, dtype=torch.float64).unbind(1)
        truth = float(x_population[part] @ y_population)
        spread = float((values - truth).square().mean().sqrt())
        result[part] = (
            float(this.square().mean().sqrt() / off.square().mean().sqrt()),
            float(population.square().mean().sqrt() / spread),
            float(off.square().mean().sqrt()),
        )
    return result


def table(batches: int, say: Callable[[str], object]) -> list[list[str]]:
    """Rows of the first table."""
    sys.path.insert(0, str(SUPPORT))
    from probe_oracle.toy_policy import ToyPolicy

    rows = []
    for prompts, size in SETTINGS:
        policy = ToyPolicy(prompts=8, seed=3)
        found, other = (ratios(Simulation(policy, fitted=fitted), prompts, size, batches) for fitted in (True, False))
        spread = found["visitation"][2] / other["visitation"][2]
        numbers = [f"{value:.3f}" for part in PARTS for value in found[part][:2]]
        rows.append([str(prompts), str(size), *numbers, f"{spread:.3f}"])
        say(f"| {' | '.join(rows[-1])} |")
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.error_bars",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batches", type=int, default=2000, help="of every setting")
    parser.add_argument("--out", type=Path, help="folder for JSON")
    options = parser.parse_args(arguments)
    header = ["B", "G", *(f"{part}, {which}" for part in PARTS for which in ("this update", "such updates"))]
    header.append("visitation, spread over that with baseline='responses'")
    print(f"{options.batches} batches each; a ratio is known to about {1 / math.sqrt(2 * options.batches):.1%}")
    print(f"| {' | '.join(header)} |")
    print(f"|{'---|' * len(header)}")
    rows = table(options.batches, lambda line: print(line, flush=True))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "error_bars.json").write_text(json.dumps({"header": header, "rows": rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
