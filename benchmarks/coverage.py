"""How often intervals cover what they are to cover: simulated on policies whose every response can be enumerated.

    python -m benchmarks.coverage                      # about ten minutes on one core
    python -m benchmarks.coverage --policy transformer # on the small trained transformer only
    python -m benchmarks.coverage --quick              # one setting, rough

Legend: B prompts (drawn with replacement) with G responses each, X_n and Y_n their gradients [D], K_nm = X_n · Y_m; P prompts
and R responses of at most T tokens that there are; N replications.

Every interval of `entropy_fast.estimates.intervals`, for *this update*, which is to cover the population's gradient times this
very batch's update, and for *such updates*, which is to cover the population's gradient times the population's update; both
truths by summing over all responses. The toy policy and the transformer, and their kinds of rewards, are those of
`benchmarks.small_transformer`; a jackpot is a response of 0.3 to 1.4 % of the first, of hardly more than 0.3 % of the other.

X and Y of many batches at once are sums over counts of responses. That these are what the package's own columns give, and that
rows are what its statistics make of them, is checked on some batches of every setting before a number is printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.error_bars import Simulation
from benchmarks.small_transformer import POLICIES, REWARDS, jackpot_responses, policy_with
from entropy_fast.columns import ScoredTokens
from entropy_fast.columns.baselines import RIDGE
from entropy_fast.columns.entropy import ScoreFunctionEntropy
from entropy_fast.estimates import intervals
from entropy_fast.estimates.u_statistic import u_estimate
from entropy_fast.rollouts import Rollouts

SCORE = "score function"
QUANTITIES = (SCORE, "total", "direct", "visitation")
TARGETS = ("this update", "such updates")
# Of every policy, its kinds of rewards and its settings.
WORLDS = {"toy": REWARDS, "transformer": ("ordinary", "jackpot")}
SETTINGS = {
    "toy": (
        *((prompts, 8) for prompts in (4, 8, 16, 32, 64, 128)),
        *((prompts, size) for size in (2, 4, 16) for prompts in (8, 32)),
    ),
    "transformer": (*((prompts, 8) for prompts in (8, 16, 32, 64)), (16, 4)),
}
QUICK = ((8, 4),)
LEVEL = 0.95
RESAMPLES = 999
AT_ONCE = 1 << 14  # prompts whose gradients are formed together
CHECKED = 3  # batches of every setting that go through the package's columns
ALLOWED = 1e-9
# Of the largest share of one unit in the variance, in what independent normal rows exceed once in a hundred batches.
EDGES = (0.5, 1.0, 2.0)
SHARES = ("up to 1/2 of what is by chance", "up to that", "up to twice that", "more", "no update")
MANY = 3  # jackpots, and more


@dataclasses.dataclass(frozen=True)
class Batches:
    """Prompts [N, B] of batches, how often each response was drawn [N, B, R], and G."""

    prompt: Tensor
    counts: Tensor
    size: int


def drawn_from(simulation: Simulation, shape: tuple[int, int], size: int) -> tuple[Tensor, Tensor]:
    """Prompts [N, B] and responses [N, B, G], by the calls that `Simulation.batch` makes."""
    policy, generator = simulation.policy, simulation.generator
    prompt = torch.randint(policy.prompts, (math.prod(shape),), generator=generator)
    probability = policy.logprob_table.exp()[prompt]
    drawn = torch.multinomial(probability, size, replacement=True, generator=generator)
    return prompt.view(shape), drawn.view(*shape, size)


def counted(prompt: Tensor, drawn: Tensor, responses: int) -> Batches:
    """Batches of these draws."""
    counts = torch.zeros(*prompt.shape, responses, dtype=torch.float64)
    counts.scatter_add_(-1, drawn, torch.ones(drawn.shape, dtype=torch.float64))
    return Batches(prompt, counts, drawn.shape[-1])


class Tables:
    """What sums over responses are made of, from a simulation with the fitted baseline."""

    def __init__(self, simulation: Simulation) -> None:
        policy = simulation.policy
        self.simulation, self.rewards = simulation, policy.rewards
        self.h, self.ds = simulation.h, simulation.ds
        self.score, self.direct = simulation.ds.sum(2), simulation.dh.sum(2)  # [P, R, D]
        vars(policy)["scores"] = self.score  # they would take it several seconds
        self.logprob = simulation.s.sum(2)
        self.lengths = policy.lengths  # [R]
        self.position = torch.arange(policy.limit, dtype=torch.float64)
        self.exists = (self.position < self.lengths[:, None]).double()  # [R, T]
        self.to_come = (self.h.sum(-1, keepdim=True) - self.h.cumsum(-1)) * self.exists
        h, position = self.h, self.position.expand_as(self.h)
        features = torch.stack([torch.ones_like(h), h, position, position.square()], -1) * self.exists[..., None]
        self.squares = torch.einsum("prtf,prtg->prfg", features, features).flatten(2)
        self.crossed = torch.einsum("prtf,prt->prf", features, self.to_come)

    def gradients(self, batches: Batches) -> tuple[dict[str, Tensor], Tensor]:
        """X_n [N, B, D] of every quantity, and Y_n."""
        counts, size = batches.counts, batches.size
        S, rewards = self.logprob[batches.prompt], self.rewards[batches.prompt]
        c = -(S - ((counts * S).sum(-1, keepdim=True) - S) / (size - 1)) * counts / size
        a = (rewards - (counts * rewards).sum(-1, keepdim=True) / size) * counts / size
        direct = _along(counts / size, self.direct, batches.prompt)
        to_come = self.to_come[batches.prompt] - self.baseline(batches)
        visits = (to_come * self.exists * counts[..., None] / size).flatten(2)
        visitation = _along(visits, self.ds.flatten(1, 2), batches.prompt)
        x = {
            SCORE: _along(c, self.score, batches.prompt),
            "total": direct + visitation,
            "direct": direct,
            "visitation": visitation,
        }
        return x, self.simulation.P * _along(a, self.score, batches.prompt)

    def baseline(self, batches: Batches) -> Tensor:
        """[N, B, R, T] b_t, the regression of `entropy_fast.columns.baselines` over the other prompts of the batch."""
        counts, prompt = batches.counts, batches.prompt
        weights = counts / (counts @ self.lengths)[..., None]
        squares, crossed = (_along(weights, table, prompt) for table in (self.squares, self.crossed))
        squares, crossed = (of.sum(1, keepdim=True) - of for of in (squares, crossed))
        squares = squares.unflatten(-1, (4, 4))
        scale = squares.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
        scaled = squares / (scale[..., None] * scale[..., None, :]) + RIDGE * torch.eye(4, dtype=torch.float64)
        beta = torch.linalg.solve(scaled, (crossed / scale)[..., None])[..., 0] / scale
        seen = [
            _largest_elsewhere(torch.where(counts > 0, largest, -torch.inf).amax(-1))[..., None, None]
            for largest in (torch.where(self.exists > 0, self.h, -torch.inf).amax(-1)[prompt], self.lengths - 1)
        ]
        h, position = torch.minimum(self.h[prompt], seen[0]), torch.minimum(self.position, seen[1])
        b = [of[..., None, None] for of in beta.unbind(-1)]
        return b[0] + b[1] * h + b[2] * position + b[3] * position.square()


def _along(coefficients: Tensor, table: Tensor, prompt: Tensor) -> Tensor:
    """[N, B, D] Σ_k coefficients [N, B, k] · table [P, k, D] of the prompt."""
    found = coefficients.new_empty(*prompt.shape, table.shape[-1])
    for p, rows in enumerate(table):
        found[prompt == p] = coefficients[prompt == p] @ rows
    return found


def _largest_elsewhere(own: Tensor) -> Tensor:
    """[N, B] the largest of own [N, B] in all prompts but each."""
    (first, second), where = own.topk(2, dim=1).values.unbind(1), own.argmax(1, keepdim=True)
    found = first[:, None].expand_as(own).clone()
    return found.scatter_(1, where, second[:, None])


def wrong(tables: Tables, prompts: int, size: int) -> list[str]:
    """What does not agree with the package's own columns and statistics, on some batches; a sentence each."""
    simulation, found = tables.simulation, []

    def compare(name: str, got: Tensor, expected: Tensor) -> None:
        off = float((got - expected).abs().max()) / max(float(expected.abs().max()), 1e-12)
        if not off <= ALLOWED:
            found.append(f"B {prompts}, G {size}: {name} differs by {off:.1e}")

    for _ in range(CHECKED):
        state = simulation.generator.get_state()
        x, y = simulation.batch(prompts, size)
        simulation.generator.set_state(state)
        prompt, drawn = drawn_from(simulation, (1, prompts), size)
        got, got_y = tables.gradients(counted(prompt, drawn, len(tables.lengths)))
        x[SCORE] = score_function(tables, prompt[0], drawn[0])
        for quantity in QUANTITIES:
            compare(f"X of {quantity}", got[quantity][0], x[quantity])
            kernel = x[quantity] @ y.T
            known = u_estimate(float(kernel.sum()), kernel.diagonal(), kernel.sum(1), kernel.sum(0))
            for rows, error in (
                (intervals.update_rows(kernel), known.se_given_update),
                (intervals.population_rows(kernel), known.se_jackknife),
            ):
                made = torch.stack([rows.mean(), rows.std() / math.sqrt(prompts)])
                compare(f"rows of {quantity}", made, torch.tensor([known.value, error], dtype=torch.float64))
        compare("Y", got_y[0], y)
    x_population, y_population = simulation.population(size)
    x, y = simulation.policy.population(torch.ones_like(tables.lengths), size, simulation.P)
    compare("the population", torch.stack([x_population["total"], y_population]), torch.stack([x, y]))
    return found


