"""precondition_accumulate over the LoRA factors of a whole model, limited by memory bandwidth."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.kernels import rivals
from benchmarks.kernels.problem import BACKENDS, Contender, Problem, Results
from benchmarks.kernels.specs import Spec
from entropy_fast import reference
from entropy_fast.ops import precondition_accumulate

CORRECTION, EPS = 1 / (1 - 0.999**4), 1e-8
# Of each element: scale x; y from v in four (times correction, root, plus ε, division) and two factors; three products, each
# added up; two sums.
OPERATIONS = 15


def moved_bytes(spec: Spec) -> int:
    """x, g, v and both sums in, both sums out: 28 bytes per element in float32; and the dots."""
    gradient = spec.torch_dtype.itemsize
    wide = max(4, gradient)
    return spec.elements() * (2 * gradient + 5 * wide) + 24 * len(spec.factor_shapes())


def problem(spec: Spec, device: str, compiles: bool) -> Problem:
    """Gradients and moments of a fourth step of Adam; v is positive throughout."""
    generator = torch.Generator().manual_seed(0)
    dtype = spec.torch_dtype
    wide = torch.promote_types(dtype, torch.float32)
    shapes = spec.factor_shapes()

    def random(scale: float) -> list[Tensor]:
        return [torch.randn(shape, generator=generator) * scale for shape in shapes]

    x, g = ([t.to(device, dtype) for t in random(1e-3)] for _ in range(2))
    v = [t.square().add_(1e-10).to(device, wide) for t in random(1e-3)]
    starts = [t.to(device, wide) for t in random(1e-3)], [t.to(device, wide) for t in random(1.0)]
    sums = tuple([t.clone() for t in start] for start in starts)
    correction, eps = [CORRECTION] * len(shapes), [EPS] * len(shapes)

    def reset() -> None:
        for whole, start in zip(sums, starts, strict=True):
            torch._foreach_copy_(whole, start)

    def expected() -> Results:
        found: dict[str, list[Tensor]] = {"dots": [], "X_sum": [], "Y_sum": []}
        for parts in zip(x, g, v, *starts, strict=True):
            # .to(float64) copies, so the sums here are not those of the contenders.
            *inputs, x_sum, y_sum = ([t.to(torch.float64, copy=True)] for t in parts)
            dots = reference.precondition_accumulate(
                *inputs, x_sum, y_sum, bias_correction=[CORRECTION], eps=[EPS], ratio=[1.0]
            )
            for name, value in zip(found, (dots[0], x_sum[0], y_sum[0]), strict=True):
                found[name].append(value)
        return {"dots": torch.stack(found["dots"]), "X_sum": found["X_sum"], "Y_sum": found["Y_sum"]}

    def results(dots: Tensor) -> Results:
        return {"dots": dots, "X_sum": sums[0], "Y_sum": sums[1]}

    def run_backend(name: str) -> Results:
        return results(precondition_accumulate(x, g, v, *sums, bias_correction=correction, eps=eps, backend=name))

    # One-dimensional, so that a compiled function sees few different shapes.
    flat = [[t.flatten() for t in part] for part in (x, g, v, *sums)]

    def one_by_one(function: object) -> Results:
        return results(torch.stack([function(*parts, CORRECTION, EPS) for parts in zip(*flat, strict=True)]))

    contenders = [Contender(name, "backend", lambda name=name: run_backend(name)) for name in BACKENDS[device]]
    contenders += [
        Contender("eager", "rival", lambda: one_by_one(rivals.fold), rivals.fold.__doc__),
        Contender("eager, sums", "rival", lambda: one_by_one(rivals.fold_by_sums), rivals.fold_by_sums.__doc__),
        Contender(
            "foreach",
            "rival",
            lambda: results(rivals.fold_foreach(*flat, CORRECTION, EPS)),
            rivals.fold_foreach.__doc__,
        ),
    ]
    if compiles:
        function = rivals.compiled(rivals.fold)
        contenders.append(
            Contender("compiled", "rival", lambda: one_by_one(function), "torch.compile of eager, per tensor")
        )
    return Problem(contenders, expected, reset, moved_bytes(spec), spec.elements() * OPERATIONS, "copy")
