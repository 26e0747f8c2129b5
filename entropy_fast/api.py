"""`fast_delta_h1`: one call from a model, its optimizer and a batch of rollouts to a forecast with an error bar."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from entropy_fast.checks.grad_context import assert_grad_context
from entropy_fast.columns import Functionals, TokenScores, Wanted
from entropy_fast.columns.candidates import Candidate
from entropy_fast.columns.given import LossFunction
from entropy_fast.config import EstimateOptions, RunOptions
from entropy_fast.context import ProgressCallback
from entropy_fast.distributed.team import Team, joined
from entropy_fast.engines import engine_kind
from entropy_fast.errors import ConfigError, RolloutsError
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.offline_entropy_probe import OfflineEntropyProbe
from entropy_fast.rollouts import Rollouts
from entropy_fast.sharded import as_whole
from entropy_fast.step import GivenOptimizer

__all__ = ["fast_delta_h1"]


def fast_delta_h1(
    model: nn.Module,
    optimizer: GivenOptimizer,
    rollouts: Rollouts,
    *,
    entropy_rollouts: Rollouts | None = None,
    functionals: Functionals | None = None,
    entropy_mask: Tensor | None = None,
    update: LossFunction | None = None,
    coefficients: Tensor | tuple[Tensor, Tensor] | None = None,
    updates: Mapping[str, Candidate | LossFunction | Tensor | tuple[Tensor, Tensor]] | None = None,
    scores: TokenScores | None = None,
    estimate: EstimateOptions | None = None,
    run: RunOptions | None = None,
    on_progress: ProgressCallback | None = None,
    team: Team | None = None,
    keeps_checkpoint: bool = False,
) -> DeltaH1Result:
    """Forecast how much the next update will change the policy's entropy, before it is taken.

    Call it before the training step's forward: a DistributedDataParallel forward that still waits for its backward would
    have its gradient synchronisation used up by the probe's.

    The model, its gradients, train/eval flags, random states and the optimizer are given back as they were, also when
    the probe raises.

    Args:
        model: a causal language model (LoRA or not, quantised base or not, DDP-wrapped or not; with ``RunOptions(ranks="all")``
            also one that FSDP2 shards over all ranks).
        optimizer: the live optimizer that trains it, of any kind, or a list of those that train it together (then the step is
            the whole one that they will take next); or the path of an optimizer's file or checkpoint folder, or an `AdamState`
            (then it is Adam's static geometry, which comes from second moments, unless ``EstimateOptions(step="next")`` asks
            for the whole, or the file is of another kind of optimizer, of which there is no other).
        rollouts: the batch the update will be made from. Alone, it is also where the entropy gradient is estimated.
        entropy_rollouts: an independent batch for the entropy gradient; then the two-batch estimate is returned, with
            the error conditional on the update.
        functionals: other numbers whose expectation the update changes, forecast from the same backward: by name (``reward``,
            ``length``, any other) one number per row of the batch for the entropy gradient. See ``result.functionals``.
        entropy_mask: [N, T] 1 at response tokens whose entropy counts, of the batch for the entropy gradient; None for all.
        update: the loss that the trainer minimises, in place of the update that ``estimate`` describes: a function of log-probs
            and entropies [N, T] of ``rollouts`` (in column t those of the token in column t; 0 where no response token stands)
            that returns a scalar of the whole batch with its graph. It is called once, after a sweep that finds them.
        coefficients: the update as -∂L/∂(log-prob), [N] by sequence or [N, T] by token; or a pair of that and -∂L/∂(entropy)
            [N, T]. With ``gradient="live"`` those of the loss that ``.grad`` is of: a prompt's own part in it is known by them.
        updates: other updates to compare with it, by name: a ready one of `entropy_fast.candidates`, a loss or coefficients.
            See ``result.updates``, and ``result.compared`` for what each would do beyond the planned one. With
            ``gradient="live"`` they change what stands in ``.grad``, by the coefficients that are given of it: where a sample
            of the prompts is gone through, what they change is known from the sample alone, and the errors say so.
        scores: log-probs and entropies [N, T] of ``rollouts`` under the model as it is now, which saves that sweep; they are
            checked.
        estimate: what is estimated; None takes the defaults.
        run: how it is run; None takes the defaults.
        on_progress: called with stage, prompts done, prompts in all.
        team: the ranks of ``RunOptions(ranks="all")``, where the caller has joined them already (`entropy_fast.distributed`).
        keeps_checkpoint: whether what was kept in ``RunOptions(checkpoint=...)`` stays there when the forecast is made, for a
            caller who writes the result down before `entropy_fast.resuming.discard_checkpoint`.

    Returns:
        δH₁ in nats per the unit named in the result, with standard error, interval, shares and diagnostics.

    Raises:
        GradContextError: called under ``inference_mode`` or ``no_grad``.
        RolloutsError, OptimizerStateError, LearningRateError, ConfigError: bad input.
        ResumeError: the checkpoint is of another probe, damaged, or another process's.
        DistributedError: with ``ranks="all"``, a rank failed, died, did not come or holds something else; raised by all.
        ModelStateError, GraphDetachedError, GradientCoverageError, CheckpointingError, ForwardDerivativeError: the model cannot
            be probed as it is.
    """
    assert_grad_context("fast_delta_h1")
    for name, batch in (("rollouts", rollouts), ("entropy_rollouts", entropy_rollouts)):
        if not isinstance(batch, Rollouts) and not (name == "entropy_rollouts" and batch is None):
            raise RolloutsError(
                f"fast_delta_h1: `{name}` is a {type(batch).__name__}, expected Rollouts.",
                fix="build it with Rollouts(...) or, from the padded [B, G, T] form, Rollouts.from_dict(batch).",
            )
    for option, kind in ((estimate, EstimateOptions), (run, RunOptions)):
        if option is not None and not isinstance(option, kind):
            raise ConfigError(
                f"fast_delta_h1: a {type(option).__name__} was passed where {kind.__name__} is expected.",
                fix="pass estimate=EstimateOptions(...) for what is estimated and run=RunOptions(...) for how.",
            )
    if update is not None and coefficients is not None:
        raise ConfigError(
            "fast_delta_h1: `update` and `coefficients` both give the update.", fix="leave one of them out."
        )
    if update is not None and not callable(update):
        raise ConfigError(
            f"fast_delta_h1: `update` is a {type(update).__name__}, expected a function of log-probs and entropies.",
            fix="pass coefficients as `coefficients`.",
        )
    wanted = Wanted(
        functionals or {}, entropy_mask, coefficients if update is None else update, dict(updates or {}), scores
    )
    estimate, run = estimate or EstimateOptions(), run or RunOptions()
    with (
        joined(run.ranks, run.rank_timeout, team) as found,
        as_whole(model, optimizer, estimate, run, found, by_layer=engine_kind(run).by_layer) as whole,
    ):
        probe = OfflineEntropyProbe(
            whole.model,
            whole.optimizer,
            estimate=estimate,
            run=run,
            on_progress=on_progress,
            team=found,
            keeps_checkpoint=keeps_checkpoint,
            parted=whole.parted,
        )
        if entropy_rollouts is None:
            return probe.compute_delta_h1(rollouts, wanted=wanted)
        return probe.run_mixed_probe(entropy_rollouts=entropy_rollouts, update_rollouts=rollouts, wanted=wanted)
