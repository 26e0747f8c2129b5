"""Per-prompt contributions as a bar chart (PNG)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from entropy_fast.atomic import atomic_path
from entropy_fast.errors import ConfigError
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.report.terminal import prompt_label

__all__ = ["require_matplotlib", "write_picture"]

BARS = 30


def require_matplotlib(*, quiet: bool = False) -> str | None:
    """Look for matplotlib before the work; None when it is there, and with ``quiet`` a sentence when it is not.

    Raises:
        ConfigError: it is not there, and not ``quiet``.
    """
    if importlib.util.find_spec("matplotlib") is not None:
        return None
    problem, fix = "matplotlib is not installed.", "pip install matplotlib, or pass --no-picture."
    if quiet:
        return f"{problem} {fix}"
    raise ConfigError(f"drawing the picture: {problem}", fix=fix)


def write_picture(result: DeltaH1Result, path: Path) -> Path:
    """Draw the shares of the prompts that matter most, and the total with its interval.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ranked = sorted(result.per_prompt, key=lambda p: -abs(p.delta_h1))[:BARS]
    labels = [prompt_label(p, 60) for p in ranked] + ["δH₁, all prompts"]
    values = [p.delta_h1 for p in ranked] + [result.delta_h1]
    colours = ["#b2182b" if v < 0 else "#2166ac" for v in values]
    figure = Figure(figsize=(10, 1.2 + 0.36 * len(values)), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    axes.barh(range(len(values)), values, color=colours)
    if result.std_error is not None:
        axes.errorbar(
            result.delta_h1, len(values) - 1, xerr=2 * result.std_error, fmt="none", ecolor="black", capsize=4
        )
    # Prompt texts are data: a dollar sign in them is not mathematics.
    axes.set_yticks(range(len(values)), labels, parse_math=False, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel(f"share of δH₁, {result.unit} (bar at the bottom: total ± 2 standard errors)")
    sign = {True: "", False: " (sign not established)", None: " (no standard error)"}[result.sign_established]
    axes.set_title(f"Which prompts change the entropy{sign}")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    return path
