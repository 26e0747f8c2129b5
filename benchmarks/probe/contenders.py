"""Who is measured: the package's engines, the yardsticks, and other ways to the same numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch

from benchmarks.probe import opacus_gradients
from benchmarks.probe.frozen_two_pass import frozen_two_pass
from benchmarks.probe.opacus_gradients import opacus_sums
from benchmarks.probe.plain_step import plain_step
from benchmarks.probe.setting import Setting
from benchmarks.probe.sums import Sums
from benchmarks.probe.vmap_gradients import vmap_sums
from entropy_fast import EstimateOptions, RunOptions, fast_delta_h1
from entropy_fast.estimates.result import DeltaH1Result

ONE_PASS, TWO_PASS, ALPHA, FROZEN, PLAIN = "one_pass", "two_pass", "alpha", "frozen", "plain_step"
# What every contender can give: two columns, by sequence.
SCORES = EstimateOptions(entropy_estimator="score_function", step="adam_static")
PROMPTS_AT_A_TIME = 4  # of the two-pass engine; the one-pass engine plans its own


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way, by name.

    Attributes:
        name: how it is asked for.
        kind: ``engine`` of the package, ``yardstick``, or ``rival``.
        note: what it does.
        run: one call on a setting. What gives kernel sums returns them; the plain step returns S of the update batch.
        slow: takes part in fewer rounds.
        batches: the numbers of batches it works for.
        why_not: the reason when it cannot be tried on this machine.
    """

    name: str
    kind: Literal["engine", "yardstick", "rival"]
    note: str
    run: Callable[[Setting], Sums | torch.Tensor]
    slow: bool = True
    batches: tuple[int, ...] = (1, 2)
    why_not: Callable[[], str | None] = lambda: None


def probe(setting: Setting, engine: str, **options: Any) -> DeltaH1Result:
    """One call of the front door, on one batch or two."""
    run = RunOptions(engine=engine, autocast_dtype=setting.autocast_dtype, **options)
    return fast_delta_h1(
        setting.model, setting.optimizer, setting.update, entropy_rollouts=setting.entropy, estimate=SCORES, run=run
    )


def sums_of(result: DeltaH1Result) -> Sums:
    diagonal = torch.zeros(0, dtype=torch.float64) if result.diagonal is None else result.diagonal
    return Sums(result.x_dot_y, diagonal, result.row_sums, result.column_sums)


def two_pass_result(setting: Setting, prompts_at_a_time: int = PROMPTS_AT_A_TIME) -> DeltaH1Result:
    """The reference."""
    return probe(setting, "two_pass", prompts_per_microbatch=prompts_at_a_time)


def one_pass_result(setting: Setting) -> DeltaH1Result:
    return probe(setting, "one_pass")


def _alpha(setting: Setting) -> Sums:
    options = {"prompts_per_microbatch": PROMPTS_AT_A_TIME, "conditional_variance": "alpha"}
    return sums_of(probe(setting, "two_pass", **options))


def _frozen(setting: Setting) -> Sums:
    return frozen_two_pass(setting.model, setting.optimizer, setting.padded, setting.autocast())


def _plain(setting: Setting) -> torch.Tensor:
    return plain_step(setting.model, setting.padded, setting.autocast())


CONTENDERS = (
    Contender(
        PLAIN,
        "yardstick",
        "forward and backward of the update: padded microbatches of 4 prompts, logits at response positions, "
        "log-probs sequence by sequence; of the update batch alone where there are two",
        _plain,
        slow=False,
    ),
    Contender(ONE_PASS, "engine", "engine one_pass, the whole call", lambda s: sums_of(one_pass_result(s)), slow=False),
    Contender(TWO_PASS, "engine", "engine two_pass, the whole call", lambda s: sums_of(two_pass_result(s))),
    Contender(ALPHA, "engine", "engine two_pass, conditional variance by the double backward", _alpha, batches=(2,)),
    Contender(
        FROZEN, "yardstick", "two passes in eager torch, full float32 logits; benchmarks/probe/frozen_two_pass.py", _frozen,
        batches=(1,),
    ),
    Contender("vmap", "rival", "torch.func.vmap(grad_and_value), a prompt's responses at a time", vmap_sums),
    Contender(
        "opacus", "rival", "Opacus' GradSampleModule, a prompt's responses at a time", opacus_sums,
        why_not=opacus_gradients.why_not,
    ),
)  # fmt: skip


def named(name: str) -> Contender:
    return next(c for c in CONTENDERS if c.name == name)


def baseline(batches: int) -> str:
    """What speed-ups are over."""
    return FROZEN if batches == 1 else ALPHA
