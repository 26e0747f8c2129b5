"""The result of a probe: the forecast, its error bar, whose it is, and whether to trust it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from entropy_fast.accessors import Accessor, accessed
from entropy_fast.checks.coverage import PassCoverage
from entropy_fast.columns import SequenceTable
from entropy_fast.config import EntropyEstimator, EstimateOptions, RunOptions, Weighting
from entropy_fast.errors import escaped
from entropy_fast.estimates.attribution import Role, SequenceContributions
from entropy_fast.estimates.directional_derivatives import DirectionalDerivatives
from entropy_fast.estimates.explain import explanation
from entropy_fast.estimates.forecast import Forecast
from entropy_fast.estimates.intervals import LEVEL
from entropy_fast.estimates.measured import GradientAgreement, Plan
from entropy_fast.estimates.response_rows import ResponseRows
from entropy_fast.estimates.split import Split, UpdateForecasts
from entropy_fast.estimates.verdict import Verdict, verdict_of
from entropy_fast.rollouts import EmptyResponseReport
from entropy_fast.step.preconditioner import ExcludedElements

if TYPE_CHECKING:
    import pandas
    import pyarrow as pa
    import xarray

__all__ = ["DeltaH1Result", "Diagnostics", "Kind", "PromptContribution", "StandardError"]

Kind = Literal[
    "parts",
    "prompts",
    "step_parts",
    "updates",
    "functionals",
    "layers",
    "parameters",
    "sequences",
    "tokens",
    "kernel",
    "errors",
]

PROMPT_SHOWN = 40  # characters of a prompt that is named in a sentence

ENTROPY: dict[Weighting, str] = {
    "dr_grpo": "sequence entropy divided by L_max",
    "per_token": "mean entropy per response token",
    "sequence": "sequence entropy",
    "pooled": "mean entropy over all response tokens",
}
ESTIMATE: dict[EntropyEstimator, str] = {
    "score_function": "leave-one-out score-function estimate",
    "rao_blackwell": "Rao-Blackwell estimate from token entropies",
}
UNIT: dict[Weighting, str] = {
    "dr_grpo": "nats per token of generation budget",
    "per_token": "nats per token",
    "sequence": "nats per sequence",
    "pooled": "nats per token",
}


def entropy_functional(options: EstimateOptions, *, masked: bool) -> str:
    """Which entropy is meant, in words.

    Args:
        options: of the estimate.
        masked: whether a mask says which tokens count.
    """
    what, how = ENTROPY[options.of_entropy], ESTIMATE[options.entropy_estimator]
    if (options.entropy_estimator, options.of_entropy) == ("score_function", "per_token"):
        what = "E[w(1 - S)] with w = 1/L"
    if masked:
        what += ", of the tokens that entropy_mask marks"
    if options.policy_temperature != 1:
        what += f", of the policy softmax(logits/{options.policy_temperature:g})"
    if options.wanted_parts == ("direct",):
        what = f"direct part of the {what}"
    return f"{what}, {how}"


@dataclasses.dataclass(frozen=True)
class StandardError:
    """One standard error of δH₁ and what it is about.

    Attributes:
        name: how it was obtained.
        value: in the unit of δH₁; NaN when it is not defined for this batch.
        covers: the quantity it is the error of.
    """

    name: str
    value: float
    covers: str


@dataclasses.dataclass(frozen=True)
class PromptContribution:
    """One unit's (a prompt's, or in ``blocks`` mode a block's) part in δH₁.

    Attributes:
        group_ids: the group ids in the unit.
        role: ``both`` in the same-batch estimate; ``entropy`` or ``update`` by batch in the two-batch one.
        delta_h1: its share; shares of one role sum to δH₁.
        as_entropy: the part by its own entropy changing under the others' updates (None for ``update``). With one batch
            ``delta_h1`` is the mean of this and ``as_update``; each of the three sums to δH₁. Along the optimizer's whole step
            ``delta_h1`` is this, since momentum and decay are no prompt's update, and ``as_update`` sums to the fresh part.
        as_update: the part by its update changing the others' entropy (None for ``entropy``).
        n_responses: sequences in the unit.
        mean_response_length: tokens.
        mean_sequence_logprob: mean S_i, nats.
        mean_reward: None when the rollouts carry no rewards.
        mean_abs_advantage: 0 means that its update is zero, whatever its entropy does.
        prompt: text, where the rollouts carry it.
    """

    group_ids: tuple[int, ...]
    role: Role
    delta_h1: float
    as_entropy: float | None
    as_update: float | None
    n_responses: int
    mean_response_length: float
    mean_sequence_logprob: float
    mean_reward: float | None
    mean_abs_advantage: float
    prompt: str | None


@dataclasses.dataclass(frozen=True)
class Diagnostics:
    """What to know before believing the number.

    Attributes:
        standard_errors: every standard error that could be computed, with the quantity it covers.
        coverage: what the entropy gradient and the update gradient reached, by ``entropy`` and ``update``.
        excluded: elements without a usable second moment.
        empty_responses: sequences that were left out, per batch (``entropy``, ``update``).
        leading_products: X_sum · Y_sum of the first few parameters; empty where X_sum was not formed.
        length_budget: whether L_max was given or is the longest sampled response.
        sampling: temperature and top-p the rollouts were sampled with, per batch.
        unbiased_variance: unbiased variance of δH₁ where the whole kernel was kept, which can be negative for few prompts; NaN
            where it was not.
        warnings: everything that deserves a sentence.
        asides: those of them that do not bear on what may be concluded of this very update: how things were computed, counts,
            and the error for such updates.
        plan: how the engine went through the batch, and why.
        clip_factor: what clipping by the global norm multiplies the gradient by; 1 where nothing is clipped.
        live_gradient: how the gradient that stood in ``.grad`` compares with the rollouts' own; None without one.
        truncation: top-k and min-p the rollouts were sampled with, per batch, as ``sampling`` has temperature and top-p.
    """

    standard_errors: tuple[StandardError, ...]
    coverage: Mapping[str, PassCoverage]
    excluded: ExcludedElements
    empty_responses: Mapping[str, EmptyResponseReport]
    leading_products: Mapping[str, float]
    length_budget: str
    sampling: Mapping[str, tuple[float | None, float | None]]
    unbiased_variance: float
    warnings: tuple[str, ...]
    plan: Plan
    clip_factor: float = 1.0
    live_gradient: GradientAgreement | None = None
    truncation: Mapping[str, tuple[int | None, float | None]] = dataclasses.field(default_factory=dict)
    asides: tuple[str, ...] = ()

    @property
    def bearing(self) -> tuple[str, ...]:
        """The warnings that bear on what may be concluded: a bias, a guess, another quantity than one may think."""
        return tuple(warning for warning in self.warnings if warning not in self.asides)


@dataclasses.dataclass(frozen=True, eq=False)
class DeltaH1Result:
    """Forecast of the entropy change by the next update, exact to first order in the learning rate.

    Attributes:
        delta_h1: δH₁ = lr · U (one batch) or lr · X̄·Ȳ (two batches), in ``unit``; NaN where the direct part alone was asked
            for.
        std_error: for the change by this very update: from the entropy prompts' products with it, its samples held fixed; NaN
            when there are too few units. Others are in ``diagnostics.standard_errors``.
        forecast: the same with both errors and all shares; of the direct part where that alone was asked for. ``x_dot_y``,
            ``diagonal``, sums, ``kernel`` and ``per_prompt`` are of it too.
        learning_rate: lr.
        estimate: ``same_batch`` or ``two_batch``.
        engine: how X and Y were obtained.
        geometry: ``next_step``: the whole step that the optimizer will take, with momentum, decay and clipping;
            ``adam_static``: the step lr · P g with P from the stored second moments, without any of these.
        entropy_functional: which entropy is meant.
        entropy_level: that entropy now, in ``unit``, averaged over the entropy batch's prompts: from token entropies where the
            estimator computes them, and from -S_i elsewhere.
        unit: of δH₁ and of every share of it.
        x_dot_y: X_sum · Y_sum. Along the whole step these sums and the kernel are of the fresh gradient's part, and unknown
            where no part of the step is linear in the gradient.
        diagonal: [M] K_nn; None for two batches.
        row_sums: [M] (or [B_E]) Σ_m K_nm.
        column_sums: [M] (or [B_U]) Σ_n K_nm; None where the engine did not form X_sum.
        kernel: [M, M] K, None where the engine did not keep it.
        per_prompt: one record per unit, in batch order; entropy prompts alone where the update's shares are not known.
        sequences: S_i and coefficients of the ``entropy`` batch and of the ``update`` batch; where coefficients differ from
            token to token, their means.
        estimate_options: what was asked to be estimated.
        run_options: how it was asked to be run.
        diagnostics: what to know before believing it.
        derivatives: of every sequence's and token's log-prob along the update; None where the engine has only sums.
        split: the direct and the visitation part, each with its standard errors and shares; None with the score function.
        functionals: forecasts of the other numbers that were given, by name, each in its own unit per response.
        updates: what each of the other updates that were given would do, by name.
        compared: likewise what each would do beyond the planned one, its forecast less the planned one's, for the same prompts:
            what both have in common is not in the errors. Those for such updates are not known of two batches.
        step_parts: of the whole step what each part of it does, with its own split: ``momentum``, ``decay``, ``fresh``
            gradient, and ``scale``, the change that this gradient makes to the optimizer's scale (absent where no part of the
            step is linear in the gradient). They add up to the forecast. Empty under ``adam_static``.
        response_rows: by role, which row of the rollouts each sequence is, and where response tokens stand; empty where shares
            of neither are known.
    """

    delta_h1: float
    std_error: float
    forecast: Forecast
    learning_rate: float
    estimate: Literal["same_batch", "two_batch"]
    engine: str
    geometry: str
    entropy_functional: str
    entropy_level: float
    unit: str
    x_dot_y: float
    diagonal: Tensor | None
    row_sums: Tensor
    column_sums: Tensor | None
    kernel: Tensor | None
    per_prompt: tuple[PromptContribution, ...]
    sequences: Mapping[str, SequenceTable]
    estimate_options: EstimateOptions
    run_options: RunOptions
    diagnostics: Diagnostics
    derivatives: DirectionalDerivatives | None = None
    split: Split | None = None
    functionals: Mapping[str, Forecast] = dataclasses.field(default_factory=dict)
    updates: Mapping[str, UpdateForecasts] = dataclasses.field(default_factory=dict)
    compared: Mapping[str, UpdateForecasts] = dataclasses.field(default_factory=dict)
    step_parts: Mapping[str, UpdateForecasts] = dataclasses.field(default_factory=dict)
    response_rows: Mapping[Role, ResponseRows] = dataclasses.field(default_factory=dict)

    plot = Accessor("result.plot", "Figures of the result; see `entropy_fast.report.plots.accessors.ResultPlots`.")

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Confidence interval δH₁ ± t · std_error, with Student's t on Satterthwaite's degrees of freedom.

        Args:
            level: coverage aimed at, between 0 and 1.

        Returns:
            Lower and upper end in ``unit``, NaN when there is no standard error.

        Raises:
            ConfigError: ``level`` is not between 0 and 1.
        """
        return dataclasses.replace(self.forecast, value=self.delta_h1, std_error=self.std_error).interval(level)

    @property
    def by_parameter(self) -> dict[str, float] | None:
        """Share of ``forecast`` by parameter name, in model order; None where the engine did not take its sums apart."""
        return self.forecast.by_parameter

    @property
    def by_sequence(self) -> dict[Role, SequenceContributions] | None:
        """Shares of sequences by the role of their batch; None unless ``RunOptions.by_sequence`` asked for them.

        ``both`` in the same-batch estimate; ``entropy`` and ``update`` in the two-batch one.
        """
        return self.forecast.by_sequence

    @property
    def by_token(self) -> Tensor | None:
        """[N, T] shares of response tokens as ones whose log-prob and entropy change; None where the engine does not know.

        In the columns of the entropy batch.
        """
        return self.forecast.by_token

    @property
    def by_layer(self) -> dict[str, float] | None:
        """``by_parameter`` added up by decoder layer; what is in no layer (embeddings, the final norm) by its module.

        In model order; None where ``by_parameter`` is.
        """
        return self.forecast.by_layer

    @property
    def plan(self) -> Plan:
        """How the engine went through the batch, and why; with costs for the one-pass engine."""
        return self.diagnostics.plan

    @property
    def sign_established(self) -> bool | None:
        """Whether |δH₁| is at least two standard errors and the 95 % interval leaves out 0; None without a standard error."""
        if math.isnan(self.std_error):
            return None
        lower, upper = self.interval(0.95)
        return abs(self.delta_h1) >= 2 * self.std_error and not lower <= 0 <= upper

    @property
    def verdict(self) -> Verdict:
        """What may be concluded, in one sentence, with what it is made of."""
        return verdict_of(self.forecast, self.split, self.entropy_level, self.unit)

    def explain(self) -> str:
        """How much, how sure and from where, in three sentences."""
        prompts = [(_called(p), p.delta_h1) for p in self.per_prompt if p.role != "update"]
        return explanation(self.forecast, self.split, self.entropy_level, self.unit, prompts)

    def to_arrow(self, kind: Kind = "prompts") -> pa.Table:
        """A part of the result as an Arrow table; what is not known is null.

        Args:
            kind: ``parts``, ``prompts``, ``step_parts``, ``updates``, ``functionals``, ``layers``, ``parameters``,
                ``sequences``, ``tokens``, ``kernel`` or ``errors``; `entropy_fast.estimates.tables` has their columns.

        Raises:
            ConfigError: there is no such kind.
            ResultError: the result does not hold it; the message says which option asks for it.
        """
        from entropy_fast.estimates.tables import arrow_table

        return arrow_table(self, kind)

    def to_dataframe(self, kind: Kind = "prompts") -> pandas.DataFrame:
        """The same as a pandas DataFrame, whose ``attrs`` hold the unit.

        Raises:
            MissingPackageError: pandas is not installed.
            ConfigError, ResultError: as for `to_arrow`.
        """
        from entropy_fast.estimates.frames import dataframe

        return dataframe(self.to_arrow(kind), f"to_dataframe({kind!r})")

    def to_xarray(self) -> xarray.Dataset:
        """The influence kernel as an xarray Dataset over ``entropy_unit`` and ``update_unit``.

        Raises:
            MissingPackageError: xarray is not installed.
            ResultError: the result does not hold the kernel.
        """
        from entropy_fast.estimates.frames import kernel_dataset

        return kernel_dataset(self)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return str(accessed("result.html")(self))

    def __repr__(self) -> str:
        return f"<DeltaH1Result: {self}>"

    def __str__(self) -> str:
        if math.isnan(self.delta_h1):
            found = self.forecast
            shown = f"direct part of δH₁ = {found.value:.17g} ± {found.std_error:.3g} {self.unit}"
            return f"{shown} ({self.engine}, {self.geometry})"
        error = "no standard error (too few prompts)" if math.isnan(self.std_error) else f"± {self.std_error:.3g}"
        verdict = {True: "", False: "; the sign is not established", None: ""}[self.sign_established]
        return f"δH₁ = {self.delta_h1:.17g} {error} {self.unit}{verdict} ({self.engine}, {self.geometry})"


def _called(prompt: PromptContribution) -> str:
    """A prompt's text, escaped and cut short, or its group ids."""
    if prompt.prompt is None:
        return f"group {', '.join(map(str, prompt.group_ids))}"
    text = escaped(" ".join(prompt.prompt.split()))
    return f'"{text}"' if len(text) <= PROMPT_SHOWN else f'"{text[:PROMPT_SHOWN]}..."'
