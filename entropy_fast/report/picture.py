"""Per-prompt contributions as a bar chart (PNG)."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING

from entropy_fast.atomic import atomic_path
from entropy_fast.errors import ConfigError, EntropyFastError, ResultError
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.report.terminal import prompt_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    """Draw the shares of the prompts that matter most, and the total with its 95 % interval.

    Raises:
        ConfigError: matplotlib is not installed.
        ResultError: matplotlib cannot draw it.
    """
    require_matplotlib()
    try:
        with atomic_path(path) as temporary:
            _figure(result).savefig(temporary, dpi=120, format="png")
    except EntropyFastError:
        raise
    except Exception as error:  # fonts, caches, backends: the result is there all the same
        raise ResultError(
            f"{path.name} cannot be drawn: {type(error).__name__}: {error}",
            fix="repair matplotlib, or pass --no-picture.",
        ) from error
    return path


def _figure(result: DeltaH1Result) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ranked = sorted(result.per_prompt, key=lambda p: -abs(p.delta_h1))[:BARS]
    # The same as δH₁, but where its direct part alone was asked for.
    forecast, what = result.forecast, "δH₁" if not math.isnan(result.delta_h1) else "direct part of δH₁"
    labels = [prompt_label(p, 60) for p in ranked] + [f"{what}, all prompts"]
    values = [p.delta_h1 for p in ranked] + [forecast.value]
    colours = ["#b2182b" if v < 0 else "#2166ac" for v in values]
    figure = Figure(figsize=(10, 1.4 + 0.36 * len(values)), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    axes.barh(range(len(values)), values, color=colours)
    known = not math.isnan(forecast.std_error)
    if known:
        lower, upper = forecast.interval(0.95)
        half = (upper - lower) / 2
        axes.errorbar(forecast.value, len(values) - 1, xerr=half, fmt="none", ecolor="black", capsize=4)
    # Prompt texts are data: a dollar sign in them is not mathematics.
    axes.set_yticks(range(len(values)), labels, parse_math=False, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    about = "with its 95 % interval" if known else "no standard error"
    axes.set_xlabel(f"share of {what}, {result.unit} (bar at the bottom: the total, {about})")
    sign = {True: "", False: " (sign not established)", None: ""}[result.sign_established]
    axes.set_title(
        f"Which prompts change the entropy{sign}\n{shown_of(len(ranked), len(result.per_prompt))}", fontsize=10
    )
    return figure


def shown_of(shown: int, count: int) -> str:
    """How many of the prompts are drawn."""
    return f"all {count} prompts" if shown == count else f"the {shown} of {count} prompts with the largest shares"
