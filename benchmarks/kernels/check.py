"""Is a result right? Nothing that is not gets a speed."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.kernels.problem import Contender, Results
from benchmarks.kernels.specs import FOLD, LINEAR, Spec

# Largest difference, relative to the largest expected value. token_logprobs and precondition_accumulate compute in float32
# whatever the inputs are stored in; the output layer's products are rounded to the dtype of the hidden states.
TOLERANCES = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 1e-5, "float16": 1e-5}
LINEAR_TOLERANCES = {"float64": 1e-9, "float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3}


def tolerance(spec: Spec) -> float:
    if spec.op == FOLD:
        return 1e-5
    return (LINEAR_TOLERANCES if spec.op == LINEAR else TOLERANCES)[spec.dtype]


def _difference(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    off = (found.double() - expected).abs().max() / expected.abs().max()
    return float("inf") if off.isnan() else float(off)


def difference(found: Tensor | list[Tensor], expected: Tensor | list[Tensor]) -> float:
    """Largest difference relative to the largest expected value; of lists, that of the worst tensor."""
    if isinstance(expected, list):
        return max(_difference(a, b) for a, b in zip(found, expected, strict=True))
    return _difference(found, expected)


def complaint(contender: Contender, spec: Spec, expected: Results) -> str:
    """What is wrong with one call's results; empty when nothing is. A backend owes every result, a rival some."""
    with torch.no_grad():
        found = contender.run()
    if contender.kind == "backend" and (absent := set(expected) - set(found)):
        return f"no {', '.join(sorted(absent))}"
    allowed = tolerance(spec)
    for name in found:
        off = difference(found[name], expected[name])
        if not off <= allowed:
            return f"{name} is off by {off:.1e} of its largest value (allowed: {allowed:.0e})"
    return ""
