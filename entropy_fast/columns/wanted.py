"""From what is asked for to the columns of one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from entropy_fast.columns.candidate_tables import GivenCandidate, GivenCoefficients
from entropy_fast.columns.candidates import candidate_column
from entropy_fast.columns.column import Column, Columns
from entropy_fast.columns.entropy import (
    BatchEntropy,
    DirectEntropy,
    EntropyMeasure,
    RaoBlackwellEntropy,
    ScoreFunctionEntropy,
)
from entropy_fast.columns.functional import Functionals, functionals_of
from entropy_fast.columns.given import LossFunction, given_update
from entropy_fast.columns.scores import TokenScores
from entropy_fast.columns.update import PolicyGradient
from entropy_fast.config import EstimateOptions
from entropy_fast.errors import ConfigError
from entropy_fast.rollouts import Rollouts

__all__ = ["UPDATE_OPTIONS", "Wanted", "columns_of", "entropy_measure"]

# What describes the update in closed form, and has no meaning beside one that is given.
UPDATE_OPTIONS = (
    "update_weighting",
    "importance_ratio",
    "clip_range",
    "dual_clip",
    "kl_coefficient",
    "kl_estimator",
    "entropy_bonus",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Wanted:
    """What one call asks for beside the options; everything is of rows as they were given, empty responses included.

    Attributes:
        functionals: other numbers to be forecast, [N] by name, of the entropy batch.
        entropy_mask: [N, T] 1 at response tokens of the entropy batch whose entropy counts; None for all.
        update: the update itself: the loss that is minimised, or its coefficients; None for what the options describe.
        candidates: other updates to be compared with it, by name.
        scores: what the policy says of the update batch now, where that is known already; it is checked. None to have it found
            where something depends on it.
    """

    functionals: Functionals = dataclasses.field(default_factory=dict)
    entropy_mask: Tensor | None = None
    update: LossFunction | GivenCoefficients | None = None
    candidates: Mapping[str, GivenCandidate] = dataclasses.field(default_factory=dict)
    scores: TokenScores | None = None


def columns_of(
    options: EstimateOptions,
    wanted: Wanted | None = None,
    entropy: Rollouts | None = None,
    update: Rollouts | None = None,
) -> Columns:
    """The columns of a call: an entropy, what is to be known apart from it, the update, and those it is compared with.

    The first functional column is the one whose change is forecast, and the first update column the one that changes it.

    Args:
        options: of the estimate.
        wanted: what else is asked for; None for nothing.
        entropy: the entropy batch as it was given.
        update: the update batch as it was given.

    Raises:
        ConfigError, RolloutsError: something that was asked for does not fit.
    """
    wanted = wanted or Wanted()
    measure = entropy_measure(options, wanted, entropy)
    columns: list[Column] = []
    whole: ScoreFunctionEntropy | RaoBlackwellEntropy
    if options.entropy_estimator == "score_function":
        if measure.mask is not None:
            raise ConfigError(
                "entropy_mask with entropy_estimator='score_function', which knows no entropy of single tokens.",
                fix="use entropy_estimator='rao_blackwell'.",
            )
        whole = ScoreFunctionEntropy(measure)
    else:
        whole = RaoBlackwellEntropy(measure)
    if options.wanted_parts != ("direct",):
        fitted = options.entropy_estimator == "rao_blackwell" and options.baseline == "prompts"
        columns.append(BatchEntropy(whole, fitted) if fitted or measure.weighting == "pooled" else whole)
    if options.wanted_parts:
        columns.append(DirectEntropy(measure))
    if entropy is not None:
        columns += functionals_of(wanted.functionals, entropy)
    described = PolicyGradient(options, update is not None and update.token_weights is not None)
    if wanted.update is None:
        columns.append(described)
    else:
        _refuse_described(options)
        assert update is not None
        columns.append(given_update(wanted.update, update))
    for name, candidate in wanted.candidates.items():
        assert update is not None
        _check_name(name, columns)
        columns.append(candidate_column(candidate, columns[-1 - _candidates(columns)], options, update, name))
    return Columns(tuple(columns))


def entropy_measure(options: EstimateOptions, wanted: Wanted, entropy: Rollouts | None) -> EntropyMeasure:
    """Which entropy is meant; of rows that have response tokens.

    Raises:
        ConfigError: the mask is not one of the batch.
    """
    if wanted.entropy_mask is None:
        return EntropyMeasure(options.of_entropy)
    assert entropy is not None
    mask = torch.as_tensor(wanted.entropy_mask).detach().cpu()
    expected = entropy.loss_mask.shape
    if mask.shape != expected or mask.is_complex() or not bool(((mask == 0) | (mask == 1)).all()):
        raise ConfigError(
            f"entropy_mask has shape {list(mask.shape)} and dtype {mask.dtype}; expected zeros and ones, {list(expected)}.",
            fix="pass one 0 or 1 per token, in the token's own column.",
        )
    mask = mask.to(torch.float64)[entropy.response_lengths > 0]
    if not bool((mask * entropy.loss_mask.cpu()[entropy.response_lengths > 0]).any()):
        raise ConfigError("entropy_mask is 0 at every response token.", fix="mark the tokens whose entropy is meant.")
    return EntropyMeasure(options.of_entropy, mask)


def _candidates(columns: list[Column]) -> int:
    """How many update columns stand behind the first one."""
    return sum(column.side is columns[-1].side for column in columns) - 1


def _refuse_described(options: EstimateOptions) -> None:
    described = [name for name in UPDATE_OPTIONS if name in options.changed()]
    if described:
        raise ConfigError(
            f"EstimateOptions: {', '.join(described)} describe an update, and `update` gives one.",
            fix="leave one of the two out: a loss function has its own ratios, clipping and weights.",
        )


def _check_name(name: object, columns: list[Column]) -> None:
    taken = {column.name for column in columns}
    if not isinstance(name, str) or not name or name in taken:
        raise ConfigError(
            f"updates: {name!r} is no name for one.", fix=f"use a text, and none of {', '.join(sorted(taken))}."
        )
