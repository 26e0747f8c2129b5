"""What a step really does to the entropy: it is taken, in several lengths and both ways, looked at, and put back.

Legend: θ parameters, Δθ the optimizer's step (or Adam's static one), η a multiple of it, E(θ) the mean entropy of a batch at
its own prefixes, H(θ) the expected entropy over responses of the policy θ itself.

    direct       E(θ + ηΔθ) - E(θ), of the batch that the step is made from: exact
    total        H(θ + ηΔθ) - H(θ), by importance weights on responses that were sampled apart
    symmetric    half the difference of the two directions, free of the curvature along the step
    second order (E(θ + ηΔθ) + E(θ - ηΔθ)) / 2 - E(θ), which is η²/2 times that curvature

A forecast on a batch and the importance-weighted change on the same batch share what is peculiar to its samples, and agree
however wrong both are. So the total is measured on held-out responses alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from entropy_fast.checks.exclusive import one_probe_at_a_time
from entropy_fast.checks.fit import check_rollouts_fit_model
from entropy_fast.columns import Wanted, columns_of
from entropy_fast.columns.caller import as_caller
from entropy_fast.columns.given import LossFunction
from entropy_fast.columns.wanted import entropy_measure
from entropy_fast.config import EstimateOptions, RunOptions
from entropy_fast.context import ProbeContext, ProgressCallback
from entropy_fast.engines.along import seen_gradient
from entropy_fast.engines.one_pass import OnePassEngine
from entropy_fast.errors import ConfigError, LearningRateError, RolloutsError
from entropy_fast.estimates.u_statistic import jackknife
from entropy_fast.rollouts import Rollouts
from entropy_fast.step import GivenOptimizer, read_optimizer
from entropy_fast.truth.importance import Reweighted
from entropy_fast.truth.policy_scores import Scored

__all__ = ["RealisedChange", "RealisedChanges", "Symmetric", "measure_delta_h"]

TRUSTED_ESS = 0.5

Fresh = Callable[[nn.Module], Rollouts]


@dataclasses.dataclass(frozen=True)
class Symmetric:
    """Half the differences between a step forward and the same step backward.

    Attributes:
        direct: (E(θ + ηΔθ) - E(θ - ηΔθ)) / 2.
        total: likewise of H; NaN without held-out responses.
        total_std_error: of that.
    """

    direct: float
    total: float
    total_std_error: float


@dataclasses.dataclass(frozen=True)
class RealisedChange:
    """What η times the step did, in the unit of a forecast with the same options.

    Attributes:
        eta: η, a multiple of the optimizer's own step.
        direct: change of the batch's mean entropy at its own prefixes; no sampling error.
        total: change of the expected entropy, from held-out or fresh responses; NaN without any.
        total_std_error: of ``total``, from those responses.
        held_out_direct: as ``direct``, of the held-out responses; NaN without any.
        symmetric: the same from a step each way.
        second_order: half the curvature of the batch's entropy along the step, times η².
        ess: share of the held-out responses that are worth something after weighting.
        pareto_k: of the weights' tail: above 0.7 ``total`` is not to be trusted.
        fresh: whether ``total`` is from responses that were drawn from the moved policy, since ``ess`` was too low.
        below_floor: whether the direct change is too small to be told from rounding.
    """

    eta: float
    direct: float
    total: float
    total_std_error: float
    held_out_direct: float
    symmetric: Symmetric
    second_order: float
    ess: float
    pareto_k: float
    fresh: bool
    below_floor: bool


@dataclasses.dataclass(frozen=True)
class RealisedChanges:
    """Of several multiples of one step.

    Attributes:
        points: by multiple, as they were asked for.
        level: entropy before the step.
        floor: direct changes below this, in nats, are rounding.
        learning_rate: of the step at η = 1.
        geometry: ``next_step`` or ``adam_static``.
        step_norm: Euclidean length of the step at η = 1.
    """

    points: tuple[RealisedChange, ...]
    level: float
    floor: float
    learning_rate: float
    geometry: str
    step_norm: float


def measure_delta_h(
    model: nn.Module,
    optimizer: GivenOptimizer,
    rollouts: Rollouts,
    *,
    held_out: Rollouts | None = None,
    etas: Sequence[float] = (0.01, 0.1, 1.0),
    fresh: Fresh | None = None,
    entropy_mask: Tensor | None = None,
    update: LossFunction | None = None,
    coefficients: Tensor | tuple[Tensor, Tensor] | None = None,
    estimate: EstimateOptions | None = None,
    run: RunOptions | None = None,
    on_progress: ProgressCallback | None = None,
) -> RealisedChanges:
    """Take multiples of the step on the model, score responses, and put the parameters back bit by bit.

    Log-probs are computed without autocast: rounding to 16 bits alone moves an entropy by more than a small step does.

    Args:
        model: see `fast_delta_h1`.
        optimizer: likewise; it is not stepped.
        rollouts: the batch that the update is made from, whose direct change is measured.
        held_out: responses of the same policy that had no part in the forecast, to prompts of the same kind; for ``total``.
        etas: multiples of the optimizer's own step.
        fresh: draws responses to held-out prompts from the model as it is when called; used at multiples at which less than
            half of the held-out responses would count.
        entropy_mask: see `fast_delta_h1`.
        update: likewise.
        coefficients: likewise.
        estimate: which entropy, which update and which step; as of the forecast.
        run: how it is run, by the one-pass engine; ``autocast_dtype`` is left out.
        on_progress: called with a stage, multiples done and multiples in all.

    Returns:
        What every multiple did.

    Raises:
        LearningRateError: a multiple is not above 0, or a step is too small to move any parameter.
        RolloutsError: ``held_out`` are the batch's own responses.
        ConfigError: a mask beside ``held_out``, an update given twice, or another engine.
        GradientCoverageError, RolloutsError, ModelStateError, OptimizerStateError: see `fast_delta_h1`.
    """
    if not etas or not all(0 < eta < math.inf for eta in etas):
        raise LearningRateError(f"measure_delta_h: etas are {list(etas)}.", fix="use finite numbers above 0.")
    if held_out is not None and held_out.shares_all_sequences_with(rollouts):
        raise RolloutsError(
            "measure_delta_h: `held_out` are the responses that the forecast was made from. On its own samples a forecast "
            "agrees with the importance-weighted change however wrong both are.",
            fix="sample other responses from the same policy, or leave held_out out: the direct change is exact without.",
        )
    if entropy_mask is not None and held_out is not None:
        raise ConfigError(
            "measure_delta_h: entropy_mask is of `rollouts`, and nothing says which tokens of `held_out` count.",
            fix="leave one of them out.",
        )
    if update is not None and coefficients is not None:
        raise ConfigError(
            "measure_delta_h: `update` and `coefficients` both give the update.", fix="leave one of them out."
        )
    estimate, run = estimate or EstimateOptions(), dataclasses.replace(run or RunOptions(), autocast_dtype=None)
    run.refuse_checkpoint("measure_delta_h takes steps on a model that has to be put back")
    if run.engine not in ("auto", "one_pass"):
        raise ConfigError(f"measure_delta_h: engine is {run.engine!r}.", fix="use engine='one_pass'.")
    at_hand = read_optimizer(optimizer, model, any_kind=estimate.step != "adam_static")
    context = ProbeContext.of(model, at_hand, estimate, run)
    given = coefficients if update is None else update
    wanted = as_caller(Wanted(update=given, entropy_mask=entropy_mask), context.registry.module)
    context = dataclasses.replace(context, columns=columns_of(estimate, wanted, rollouts, rollouts))
    context.columns.check(rollouts.without_empty_responses()[0])
    for responses in (rollouts, *([] if held_out is None else [held_out])):
        check_rollouts_fit_model(responses, context.registry.module)
    kind = context.registry.tensors[0].device.type
    with one_probe_at_a_time(wait=run.when_busy == "wait"), torch.autocast(kind, enabled=False):
        batch = Scored.of(context, rollouts, entropy_measure(estimate, wanted, rollouts))
        apart = None if held_out is None else Scored.of(context, held_out, entropy_measure(estimate, Wanted(), None))
        step = _step_of(context, batch.rollouts)
        moving = _Moving(context, step)
        try:
            points = [_point(moving, eta, batch, apart, fresh) for eta in _told(etas, on_progress)]
        finally:
            moving.put_back()
    norm = math.sqrt(sum(float(own.double().square().sum()) for own in step if own is not None))
    geometry = context.step.geometry if context.next_step is None else "next_step"
    return RealisedChanges(tuple(points), batch.level, batch.floor, context.step.learning_rate, geometry, norm)


def _step_of(context: ProbeContext, rollouts: Rollouts) -> list[Tensor | None]:
    """Δθ, one tensor per parameter; None where it stays."""
    engine = OnePassEngine(context)
    if context.next_step is None:
        lr = context.step.learning_rate
        return [lr / rollouts.n_prompts * y for y in engine.update_sum(rollouts).tensors]
    return context.next_step.exactly(
        seen_gradient(context.next_step, engine.gradient_sum(rollouts), rollouts.n_prompts).loss
    )


def _told(etas: Sequence[float], on_progress: ProgressCallback | None) -> Iterator[float]:
    """The multiples one after another, telling how many are done."""
    for done, eta in enumerate(etas):
        if on_progress is not None:
            on_progress("multiples", done, len(etas))
        yield eta
    if on_progress is not None:
        on_progress("multiples", len(etas), len(etas))


class _Moving:
    """A model's parameters, moved along a step and put back."""

    def __init__(self, context: ProbeContext, step: Sequence[Tensor | None]) -> None:
        self.model = context.model
        self._parameters = context.registry.tensors
        self._kept = [p.detach().clone() for p in self._parameters]
        self._step = step

    def to(self, eta: float) -> None:
        """Put every parameter where it was, and ``eta`` times the step from there.

        Raises:
            LearningRateError: no parameter moves.
        """
        with torch.no_grad():
            for parameter, own, along in zip(self._parameters, self._kept, self._step, strict=True):
                parameter.copy_(own)
                if along is not None:
                    wide = torch.promote_types(own.dtype, along.dtype)
                    parameter.copy_(own.to(wide) + eta * along.to(device=own.device, dtype=wide))
        if all(torch.equal(p, own) for p, own in zip(self._parameters, self._kept, strict=True)):
            raise LearningRateError(
                f"measure_delta_h: {abs(eta):g} times the step moves no parameter of {self._parameters[0].dtype}.",
                fix="use a larger multiple, or parameters in float32.",
            )

    def put_back(self) -> None:
        """Every parameter as it was, bit by bit."""
        with torch.no_grad():
            for parameter, own in zip(self._parameters, self._kept, strict=True):
                parameter.copy_(own)


