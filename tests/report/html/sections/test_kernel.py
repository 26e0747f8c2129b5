"""The kernel on the page adds up to the forecast, and prompts that act alike stand together."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from saved_results import made_result
from small_policy import saved_run

from entropy_fast import EstimateOptions, RunOptions, fast_delta_h1, read_rollouts
from entropy_fast.report.html.sections import kernel as section
from entropy_fast.report.html.sections.kernel import kernel_section
from entropy_fast.run_folder.adapter import attach_adapter
from entropy_fast.run_folder.model_source import ModelSource, load_model


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    folder = saved_run(tmp_path_factory.mktemp("run"))
    model = attach_adapter(load_model(ModelSource(str(folder / "base"))), folder / "adapter")
    rollouts = read_rollouts(folder / "rollouts.jsonl")

    def run(**estimate):
        options = EstimateOptions(**estimate)
        return fast_delta_h1(
            model, folder / "optimizer.pt", rollouts, estimate=options, run=RunOptions(full_kernel=True)
        )

    return run


@pytest.mark.parametrize(
    "estimate",
    [{"step": "adam_static"}, {"step": "next", "max_grad_norm": 1e-3}, {"step": "adam_static", "blocks": 3}],
    ids=lambda estimate: " ".join(map(str, estimate.values())),
)
def test_the_cells_add_up_to_what_the_fresh_gradient_does(probed, monkeypatch, estimate):
    result = probed(**estimate)
    seen = []
    monkeypatch.setattr(section, "heat_map", lambda values, *a, **k: (seen.append(values), heat(values, *a, **k))[1])
    found = kernel_section(result)
    [values] = seen
    expected = result.step_parts["fresh"].forecast if result.step_parts else result.forecast
    assert np.nansum(values) == pytest.approx(expected.value, rel=1e-5, abs=1e-9)
    assert np.isnan(np.diagonal(values)).all()
    assert found.shown == found.of == len(result.per_prompt)


heat = section.heat_map


def test_ranks_are_those_of_the_table(monkeypatch):
    result = made_result(6)
    found = kernel_section(result)
    by_share = sorted(range(6), key=lambda n: -abs(result.per_prompt[n].delta_h1))
    kernel = result.kernel.clone().fill_diagonal_(0)
    entropy, update = divmod(int(kernel.abs().argmax()), 6)
    assert (found.pairs[0].entropy, found.pairs[0].update) == (by_share.index(entropy) + 1, by_share.index(update) + 1)
    labels = [label.text for label in found.figure.row_labels]
    assert sorted(labels) == [f"#{n}" for n in range(1, 7)]
    assert labels == [label.text for label in found.figure.column_labels]
    where = f"entropy of #{found.pairs[0].entropy}, update of #{found.pairs[0].update}:"
    [cell] = [cell for cell in found.figure.cells if cell.text.startswith(where)]
    assert cell.text.endswith(found.pairs[0].value)


def test_the_prompts_with_the_largest_effects_are_drawn(monkeypatch):
    monkeypatch.setattr(section, "MOST", 3)
    kernel = torch.zeros(6, 6, dtype=torch.float64)
    kernel[1, 4], kernel[4, 2], kernel[0, 0] = 5.0, 3.0, 100.0  # what a prompt does to itself does not count
    found = kernel_section(made_result(6, kernel=kernel))
    assert (found.shown, found.of, len(found.pairs)) == (3, 6, 2)


def test_without_a_kernel_there_is_no_section():
    assert kernel_section(made_result(kernel=None)) is None


def test_one_batch_alone_has_it():
    assert kernel_section(dataclasses.replace(made_result(), diagonal=None)) is None
