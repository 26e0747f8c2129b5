"""The picture of growth: time against size, both relative to the smallest."""

from __future__ import annotations

from pathlib import Path

from benchmarks.probe.growth import Growth


def draw(grown: list[Growth], path: Path) -> list[Path]:
    """The picture as a PNG file; nothing without matplotlib, or without anything to draw."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    if not grown:
        return []
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    for growth, marker in zip(grown, "osd^v<>"):  # noqa: B905  # there are more markers than axes
        sizes = [size / growth.axis.sizes[0] for size in growth.axis.sizes]
        times = [t / growth.seconds[0] for t in growth.seconds]
        label = f"{growth.axis.label} {growth.axis.sizes[0]} to {growth.axis.sizes[-1]}: exponent {growth.exponent:.2f}"
        axes.plot(sizes, times, marker=marker, label=label)
    longest = max(growth.axis.sizes[-1] / growth.axis.sizes[0] for growth in grown)
    axes.plot([1, longest], [1, longest], "k--", lw=1, label="proportional")
    axes.set_xlabel("size, relative to the smallest")
    axes.set_ylabel("time of one_pass, relative to the smallest size's")
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return [path]
