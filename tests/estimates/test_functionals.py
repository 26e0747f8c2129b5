"""Forecasts of other numbers from the same backward: against loops of plain autograd, by every engine.

Legend: F_i the number of sequence i, G responses and B prompts, X_n = Σ_i (F_i - mean_{j≠i} F_j) ∇S_i / G, Y_m preconditioned
update gradient.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from probe_options import options_of
from probe_oracle import models
from probe_oracle.batches import Shape, make_rollouts
from probe_oracle.oracle import cross_kernel, prompt_gradients, relative_error, sequences_of
from probe_oracle.u_statistics import jackknife, singles
from rich.console import Console
from torch import Tensor, nn

from entropy_fast import DeltaH1Result, Rollouts, fast_delta_h1
from entropy_fast.errors import RolloutsError
from entropy_fast.report.terminal import print_result
from entropy_fast.run_folder.result_files import result_document

Setup = tuple[nn.Module, torch.optim.Optimizer]
ENGINES = [
    ("tiny", {"engine": "two_pass"}),
    ("tiny", {"engine": "one_pass"}),
    ("qwen2", {"engine": "one_pass"}),
    ("qwen2", {"engine": "one_pass", "memory_budget": 1}),
]
pytestmark = pytest.mark.filterwarnings("ignore:.*without response tokens were left out")


def batch(seed: int = 0, empty: int = 0) -> Rollouts:
    return make_rollouts(Shape(budget=2, empty=empty), models.VOCABULARY, seed)


def numbers(rollouts: Rollouts) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "reward": torch.rand(rollouts.n_sequences, generator=generator),
        "length": rollouts.response_lengths,
    }


def gradients(model: nn.Module, rollouts: Rollouts, values: Tensor) -> Tensor:
    """[B, D] X_n."""
    sequences = sequences_of(model, rollouts)
    found = []
    for group in dict.fromkeys(s.group for s in sequences):
        members = [s for s in sequences if s.group == group]
        total = torch.zeros_like(members[0].gradient)
        for s in members:
            others = [float(values[o.row]) for o in members if o is not s]
            total += (float(values[s.row]) - math.fsum(others) / len(others)) / len(members) * s.gradient
        found.append(total)
    return torch.stack(found)


def forecast(setup: Setup, rollouts: Rollouts, entropy: Rollouts | None = None, **options: Any) -> DeltaH1Result:
    given = options.pop("functionals", numbers(rollouts if entropy is None else entropy))
    chosen = options_of(learning_rate=2.0, weighting="per_token", **options)
    return fast_delta_h1(*setup, rollouts, entropy_rollouts=entropy, functionals=given, **chosen)


def close(found: object, expected: object) -> None:
    assert relative_error(found, expected) < 1e-9


@pytest.mark.parametrize("empty", [0, 2], ids=["", "with empty responses"])
@pytest.mark.parametrize(("family", "options"), ENGINES, ids=["two_pass", "own logits", "packed", "second sweep"])
def test_one_batch(setups: dict[str, Setup], family: str, options: dict[str, Any], empty: int) -> None:
    setup, rollouts = setups[family], batch(empty=empty)
    result = forecast(setup, rollouts, **options)
    y = prompt_gradients(*setup, rollouts, "per_token").y
    for name, values in numbers(rollouts).items():
        kernel = cross_kernel(gradients(setup[0], rollouts, values), y)
        B, found = len(kernel), result.functionals[name]
        close(found.value, 2.0 * (kernel.sum() - kernel.trace()) / (B * (B - 1)))
        rows = (kernel.sum(1) - kernel.diagonal()) / (B - 1)
        close(found.std_error, 2.0 * rows.std() / math.sqrt(B))
        close(found.population_std_error, 2.0 * jackknife(kernel, singles(kernel)))
        close(found.by_unit.sum(), found.value)
    plain = forecast(setup, rollouts, functionals=None, **options)
    assert plain.functionals == {}
    close(result.delta_h1, plain.delta_h1)
    close(result.std_error, plain.std_error)


@pytest.mark.parametrize("engine", ["two_pass", "one_pass", "jvp"])
def test_two_batches(setups: dict[str, Setup], engine: str) -> None:
    setup, entropy, update = setups["qwen2"], batch(1), batch(2)
    result = forecast(setup, update, entropy, engine=engine)
    y = prompt_gradients(*setup, update, "per_token").y.mean(0)
    for name, values in numbers(entropy).items():
        projections = gradients(setup[0], entropy, values) @ y
        close(result.functionals[name].value, 2.0 * projections.mean())
        close(result.functionals[name].std_error, 2.0 * projections.std() / math.sqrt(len(projections)))


def test_beside_a_split_they_take_no_backward_of_their_own(setups: dict[str, Setup]) -> None:
    options = {"entropy_estimator": "rao_blackwell", "engine": "one_pass"}
    with_both, alone = (forecast(setups["qwen2"], batch(), **options, **more) for more in ({}, {"functionals": None}))
    assert list(with_both.functionals) == ["reward", "length"]
    assert "and 3 backwards" in str(with_both.plan)
    assert "and 3 backwards" in str(alone.plan)
    assert with_both.split is not None
    assert alone.split is not None
    close(with_both.split.direct.value, alone.split.direct.value)


def test_each_has_its_kernel_where_kernels_are_kept(setups: dict[str, Setup]) -> None:
    result = forecast(setups["qwen2"], batch(), entropy_estimator="rao_blackwell", engine="one_pass")
    assert result.split is not None and result.kernel is not None
    parts = [result.split.direct.kernel, result.split.visitation.kernel]
    assert all(part is not None for part in parts)
    close(sum(parts), result.kernel)  # type: ignore[arg-type]
    for name, found in result.functionals.items():
        assert found.kernel is not None
        B = len(found.kernel)
        close(found.value, 2.0 * (found.kernel.sum() - found.kernel.trace()) / (B * (B - 1)))
        assert result_document(result)["functionals"][name].keys() >= {"value", "by_unit"}
        assert "kernel" not in result_document(result)["functionals"][name]


def test_they_are_shown_and_written(setups: dict[str, Setup]) -> None:
    rollouts = batch()
    result = forecast(setups["qwen2"], rollouts, functionals={"evil\x1b[31m": numbers(rollouts)["reward"].tolist()})
    console = Console(width=200, record=True, file=None, quiet=False)
    with console.capture() as shown:
        print_result(result, console, verbose=True)
    assert "What else the update changes" in shown.get()
    assert "\x1b[31m" not in shown.get()
    assert result_document(result)["functionals"]["evil\x1b[31m"]["value"] == result.functionals["evil\x1b[31m"].value


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"reward": [1.0]}, r"has shape \[1\]"),
        ({"reward": [math.nan] * 14}, "not finite"),
        ({"reward": "much"}, "cannot be made a tensor"),
        ({"entropy": [1.0] * 14}, "is no name"),
        ({"": [1.0] * 14}, "is no name"),
        ({3: [1.0] * 14}, "is no name"),
    ],
)
def test_what_is_no_functional(setups: dict[str, Setup], given: dict[Any, Any], message: str) -> None:
    assert batch().n_sequences == 14
    with pytest.raises(RolloutsError, match=message):
        forecast(setups["tiny"], batch(), functionals=given)


def test_a_prompt_with_one_response_has_no_baseline(setups: dict[str, Setup]) -> None:
    rollouts = make_rollouts(Shape(sizes=(3, 1, 2)), models.VOCABULARY)
    with pytest.raises(RolloutsError, match="give no functionals"):
        forecast(setups["tiny"], rollouts, entropy_estimator="rao_blackwell")
