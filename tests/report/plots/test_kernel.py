"""The heat map's cells are the pairs' shares, prompts that act alike are neighbours, and the diagonal is not there."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from shown_results import bare, full, two_batches

from entropy_fast.errors import ResultError
from entropy_fast.estimates.held import kernel_shares

pytestmark = pytest.mark.filterwarnings("ignore:.*without response tokens were left out")


def cells(ax):
    [image] = ax.images
    return image, image.get_array()


@pytest.mark.parametrize("part", [None, "direct"])
@pytest.mark.parametrize("clustered", [True, False])
def test_cells_are_shares(part, clustered):
    result = full()
    ax = result.plot.kernel(part, clustered=clustered)
    image, drawn = cells(ax)
    order = [int(label.get_text()) for label in ax.get_xticklabels()]
    assert sorted(order) == list(range(5)) and (clustered or order == list(range(5)))
    assert np.array_equal(drawn.mask, np.eye(5, dtype=bool))
    expected = kernel_shares(result, part).numpy()[np.ix_(order, order)]
    assert np.array_equal(drawn.filled(0), np.nan_to_num(expected))
    assert image.norm.vmin == -image.norm.vmax
    bar = image.colorbar.ax.get_ylabel()
    assert result.unit in bar and "this batch's gradient" in bar and (part is None or part in bar)
    assert all(label.get_text().endswith(f"  {n}") for label, n in zip(ax.get_yticklabels(), order, strict=True))


def test_one_cell_does_not_wash_out_the_others():
    result = full()
    kernel = torch.randn(30, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kernel[3, 4] = 1e4
    units = result.per_prompt * 6
    large = dataclasses.replace(
        result, kernel=kernel, per_prompt=units, forecast=dataclasses.replace(result.forecast, kernel=kernel)
    )
    image, drawn = cells(large.plot.kernel())
    assert image.norm.vmax < drawn.max() / 1000
    assert image.colorbar.extend == "both"
    wide = dataclasses.replace(large, per_prompt=result.per_prompt * 12)
    kernel = torch.zeros(60, 60, dtype=torch.float64)
    wide = dataclasses.replace(wide, kernel=kernel, forecast=dataclasses.replace(result.forecast, kernel=kernel))
    ax = wide.plot.kernel()
    ax.figure.canvas.draw()
    assert not any("script" in label.get_text() for label in ax.get_yticklabels())


def test_what_is_no_kernel_is_an_error():
    for result, option in ((bare(), "full_kernel=True"), (two_batches(), "entropy_rollouts")):
        with pytest.raises(ResultError, match="does not hold the influence kernel") as caught:
            result.plot.kernel()
        assert option in caught.value.fix
    result = full()
    broken = torch.full_like(result.kernel, torch.inf)
    forecast = dataclasses.replace(result.forecast, kernel=broken)
    with pytest.raises(ResultError, match="not finite"):
        dataclasses.replace(result, kernel=broken, forecast=forecast).plot.kernel()
