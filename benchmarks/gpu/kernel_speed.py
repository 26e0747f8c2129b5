"""Every kernel against float64, then its time beside rivals and limits. What is wrong gets no speed."""

from __future__ import annotations

import gc
import warnings

import torch

from benchmarks.gpu.process import run_as_stage
from benchmarks.gpu.rows import RowWriter, Value
from benchmarks.gpu.stages import Options
from benchmarks.kernels import specs
from benchmarks.kernels.copy_limit import BYTES, QUICK_BYTES, Copy
from benchmarks.kernels.measure import Measured, measure
from benchmarks.kernels.problem import BACKENDS
from benchmarks.kernels.problems import build
from benchmarks.kernels.specs import FOLD, LINEAR, TOKEN, Spec
from benchmarks.kernels.targets import outcomes
from benchmarks.kernels.timing import Spread

ROUNDS, FEW_ROUNDS = 9, 3
DTYPES = ("float32", "bfloat16", "float16", "float64")

# Odd sizes, so that no block is full; in every dtype that an op takes.
CHECKED = (
    *(Spec(TOKEN, dtype, 333, 50257, entropy=True, timed=False) for dtype in DTYPES),
    *(Spec(LINEAR, dtype, 333, 50257, 576, entropy=True, timed=False) for dtype in DTYPES),
    *(
        Spec(FOLD, dtype, hidden=1000, layers=2, key_value=250, intermediate=3001, timed=False)
        for dtype in ("float32", "bfloat16")
    ),
)


def chosen_specs(options: Options) -> tuple[Spec, ...]:
    if options.size == "micro":
        return specs.QUICK_SPECS
    if options.device == "cpu":
        return (*CHECKED, *specs.TARGET_SPECS)
    return (*CHECKED, *specs.CUDA_TARGET_SPECS, *specs.CUDA_MORE_SPECS)


def title(spec: Spec) -> str:
    return spec.label if spec.timed else f"{spec.label}, check alone"


def _numbers(measured: Measured, name: str) -> dict[str, Value]:
    """Of a contender that is right."""
    values: dict[str, Value] = {"kind": measured.kinds[name]}
    if name not in measured.times:
        return values
    spread = Spread.of(measured.times[name])
    values |= {"ms": 1e3 * spread.median, "quartiles": f"{1e3 * spread.low:.4g} to {1e3 * spread.high:.4g}"}
    for backend in measured.backends():
        ratio = measured.ratio(name, backend)
        values[f"time / {backend}"] = None if ratio is None else ratio.median
    values["GB/s"] = measured.bandwidth(name) / 1e9 if measured.kinds[name] == "backend" else None
    for column, share in (("% of limit", measured.of_limit(name)), ("% of copy", measured.of_copy(name))):
        values[column] = None if share is None or measured.kinds[name] == "rival" else 100 * share
    return values


def write_rows(rows: RowWriter, measured: Measured, device: str) -> None:
    """A row for every contender that was tried. A rival that is wrong is no fault of the package."""
    label = title(measured.spec)
    for name in measured.kinds:
        rows.write(f"{label}: {name}", "ok", values=_numbers(measured, name))
    for name, complaint in measured.wrong.items():
        if name in BACKENDS[device]:
            rows.write(f"{label}: {name}", "wrong", complaint)
        else:
            rows.write(f"{label}: {name}", "skipped", f"a rival whose results are wrong or missing: {complaint}")
    for name, reason in measured.missing.items():
        rows.write(f"{label}: {name}", "skipped", reason)


def _write_targets(rows: RowWriter, measured: list[Measured], device: str) -> None:
    for outcome in outcomes(measured, device):
        target = outcome.target
        name = f"target: {target.spec.label}, {outcome.backend}, {target.text}"
        bound = f"{'at least' if target.at_least else 'at most'} {target.bound:g} {target.unit}"
        if outcome.measured is None:
            rows.write(name, "skipped", f"not measured {outcome.detail}".strip(), {"target": bound})
        else:
            values = {"target": bound, "measured": outcome.measured, "verdict": outcome.verdict}
            rows.write(name, "ok", values=values)


def run(options: Options, rows: RowWriter) -> int:
    """Spec by spec; then the targets of those that were measured."""
    full = options.size == "full"
    device, chosen = options.device, chosen_specs(options)
    compiling = full and device == "cuda"
    if compiling:
        # Compiling one function for several shapes is what is wanted here.
        torch._dynamo.config.recompile_limit = 64
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    rows.plan([title(spec) for spec in chosen])
    copy = Copy(device, BYTES if full else QUICK_BYTES)
    measured = []
    for spec in chosen:
        with rows.row(title(spec)) as row:
            # Compiling for every shape of the factors would take most of the time there is.
            compiles = compiling and spec.timed and spec.op != FOLD
            found = measure(build(spec, device, compiles), spec, device, ROUNDS if full else FEW_ROUNDS, copy)
            write_rows(rows, found, device)
            measured.append(found)
            row.values["right"] = ", ".join(name for name, kind in found.kinds.items() if kind != "limit")
            if wrong := [name for name in BACKENDS[device] if name in found.wrong]:
                row.set("wrong", "; ".join(f"{name}: {found.wrong[name]}" for name in wrong))
            elif not found.backends():
                row.set("skipped", "no backend of the package runs here")
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    if full:
        _write_targets(rows, [m for m in measured if m.spec.timed], device)
    return 0


if __name__ == "__main__":
    run_as_stage(run)
