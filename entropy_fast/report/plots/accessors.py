"""``result.plot`` and ``ledger.plot``: every figure is a method that takes a user's axes, or makes a figure, and returns axes.

matplotlib is imported when a figure is drawn. Without ``ax`` the figure is nobody else's: no registry keeps it, a notebook
shows the axes that a cell ends with, and ``ax.figure.savefig(path)`` writes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from entropy_fast.estimates.held import EntropyPart
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.optional_packages import require_package
from entropy_fast.truth import EntropyLedger

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

    from entropy_fast.report.plots.tokens import TokenTexts

__all__ = ["LedgerPlots", "ResultPlots"]


class ResultPlots:
    """Figures of one result. ``part`` is ``"total"``, ``"direct"`` or ``"visitation"``; None is what the forecast is of.

    What the result does not hold is an error that names the option which asks for it.

    Args:
        result: what is drawn.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """

    def __init__(self, result: DeltaH1Result) -> None:
        require_package("matplotlib", "result.plot")
        self._result = result

    def __call__(self, figure: FigureBase | None = None) -> FigureBase:
        """Everything at a glance: parts, parts of the step, updates, prompts and layers, those that the result holds.

        Args:
            figure: an empty figure or subfigure; None makes one.
        """
        from entropy_fast.report.plots.overview import overview

        return overview(self._result, figure)

    def parts(self, ax: Axes | None = None) -> Axes:
        """The direct part, the visitation part and the total, with their 95 % intervals for this very update."""
        from entropy_fast.report.plots.intervals import draw_parts

        return draw_parts(self._result, ax)

    def step_parts(self, ax: Axes | None = None) -> Axes:
        """What momentum, weight decay, the fresh gradient and its effect on the optimizer's scale each do, with intervals.

        Raises:
            ResultError: the step was taken as one.
        """
        from entropy_fast.report.plots.intervals import draw_step_parts

        return draw_step_parts(self._result, ax)

    def updates(self, of: str = "entropy", ax: Axes | None = None) -> Axes:
        """What the planned update and the others do, with intervals.

        Args:
            of: "entropy", or the name of a functional.
            ax: where to.

        Raises:
            ConfigError: there is no such functional.
            ResultError: the result holds no other updates.
        """
        from entropy_fast.report.plots.intervals import draw_updates

        return draw_updates(self._result, of, ax)

    def prompts(
        self, part: EntropyPart | None = None, limit: int = 20, *, updates: bool = False, ax: Axes | None = None
    ) -> Axes:
        """Shares of the prompts that matter most, with the direct part of each.

        Args:
            part: what shares are of.
            limit: prompts at most.
            updates: with two batches, those of the update batch in place of those whose entropy changes.
            ax: where to.

        Raises:
            ConfigError: an argument has a value that cannot be used.
            ResultError: the result does not hold it.
        """
        from entropy_fast.report.plots.shares import draw_prompts

        return draw_prompts(self._result, part, limit, updates=updates, ax=ax)

    def layers(self, part: EntropyPart | None = None, ax: Axes | None = None) -> Axes:
        """Shares of decoder layers, embeddings and final norms, in model order; without ``part`` of both parts.

        Raises:
            ResultError: the result does not hold them.
        """
        from entropy_fast.report.plots.shares import draw_layers

        return draw_layers(self._result, part, ax)

    def kernel(self, part: EntropyPart | None = None, *, clustered: bool = True, ax: Axes | None = None) -> Axes:
        """Every pair's share as a heat map: rows change their entropy by the update of columns.

        Args:
            part: what shares are of.
            clustered: put prompts side by side that act alike; False keeps the batch's order.
            ax: where to.

        Raises:
            ResultError: the result does not hold the kernel.
        """
        from entropy_fast.report.plots.kernel import draw_kernel

        return draw_kernel(self._result, part, ax, clustered=clustered)

    def tokens(
        self,
        prompt: int,
        response: int,
        part: EntropyPart | None = None,
        *,
        tokenizer: TokenTexts | None = None,
        ax: Axes | None = None,
    ) -> Axes:
        """Shares of one response's tokens, in their order.

        Args:
            prompt: its number, from 0 in batch order.
            response: number of its response with tokens, from 0 in the order of the rollouts' rows.
            part: what shares are of.
            tokenizer: what gives the texts of tokens; None shows their ids.
            ax: where to.

        Raises:
            ConfigError: there is no such prompt or response.
            ResultError: the result does not hold shares of tokens.
        """
        from entropy_fast.report.plots.tokens import draw_tokens

        return draw_tokens(self._result, prompt, response, part, tokenizer, ax)


class LedgerPlots:
    """Figures of a ledger; ``part`` is ``"total"``, ``"direct"`` or ``"visitation"``.

    Args:
        ledger: what is drawn.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """

    def __init__(self, ledger: EntropyLedger) -> None:
        require_package("matplotlib", "ledger.plot")
        self._ledger = ledger

    def __call__(self, part: str = "total", window: int | None = 50, figure: FigureBase | None = None) -> FigureBase:
        """`steps` and `calibration` side by side, on ``figure`` or a new one."""
        from entropy_fast.report.plots.ledger import ledger_page

        return ledger_page(self._ledger, part, window, figure)

    def steps(self, part: str = "total", ax: Axes | None = None) -> Axes:
        """Forecasts with their 95 % intervals, and realised changes, over the steps.

        Raises:
            LedgerError: the ledger has no entry of the part.
        """
        from entropy_fast.report.plots.ledger import draw_steps

        return draw_steps(self._ledger, part, ax)

    def calibration(self, part: str = "total", window: int | None = 50, ax: Axes | None = None) -> Axes:
        """Realised changes against forecasts, with the calibration line and its 95 % band.

        Args:
            part: of the change.
            window: how many of the last pairs, as in `EntropyLedger.calibration`; None for all.
            ax: where to.

        Raises:
            LedgerError: the ledger has no entry of the part, or the window is not a positive integer.
        """
        from entropy_fast.report.plots.ledger import draw_calibration

        return draw_calibration(self._ledger, part, window, ax)
