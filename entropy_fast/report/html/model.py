"""What a report shows: typed data in the order of the page, without any markup."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from entropy_fast._version import __version__
from entropy_fast.report.html.intervals import IntervalFigure
from entropy_fast.report.html.sections.calibration import (
    CalibrationSection,
    StepRow,
    calibration_section,
    step_rows,
)
from entropy_fast.report.html.sections.kernel import KernelSection, kernel_section
from entropy_fast.report.html.sections.layers import LayersSection, layers_section
from entropy_fast.report.html.sections.logprobs import LogprobsSection, logprobs_section
from entropy_fast.report.html.sections.method import MethodSection, method_section
from entropy_fast.report.html.sections.parts import (
    CandidateSection,
    PartsSection,
    candidate_section,
    functional_rows,
    parts_section,
    step_section,
)
from entropy_fast.report.html.sections.prompts import PromptsSection, prompts_section
from entropy_fast.report.html.sections.responses import ResponsesSection, responses_section
from entropy_fast.report.html.sections.validation import ValidationView, validation_views
from entropy_fast.report.html.sections.verdict import VerdictSection, verdict_section
from entropy_fast.report.text import printable
from entropy_fast.run_folder.result_reading import SavedResult
from entropy_fast.run_folder.run_reading import SavedRun

__all__ = ["Page", "ResultView", "RunView", "page_of"]

ROOM = 3_000_000  # bytes that the responses of all runs may take together
NAME = 300


@dataclasses.dataclass(frozen=True)
class ResultView:
    """One result, section by section; None for sections that there is nothing for."""

    verdict: VerdictSection
    parts: PartsSection
    step: tuple[tuple[str, IntervalFigure], ...]
    candidates: CandidateSection | None
    functionals: tuple[tuple[str, str, str, str], ...]
    prompts: PromptsSection
    responses: ResponsesSection | None
    kernel: KernelSection | None
    why_no_kernel: str
    layers: LayersSection | None
    logprobs: LogprobsSection | None
    method: MethodSection


@dataclasses.dataclass(frozen=True)
class RunView:
    """One run.

    Attributes:
        anchor: what its parts' ids on the page begin with.
        name: its path.
        result: of its probe; None where there is none.
        ledgers: forecasts against what became of them.
        steps: kept training steps.
        validations: what steps really did.
        contents: anchors and titles of its sections, in order.
    """

    anchor: str
    name: str
    result: ResultView | None
    ledgers: tuple[CalibrationSection, ...]
    steps: tuple[StepRow, ...]
    validations: tuple[ValidationView, ...]
    contents: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Page:
    """The whole report.

    Attributes:
        title: of the page.
        runs: in the order in which they were given.
        version: of the package that made it.
    """

    title: str
    runs: tuple[RunView, ...]
    version: str


def page_of(runs: Sequence[SavedRun]) -> Page:
    """Of at least one run."""
    with_results = sum(run.result is not None for run in runs)
    room = ROOM // max(1, with_results)
    views = tuple(_run(n, run, room) for n, run in enumerate(runs, start=1))
    name = views[0].name if len(views) == 1 else f"{len(views)} runs"
    return Page(f"Entropy forecast: {name}", views, __version__)


def _run(number: int, run: SavedRun, room: int) -> RunView:
    anchor = f"run-{number}"
    result = None if run.result is None else _result(run.result, room)
    ledgers = tuple(calibration_section(ledger) for ledger in run.ledgers)
    others = [kept for kept in run.steps if result is None or kept.folder != run.path]  # a probed step has its result
    steps = step_rows(others, run.path)
    validations = validation_views(run.validations)
    contents = [
        (f"{anchor}-{key}", title) for key, title in _contents(result, bool(ledgers), bool(steps), bool(validations))
    ]
    return RunView(anchor, printable(str(run.path), NAME), result, ledgers, steps, validations, tuple(contents))


def _result(saved: SavedResult, room: int) -> ResultView:
    result = saved.result
    return ResultView(
        verdict_section(result, saved.provenance),
        parts_section(result),
        step_section(result),
        candidate_section(result),
        functional_rows(result),
        prompts_section(result, saved.responses),
        responses_section(result, saved.responses, room),
        kernel_section(result),
        _why_no_kernel(saved),
        layers_section(result),
        logprobs_section(result),
        method_section(saved),
    )


def _why_no_kernel(saved: SavedResult) -> str:
    result = saved.result
    if result.kernel is not None:
        return ""
    if result.estimate == "two_batch":
        return "Two batches have no table of prompts against themselves."
    if result.estimate_options.gradient == "live":
        return "The update is the gradient that stood in .grad, which is not taken apart into prompts."
    return "It was not kept: every prompt's gradients did not fit memory_budget, or the engine does not keep them."


def _contents(result: ResultView | None, ledgers: bool, steps: bool, validations: bool) -> list[tuple[str, str]]:
    found = []
    if result is not None:
        found += [("parts", "Direct and visitation")]
        found += [("step", "What the step consists of")] if result.step else []
        found += [("candidates", "Updates compared")] if result.candidates else []
        found += [("functionals", "What else changes")] if result.functionals else []
    found += [("validation", "What the step really did")] if validations else []
    found += [("calibration", "Forecast and realised")] if ledgers else []
    found += [("steps", "Steps kept")] if steps else []
    if result is not None:
        found += [("prompts", "Prompts"), ("responses", "Responses"), ("kernel", "Prompt against prompt")]
        found += [("layers", "Layers and modules")] if result.layers else []
        found += [("logprobs", "Log-probs that are off")] if result.logprobs else []
        found += [("method", "How it was computed")]
    return found
