"""The roofline picture: what this machine can do at most, and where each op is."""

from __future__ import annotations

from pathlib import Path

from benchmarks.kernels.copy_limit import COPY
from benchmarks.kernels.linear_problem import GEMMS
from benchmarks.kernels.measure import Measured
from benchmarks.kernels.specs import FOLD, LINEAR, TOKEN
from benchmarks.kernels.timing import Spread

_MARKERS = {TOKEN: "o", LINEAR: "s", FOLD: "^"}


def roofs(measured: list[Measured]) -> tuple[float, dict[str, float]]:
    """Bytes per second of the copy (its median over all specs), and operations per second of each dtype's best GEMMs."""
    copies = [m.bandwidth(COPY) for m in measured if COPY in m.times]
    gemms: dict[str, float] = {}
    for m in measured:
        if GEMMS in m.times:
            gemms[m.spec.dtype] = max(gemms.get(m.spec.dtype, 0.0), m.rate(GEMMS) or 0.0)
    return Spread.of(copies).median if copies else 0.0, gemms


def draw(measured: list[Measured], path: Path) -> list[Path]:
    """The picture as a PNG file; nothing without matplotlib, or without anything to draw."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        return []
    bandwidth, gemms = roofs(measured)
    if not bandwidth:
        return []
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    points = [
        (m, name, m.operations / m.moved_bytes, m.rate(name) or 0.0)
        for m in measured
        for name in m.backends()
        if name in m.times
    ]
    left, right = 0.05, 4 * max([10.0, *(point[2] for point in points)])
    top = max(gemms.values(), default=100 * bandwidth)
    axes.plot([left, top / bandwidth], [left * bandwidth / 1e9, top / 1e9], "k-", lw=1)
    axes.annotate(f"copy {bandwidth / 1e9:.1f} GB/s", (left * 1.1, left * 2.2 * bandwidth / 1e9), fontsize=8)
    for dtype, rate in gemms.items():
        axes.plot([rate / bandwidth, right], [rate / 1e9] * 2, "k--", lw=1)
        axes.annotate(f"GEMM {dtype} {rate / 1e9:.0f} GFLOP/s", (rate / bandwidth, rate * 1.08 / 1e9), fontsize=8)
    colors = colormaps["tab20"].colors
    for number, (m, name, intensity, rate) in enumerate(points):
        label = f"{m.spec.op}, {m.spec.dtype}, {m.spec.shape} ({name})"
        axes.plot(
            [intensity], [rate / 1e9], _MARKERS[m.spec.op], ls="", label=label, color=colors[number % len(colors)]
        )
    axes.set_xlabel("operations per byte that has to be moved")
    axes.set_ylabel("10⁹ operations per second")
    if points:
        axes.legend(fontsize=6, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return [path]
