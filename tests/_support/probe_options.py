"""Options of both kinds in one call, for tests that mix them."""

from __future__ import annotations

import dataclasses
from typing import Any

from entropy_fast import EstimateOptions, RunOptions

_ESTIMATE = {field.name for field in dataclasses.fields(EstimateOptions)}


def options_of(**given: Any) -> dict[str, Any]:
    """``estimate`` and ``run`` as `fast_delta_h1` and `OfflineEntropyProbe` take them.

    From log-probs unless another estimator is named: its columns are two, and its sums those that loops over ∇S_i give. With
    token entropies the baseline is one that a prompt has by itself, unless another is named. The step is Adam's static one.
    """
    given = {"entropy_estimator": "score_function", "baseline": "responses", "step": "adam_static", **given}
    return {
        "estimate": EstimateOptions(**{name: value for name, value in given.items() if name in _ESTIMATE}),
        "run": RunOptions(**{name: value for name, value in given.items() if name not in _ESTIMATE}),
    }