def score_function(tables: Tables, prompt: Tensor, drawn: Tensor) -> Tensor:
    """[B, D] X_n of prompts [B] with responses [B, G], by the package's column."""
    size = drawn.shape[1]
    at, flat = prompt.repeat_interleave(size), drawn.flatten()
    lengths = tables.lengths.long()[flat]
    columns = torch.arange(1 + tables.exists.shape[1])
    present = (columns <= lengths[:, None]).long()
    rollouts = Rollouts(
        input_ids=torch.zeros_like(present),
        attention_mask=present,
        loss_mask=present * (columns >= 1),
        group_ids=torch.arange(len(prompt)).repeat_interleave(size),
        rewards=tables.rewards[at, flat],
    )
    exists, s, h = rollouts.loss_mask[:, 1:] == 1, tables.simulation.s[at, flat], tables.h[at, flat]
    scored = ScoredTokens(rollouts, torch.arange(len(flat)), s.sum(1), s[exists], h[exists])
    c = ScoreFunctionEntropy(tables.simulation.measure).weigh(scored).by_sequence
    return (c[:, None] * tables.score[at, flat]).view(len(prompt), size, -1).sum(1)


def intervals_of(kernel: Tensor, target: str) -> tuple[Tensor, dict[str, intervals.Interval]]:
    """Rows [n, B] from kernels [n, B, B], and their intervals by name."""
    if target == "this update":
        rows = intervals.update_rows(kernel)
        resampled = {"": intervals.resampled_rows(rows, RESAMPLES)}
    else:
        rows = intervals.population_rows(kernel)
        resampled = {"": intervals.resampled_units(kernel, RESAMPLES)}
        # What can be done where the sums over K were kept and K itself was not.
        resampled[" of rows"] = intervals.resampled_rows(rows, RESAMPLES)
    found = {method: intervals.interval(rows, method, LEVEL) for method in ("normal", "student", "satterthwaite")}
    for of, how in resampled.items():
        for method in ("studentised", "bca"):
            found[method + of] = intervals.interval(rows, method, LEVEL, how)
    return rows, found


