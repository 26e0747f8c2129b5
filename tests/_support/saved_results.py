"""Results of any size and with any texts, as they are read from a folder, without a model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from entropy_fast.checks.coverage import PassCoverage
from entropy_fast.columns import SequenceTable
from entropy_fast.columns.coefficients import RatioTable
from entropy_fast.config import EstimateOptions, RunOptions
from entropy_fast.estimates.forecast import Forecast
from entropy_fast.estimates.measured import Plan
from entropy_fast.estimates.result import DeltaH1Result, Diagnostics, PromptContribution, StandardError
from entropy_fast.estimates.split import Split, UpdateForecasts
from entropy_fast.rollouts import EmptyResponseReport
from entropy_fast.run_folder.provenance import Provenance
from entropy_fast.run_folder.response_table import SavedResponse, TokenShares
from entropy_fast.run_folder.result_reading import SavedResult
from entropy_fast.run_folder.run_reading import SavedRun
from entropy_fast.step import ExcludedElements

Text = Callable[[int, int], str]
PARAMETERS = [
    f"base_model.model.model.layers.{layer}.{kind}.lora_{half}.default.weight"
    for layer in range(3)
    for kind in ("self_attn.q_proj", "mlp.up_proj")
    for half in "AB"
]


def _forecast(values: torch.Tensor, parameters: Sequence[str] = PARAMETERS) -> Forecast:
    value = float(values.sum())
    error = float(values.std()) * math.sqrt(len(values))
    shares = np.random.default_rng(len(parameters)).normal(size=len(parameters))
    by_parameter = dict(zip(parameters, (value * shares / shares.sum()).tolist(), strict=True))
    return Forecast(value, error, 2 * error, len(values), values, by_parameter)


def made_result(
    prompts: int = 4, responses: int = 3, text: Text = lambda n, i: f"What is {n}?", **changes: Any
) -> DeltaH1Result:
    """Of one batch along the optimizer's whole step; seeded numbers whose shares add up.

    Args:
        prompts: B.
        responses: to each.
        text: of a prompt, from its number and 0.
        changes: fields to replace.
    """
    chance = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=chance, dtype=torch.float64)

    kernel = numbers(prompts, prompts)
    direct, visitation = (_forecast(scale * numbers(prompts) - scale) for scale in (1e-3, 1e-2))
    total = _forecast(direct.by_unit + visitation.by_unit)
    split = Split(total, direct, visitation, direct.value * 1.01)
    both = UpdateForecasts(total, split, {"reward": _forecast(numbers(prompts))})
    count = prompts * responses
    sequences = SequenceTable(
        -numbers(count).abs() * 20,
        numbers(count).abs() * 20,
        {"entropy": numbers(count)},
        RatioTable(numbers(count).abs() / 20, numbers(count).abs(), torch.zeros(count, dtype=torch.float64)),
    )
    coverage = {side: PassCoverage(side, 12, 12, 1.0, 0.5, (), 20.0) for side in ("entropy", "update")}
    found = DeltaH1Result(
        delta_h1=total.value,
        std_error=total.std_error,
        forecast=total,
        learning_rate=1e-4,
        estimate="same_batch",
        engine="one_pass",
        geometry="next_step",
        entropy_functional="sequence entropy",
        entropy_level=1.4,
        unit="nats per token",
        x_dot_y=float(kernel.sum()),
        diagonal=kernel.diagonal().clone(),
        row_sums=kernel.sum(1),
        column_sums=kernel.sum(0),
        kernel=kernel,
        per_prompt=tuple(
            PromptContribution(
                (n,),
                "both",
                float(total.by_unit[n]),
                float(total.by_unit[n]),
                float(direct.by_unit[n]),
                responses,
                20.0,
                -30.0,
                0.5,
                0.4,
                text(n, 0),
            )
            for n in range(prompts)
        ),
        sequences={"entropy": sequences, "update": sequences},
        estimate_options=EstimateOptions(step="next"),
        run_options=RunOptions(by_token=True),
        diagnostics=Diagnostics(
            standard_errors=(StandardError("x_row_means", total.std_error, "the change made by this update"),),
            coverage=coverage,
            excluded=ExcludedElements(0, 0, 0, 0.0, 3),
            empty_responses={"rollouts": EmptyResponseReport((), ())},
            leading_products={},
            length_budget="rollouts: L_max given",
            sampling={"rollouts": (1.0, 1.0)},
            unbiased_variance=math.nan,
            warnings=("a note",),
            plan=Plan("packed"),
        ),
        split=split,
        functionals=both.functionals,
        updates={"with a bonus": both},
        step_parts={"momentum": both, "fresh": both},
    )
    changed = dataclasses.replace(found, **changes)
    return dataclasses.replace(changed, forecast=dataclasses.replace(changed.forecast, kernel=changed.kernel))


def made_responses(
    prompts: int = 4,
    responses: int = 3,
    tokens: int = 6,
    text: Text = lambda n, i: f"What is {n}?",
    piece: Text = lambda i, t: f" word{t}",
) -> tuple[SavedResponse, ...]:
    """Responses to the prompts of `made_result`, with seeded shares."""
    chance = np.random.default_rng(0)
    found = []
    for row in range(prompts * responses):
        direct, visitation = 1e-4 * chance.normal(size=tokens), 1e-3 * chance.normal(size=tokens)
        pieces = tuple(piece(row, t) for t in range(tokens))
        shares = TokenShares(*(tuple(x.tolist()) for x in (direct + visitation, direct, visitation)))
        n = row // responses
        found.append(
            SavedResponse("both", row, n, 0.5, 1.0, text(n, 0), "".join(pieces), tuple(range(tokens)), pieces, shares)
        )
    return tuple(found)


def made_run(
    result: DeltaH1Result,
    responses: tuple[SavedResponse, ...] | None = None,
    path: str = "runs/made",
    **provenance: Any,
) -> SavedRun:
    """As `read_run` would give them."""
    origin = Provenance(
        commands=("entropy-fast probe runs/made",), directory="/home", model="small", dtype="float32", device="cpu",
        files={"rollouts": "rollouts.jsonl"}, versions={"torch": "2"}, machine="Linux", finished="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    saved = SavedResult(Path(path), "0", result, dataclasses.replace(origin, **provenance), responses)
    return SavedRun(Path(path), saved, (), (), {})
