"""What a result holds; or an error that names the option which asks for it.

Legend: K_nm = X_n · Y_m what the update of unit m does to the entropy of unit n, |b| prompts of a unit, lr the learning rate, s
what clipping multiplies the gradient by.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from entropy_fast.errors import ConfigError, ResultError
from entropy_fast.estimates.attribution import Role, SequenceContributions
from entropy_fast.estimates.forecast import Forecast
from entropy_fast.estimates.result import DeltaH1Result, PromptContribution
from entropy_fast.estimates.split import UpdateForecasts

__all__ = [
    "EntropyPart",
    "by_sequence_of",
    "by_token_of",
    "entropy_units",
    "functionals_of",
    "kernel_of",
    "kernel_shares",
    "layers_of",
    "parameters_of",
    "part_of",
    "parts_of",
    "step_parts_of",
    "updates_of",
]

EntropyPart = Literal["total", "direct", "visitation"]
PARTS: tuple[EntropyPart, ...] = get_args(EntropyPart)


def parts_of(result: DeltaH1Result, own: UpdateForecasts | None = None) -> dict[str, Forecast]:
    """The parts of δH₁ that are known, the total last; of ``own``, another update or a part of the step, where it is given."""
    forecast, split = (result.forecast, result.split) if own is None else (own.forecast, own.split)
    if result.estimate_options.wanted_parts == ("direct",):
        return {"direct": forecast}
    parts: dict[str, Forecast] = {}
    if split is not None:
        parts = {"direct": split.direct, "visitation": split.visitation}
    return {**parts, "total": forecast}


def part_of(result: DeltaH1Result, part: EntropyPart | None) -> tuple[str, Forecast]:
    """One part of δH₁ and its name; None is what ``result.forecast`` is of: the total, or the direct part asked for alone.

    Raises:
        ConfigError: there is no such part.
        ResultError: the result does not hold it.
    """
    known = parts_of(result)
    name = part or ("total" if "total" in known else "direct")
    if name not in PARTS:
        raise ConfigError(f"part is {part!r}.", fix=f"use one of {', '.join(PARTS)}, or None.")
    if name not in known:
        what = "the total" if name == "total" else f"the {name} part of δH₁"
        wants = "parts=None" if "total" not in known else "entropy_estimator='rao_blackwell'"
        raise _lacks(what, f"pass estimate=EstimateOptions({wants})")
    return name, known[name]


def entropy_units(result: DeltaH1Result) -> list[PromptContribution]:
    """The units whose entropy changes, in batch order."""
    return [unit for unit in result.per_prompt if unit.role != "update"]


def parameters_of(result: DeltaH1Result, part: EntropyPart | None = None) -> dict[str, float]:
    """Shares by parameter, in model order.

    Raises:
        ConfigError, ResultError: as for `part_of`; the engine did not take its sums apart.
    """
    return _taken_apart(part_of(result, part)[1].by_parameter)


def layers_of(result: DeltaH1Result, part: EntropyPart | None = None) -> dict[str, float]:
    """Shares by decoder layer; errors as for `parameters_of`."""
    return _taken_apart(part_of(result, part)[1].by_layer)


def by_sequence_of(result: DeltaH1Result) -> dict[Role, SequenceContributions]:
    """Shares of sequences by the role of their batch.

    Raises:
        ResultError: the result does not hold them.
    """
    if result.by_sequence is None:
        raise _lacks("shares of sequences", "pass run=RunOptions(by_sequence=True) (--by-sequence)")
    return result.by_sequence


def by_token_of(result: DeltaH1Result, part: EntropyPart | None = None) -> Tensor:
    """[N, T] shares of response tokens, in the columns of the entropy batch.

    Raises:
        ConfigError, ResultError: as for `part_of`; the result does not hold them.
    """
    shares = part_of(result, part)[1].by_token
    if shares is None:
        raise _lacks("shares of tokens", "pass run=RunOptions(by_token=True) (--by-token)")
    return shares


def kernel_of(result: DeltaH1Result, part: EntropyPart | None = None) -> Tensor:
    """[M, M] K, before the learning rate.

    Raises:
        ConfigError, ResultError: as for `part_of`; the result does not hold it.
    """
    found = part_of(result, part)[1].kernel
    if result.kernel is not None and found is not None:
        return found
    what = "the influence kernel"
    if result.estimate == "two_batch":
        raise _lacks(what, "leave entropy_rollouts out: it is of one batch")
    if result.estimate_options.gradient == "live":
        raise _lacks(
            what, "pass estimate=EstimateOptions(gradient='rollouts'): .grad is one gradient, not one a prompt"
        )
    if result.geometry == "next_step" and result.diagonal is None:
        raise _lacks(what, "pass estimate=EstimateOptions(step='adam_static'): this step is not linear in the gradient")
    raise _lacks(
        what, "pass run=RunOptions(full_kernel=True) (--full-kernel), with a larger memory_budget where it asks"
    )


def kernel_shares(result: DeltaH1Result, part: EntropyPart | None = None) -> Tensor:
    """[M, M] s lr K_nm / (Σ_{b≠c} |b| |c|): every pair's share of δH₁; NaN on the diagonal, which δH₁ leaves out.

    Along the optimizer's whole step they add up to the fresh gradient's part of δH₁, else to δH₁.

    Raises:
        ConfigError, ResultError: as for `kernel_of`.
    """
    kernel = kernel_of(result, part).to(torch.float64)
    sizes = torch.tensor([len(unit.group_ids) for unit in entropy_units(result)], dtype=torch.float64)
    pairs = float(sizes.sum() ** 2 - sizes.square().sum())
    shares = result.diagnostics.clip_factor * result.learning_rate * kernel / pairs
    return shares.fill_diagonal_(torch.nan)


def functionals_of(result: DeltaH1Result) -> Mapping[str, Forecast]:
    """Forecasts of other numbers, by name.

    Raises:
        ResultError: there are none.
    """
    if not result.functionals:
        raise _lacks("other functionals", "pass functionals={name: numbers} to fast_delta_h1")
    return result.functionals


def updates_of(result: DeltaH1Result) -> dict[str, UpdateForecasts]:
    """The planned update, called "planned", and those compared with it.

    Raises:
        ResultError: there are none.
    """
    if not result.updates:
        raise _lacks("other updates", "pass updates={name: candidate} to fast_delta_h1 (--candidate)")
    return {"planned": UpdateForecasts(result.forecast, result.split, result.functionals), **result.updates}


def step_parts_of(result: DeltaH1Result) -> Mapping[str, UpdateForecasts]:
    """What each part of the optimizer's step does.

    Raises:
        ResultError: the step was taken as one.
    """
    if not result.step_parts:
        raise _lacks("parts of the optimizer's step", "pass estimate=EstimateOptions(step='next') (--step next)")
    return result.step_parts


def _taken_apart(shares: dict[str, float] | None) -> dict[str, float]:
    if shares is None:
        raise _lacks("shares of parameters", "pass run=RunOptions(engine='one_pass') (--engine one_pass)")
    return shares


def _lacks(what: str, fix: str) -> ResultError:
    return ResultError(f"the result does not hold {what}.", fix=f"{fix}, and probe again.")