def _point(moving: _Moving, eta: float, batch: Scored, apart: Scored | None, fresh: Fresh | None) -> RealisedChange:
    found: list[tuple[float, Reweighted | None]] = []
    drawn: tuple[float, float] | None = None
    for signed in (eta, -eta):
        moving.to(signed)
        level, _ = batch.again()
        change = None if apart is None else apart.change_to(apart.again()[1])
        if signed > 0 and change is not None and change.ess < TRUSTED_ESS and fresh is not None:
            assert apart is not None
            drawn = _from_fresh(apart, fresh(moving.model))
        found.append((level - batch.level, change))
    (ahead, change), (back, other) = found
    total = total_error = both = both_error = apart_direct = ess = k = math.nan
    if change is not None and other is not None:
        total, total_error, apart_direct, ess, k = (
            change.total,
            change.total_std_error,
            change.direct,
            change.ess,
            change.pareto_k,
        )
        both = (change.total - other.total) / 2
        both_error = jackknife((change.kept - other.kept) / 2) if len(change.kept) > 1 else math.nan
    if drawn is not None:
        total, total_error = drawn
    symmetric = Symmetric((ahead - back) / 2, both, both_error)
    return RealisedChange(
        eta,
        ahead,
        total,
        total_error,
        apart_direct,
        symmetric,
        (ahead + back) / 2,
        ess,
        k,
        drawn is not None,
        abs(symmetric.direct) < batch.floor,
    )


def _from_fresh(before: Scored, responses: Rollouts) -> tuple[float, float]:
    """The change of the expectation, and its error, from responses that the moved policy has drawn itself."""
    after = Scored.of(before.context, responses, before.measure)
    means = [own.by_prompt() for own in (before, after)]
    variance = sum(float(own.var()) / len(own) if len(own) > 1 else math.nan for own in means)
    return after.level - before.level, math.sqrt(variance)