def measured(tables: Tables, prompts: int, size: int, replications: int) -> list[dict[str, Any]]:
    """What the intervals of one setting did, an entry for every quantity and target."""
    x_population, y_population = tables.simulation.population(size)
    x_population[SCORE] = x_population["total"]
    rare = jackpot_responses(tables.simulation.policy)
    parts: dict[tuple[str, str], list[dict[str, Tensor]]] = {(q, t): [] for q in QUANTITIES for t in TARGETS}
    step = max(1, AT_ONCE // prompts)
    for begin in range(0, replications, step):
        shape = (min(step, replications - begin), prompts)
        batches = counted(*drawn_from(tables.simulation, shape, size), len(tables.lengths))
        x, y = tables.gradients(batches)
        jackpots = batches.counts.gather(-1, rare[batches.prompt][..., None]).sum((1, 2))
        for quantity in QUANTITIES:
            kernel = x[quantity] @ y.transpose(1, 2)
            own = y.mean(1) @ x_population[quantity]
            truths = (own, (x_population[quantity] @ y_population).expand_as(own))
            for target, truth in zip(TARGETS, truths, strict=True):
                rows, found = intervals_of(kernel, target)
                part = {"value": rows.mean(-1), "truth": truth, "jackpots": jackpots}
                part["share"] = intervals.largest_share(rows)
                part["by_chance"] = torch.full_like(truth, intervals.share_by_chance(prompts))
                for name, interval in found.items():
                    part |= {f"low {name}": interval.low, f"high {name}": interval.high}
                parts[quantity, target].append(part)
    return [
        {"quantity": quantity, "target": target} | summary({name: torch.cat([p[name] for p in of]) for name in of[0]})
        for (quantity, target), of in parts.items()
    ]


def summary(found: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of values, truths and ends of intervals [N].

    Half widths, of intervals that have both bounds, are relative to the root mean square of value - truth. Jackpots are
    counted in every world, also where that response is worth what others are.
    """
    truth, cases = found["truth"], len(found["truth"])
    spread = float((found["value"] - truth).square().mean().sqrt())
    names = [name.removeprefix("low ") for name in found if name.startswith("low ")]
    covered = {name: (found[f"low {name}"] <= truth) & (truth <= found[f"high {name}"]) for name in names}
    methods = {}
    for name in names:
        low, high = found[f"low {name}"], found[f"high {name}"]
        share = float(covered[name].double().mean())
        width = (high - low) / 2 / spread
        bounded = width[width.isfinite()]
        methods[name] = {
            "coverage": share,
            "error": math.sqrt(share * (1 - share) / cases),
            "too_low": float((high < truth).double().mean()),
            "too_high": float((low > truth).double().mean()),
            "half_width": float(bounded.mean()),
            "median_half_width": float(bounded.median()),
            "unbounded": 1 - len(bounded) / cases,
        }
    kind = torch.bucketize(found["share"] / found["by_chance"], torch.tensor(EDGES, dtype=torch.float64))
    kind[found["share"].isnan()] = len(SHARES) - 1  # all rows are equal
    return {
        "truth": float(truth.mean()),
        "spread": spread,
        "methods": methods,
        "by_share": _within(covered, kind),
        "by_jackpots": _within(covered, found["jackpots"].clamp_max(MANY).long()),
    }


def _within(covered: Mapping[str, Tensor], kind: Tensor) -> dict[str, dict[str, float]]:
    """How many of each kind there are, and the coverage of every interval among them."""
    found = {}
    for value in kind.unique().tolist():
        of = kind == value
        found[str(value)] = {"cases": float(of.sum())} | {
            name: float(hit[of].double().mean()) for name, hit in covered.items()
        }
    return found


def cell(method: Mapping[str, float]) -> str:
    """Coverage in %, its Monte-Carlo error, and half a width."""
    open_ended = f", {method['unbounded']:.1%} unbounded" if method["unbounded"] else ""
    return f"{100 * method['coverage']:.1f} ± {100 * method['error']:.1f} · {method['half_width']:.2f}{open_ended}"


def show(found: Sequence[Mapping[str, Any]]) -> None:
    """As Markdown: coverage by setting, and by how much of the variance is in one unit; policy by policy."""
    for policy in dict.fromkeys(of["policy"] for of in found):
        show_policy(policy, [of for of in found if of["policy"] == policy])


def show_policy(policy: str, found: Sequence[Mapping[str, Any]]) -> None:
    """What was found of one policy."""
    for rewards in dict.fromkeys(of["rewards"] for of in found):
        for target in TARGETS:
            rows = [of for of in found if of["rewards"] == rewards and of["target"] == target]
            names = list(rows[0]["methods"])
            print(f"\n**Policy {policy}, rewards {rewards}, {target}**\n\n| | B | G | {' | '.join(names)} |")
            print(f"|---|{'---|' * (2 + len(names))}")
            for of in sorted(rows, key=lambda of: QUANTITIES.index(of["quantity"])):
                cells = " | ".join(cell(of["methods"][name]) for name in names)
                print(f"| {of['quantity']} | {of['prompts']} | {of['size']} | {cells} |")
    of = f", policy {policy}"
    show_within(f"largest share of one unit in the variance{of}", "by_share", SHARES, found)
    show_within(f"jackpots in the batch{of}", "by_jackpots", [*map(str, range(MANY)), f"{MANY} and more"], found)


def show_within(what: str, key: str, labels: Sequence[str], found: Sequence[Mapping[str, Any]]) -> None:
    """Student's coverage by kind of batch."""
    print(f"\n**Student's coverage by {what}; all settings with B >= 8 together**\n")
    worlds = [(rewards, target) for rewards in dict.fromkeys(of["rewards"] for of in found) for target in TARGETS]
    print(f"| | {' | '.join(', '.join(world) for world in worlds)} |\n|---|{'---|' * len(worlds)}")
    for kind, label in enumerate(labels):
        cells = []
        for world in worlds:
            here = [of[key] for of in found if (of["rewards"], of["target"]) == world and of["prompts"] >= 8]
            parts = [of[str(kind)] for of in here if str(kind) in of]
            cases = sum(part["cases"] for part in parts)
            hits = sum(part["cases"] * part["student"] for part in parts)
            cells.append(f"{100 * hits / cases:.1f} of {cases:.0f}" if cases else "")
        print(f"| {label} | {' | '.join(cells)} |")


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, simulate, print and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.coverage",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--replications", type=int, default=2000, help="batches of every setting")
    parser.add_argument("--quick", action="store_true", help="one setting, at most 200 replications")
    parser.add_argument("--policy", choices=(*POLICIES, "both"), default="both", help="whose responses are drawn")
    parser.add_argument("--out", type=Path, help="folder for JSON")
    options = parser.parse_args(arguments)
    replications = min(options.replications, 200) if options.quick else options.replications
    found: list[dict[str, Any]] = []
    begin = time.monotonic()
    chosen = POLICIES if options.policy == "both" else (options.policy,)
    for policy, rewards in [(of, rewards) for of in chosen for rewards in WORLDS[of]]:
        tables = Tables(Simulation(policy_with(rewards, policy), fitted=True))
        for prompts, size in QUICK if options.quick else SETTINGS[policy]:
            sentences = wrong(tables, prompts, size)
            if sentences:
                print("\n".join(f"WRONG: policy {policy}, {sentence}" for sentence in sentences))
                return 1
            here = {"policy": policy, "rewards": rewards, "prompts": prompts, "size": size}
            found += [here | of for of in measured(tables, prompts, size, replications)]
    print(f"{replications} replications of every setting in {time.monotonic() - begin:.0f} s; intervals at {LEVEL:.0%}")
    print("coverage in % ± its Monte-Carlo error · mean half width (of those with bounds) over the true spread")
    show(found)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        written = json.dumps({"level": LEVEL, "replications": replications, "found": found})
        (options.out / "coverage.json").write_text(written)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
