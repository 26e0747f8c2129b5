"""What a policy says of a batch: token log-probs and entropies, their mean as a functional weighs it, and its change."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from entropy_fast.checks.exclusive import one_probe_at_a_time, raise_if_interrupted
from entropy_fast.checks.fit import check_rollouts_fit_model
from entropy_fast.columns import TokenScores
from entropy_fast.columns.entropy import EntropyMeasure
from entropy_fast.config import EstimateOptions, RunOptions
from entropy_fast.context import ProbeContext
from entropy_fast.distributed.team import Team
from entropy_fast.engines.one_pass import OnePassEngine
from entropy_fast.rollouts import Rollouts
from entropy_fast.sharded import as_whole
from entropy_fast.step import GivenOptimizer, read_optimizer
from entropy_fast.truth.importance import Reweighted, reweighted

__all__ = ["Scored", "scored"]

ROUNDINGS = 4  # of a mean entropy, in units of the narrowest type that it goes through: below that nothing is seen


def scored(
    model: nn.Module,
    optimizer: GivenOptimizer,
    rollouts: Rollouts,
    *,
    estimate: EstimateOptions | None = None,
    run: RunOptions | None = None,
    team: Team | None = None,
) -> Scored:
    """Score a batch with the model as it is now, without autocast, gradients or dropout.

    Args:
        model: see `fast_delta_h1`.
        optimizer: likewise; it says which parameters are trained.
        rollouts: the batch; rows without response tokens are left out.
        estimate: which entropy, of which policy (``entropy_weighting``, ``policy_temperature``).
        run: how it is run; ``autocast_dtype`` is left out, since rounding to 16 bits moves an entropy by more than a small
            step does.
        team: the ranks that make the same call with replicas of one model, or with one that FSDP2 shards over them, and score
            every prompt once; None for this process by itself, whatever ``run.ranks`` is.

    Raises:
        RolloutsError, ModelStateError, OptimizerStateError, ConfigError: see `fast_delta_h1`.
        DistributedError: a rank of the team failed or was lost.
    """
    estimate = dataclasses.replace(estimate or EstimateOptions(), gradient="rollouts", sample=None, relative_error=None)
    run = dataclasses.replace(run or RunOptions(), autocast_dtype=None, ranks="own" if team is None else "all")
    run.refuse_checkpoint("what a policy says of a batch is found by forwards alone")
    team = team or Team.alone()
    with as_whole(model, optimizer, estimate, run, team, by_layer=True) as whole:
        at_hand = read_optimizer(whole.optimizer, whole.model, any_kind=True)
        context = ProbeContext.of(whole.model, at_hand, estimate, run, parted=whole.parted)
        context = dataclasses.replace(context, team=team)
        check_rollouts_fit_model(rollouts, context.registry.module)
        kind = context.registry.tensors[0].device.type
        with one_probe_at_a_time(wait=run.when_busy == "wait"), torch.autocast(kind, enabled=False):
            return Scored.of(context, rollouts, EntropyMeasure(estimate.of_entropy))


@dataclasses.dataclass(frozen=True)
class Scored:
    """A batch, and what a policy says of it.

    Attributes:
        context: of the model that it was scored with.
        rollouts: the batch, without empty responses.
        measure: which entropy is meant.
        scores: token log-probs and entropies.
        level: the mean entropy of the batch at its own prefixes, nats in the measure's unit.
    """

    context: ProbeContext
    rollouts: Rollouts
    measure: EntropyMeasure
    scores: TokenScores
    level: float

    @classmethod
    def of(cls, context: ProbeContext, rollouts: Rollouts, measure: EntropyMeasure) -> Scored:
        """Score a batch with the context's model as it is now."""
        batch = rollouts.for_autograd().without_empty_responses()[0]
        scores = OnePassEngine(context).score(batch)
        return cls(context, batch, measure, scores, measure.level(batch, _sums(batch, scores, measure)))

    @property
    def floor(self) -> float:
        """Nats below which a change of the level is rounding."""
        narrowest = max(torch.finfo(dtype).eps for dtype in self.context.compute_dtypes)
        return ROUNDINGS * narrowest * abs(self.level)

    def again(self) -> tuple[float, TokenScores]:
        """Level and scores of the model as it is now; not of one that is sharded, which is whole for one `scored` alone."""
        with torch.autocast(self.context.device.type, enabled=False):
            scores = OnePassEngine(self.context).score(self.rollouts)
        raise_if_interrupted()
        return self.measure.level(self.rollouts, _sums(self.rollouts, scores, self.measure)), scores

    def by_prompt(self) -> Tensor:
        """[B] every prompt's level."""
        rows, rollouts = torch.arange(self.rollouts.n_sequences), self.rollouts
        values = self.measure.weights(rollouts, rows) * _sums(rollouts, self.scores, self.measure)
        return torch.stack([values[rollouts.rows_of_prompt(n)].mean() for n in range(rollouts.n_prompts)])

    def change_to(self, scores: TokenScores) -> Reweighted:
        """The expectation's change, if the responses were sampled from this policy and these are another one's scores."""
        rows = torch.arange(self.rollouts.n_sequences)
        pooled = self.measure.weighting == "pooled"
        weights = torch.ones(len(rows), dtype=torch.float64) if pooled else self.measure.weights(self.rollouts, rows)
        before, after = (weights * _sums(self.rollouts, own, self.measure) for own in (self.scores, scores))
        logprobs = [own.logprobs.double().cpu().sum(-1) for own in (self.scores, scores)]
        lengths = self.measure.lengths(self.rollouts) if pooled else None
        return reweighted(self.rollouts.prompt_index, logprobs[1] - logprobs[0], before, after, lengths)


def _sums(rollouts: Rollouts, scores: TokenScores, measure: EntropyMeasure) -> Tensor:
    """[N] entropy of every response's tokens that count, fp64."""
    entropies = scores.entropies.double().cpu()
    return (entropies if measure.mask is None else entropies * measure.mask).sum(-1)
