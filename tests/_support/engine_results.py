"""The same batch by both engines, and the comparison of what they say."""

from __future__ import annotations

import pytest
import torch
from probe_models.architectures import stepped_adamw
from probe_models.batches import make_rollouts
from probe_options import options_of
from torch import Tensor, nn

from entropy_fast import DeltaH1Result, OfflineEntropyProbe
from entropy_fast.columns import SequenceTable
from entropy_fast.step import AdamState

GROUPS = (2, 3, 2, 4)
# The norms of these families compute in fp32 whatever the model's dtype is; gemma2 is in fp32 throughout.
TOLERANCE = {
    "qwen2": 2e-6,
    "llama": 2e-6,
    "mistral": 2e-6,
    "gemma2": 1e-4,
    "qwen3": 2e-6,
    "gemma3": 2e-6,
    "phi3": 2e-6,
}


def results(
    model: nn.Module, seed: int = 5, optimizer: torch.optim.Optimizer | AdamState | None = None, **options: object
) -> dict[str, DeltaH1Result]:
    """By engine. Without an ``optimizer`` one is made, which steps and so changes the model."""
    rollouts = make_rollouts(GROUPS, seed=seed)
    optimizer = optimizer or stepped_adamw(model)
    config = dict(full_kernel=True, **{"prompts_per_microbatch": 2, **options})
    return {
        engine: OfflineEntropyProbe(model, optimizer, **options_of(engine=engine, **config)).compute_delta_h1(rollouts)
        for engine in ("two_pass", "one_pass")
    }


def distance(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None and expected is not None
    return float((found - expected).norm() / expected.norm())


def assert_same(found: DeltaH1Result, expected: DeltaH1Result, tolerance: float) -> None:
    assert distance(found.kernel, expected.kernel) < tolerance
    for name in ("diagonal", "row_sums", "column_sums"):
        assert distance(getattr(found, name), getattr(expected, name)) < tolerance, name
    size = float(expected.kernel.norm())
    assert abs(found.x_dot_y - expected.x_dot_y) < tolerance * size
    assert abs(found.delta_h1 - expected.delta_h1) < tolerance * size * found.learning_rate
    assert found.std_error == pytest.approx(expected.std_error, rel=100 * tolerance)
    assert found.diagnostics.coverage["entropy"].untouched == expected.diagnostics.coverage["entropy"].untouched
    assert found.diagnostics.excluded == expected.diagnostics.excluded
    for side in ("entropy", "update"):
        of_found, of_expected = (_of_sequences(result.sequences[side], side) for result in (found, expected))
        torch.testing.assert_close(of_found, of_expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def _of_sequences(table: SequenceTable, side: str) -> dict[str, Tensor]:
    """All that is known of sequences on one side: a table may hold the coefficients of the other too."""
    plain = {
        "S": table.sequence_logprobs,
        "entropies": table.entropy_sums,
        "coefficients": table.coefficients[side],
    }
    ratios = {} if table.ratios is None else dict(vars(table.ratios))
    if side == "entropy":
        ratios.pop("clipped", None)  # a clip range is the update's
    return plain | ratios
