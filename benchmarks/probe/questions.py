"""What each question costs beside the plainest call: both parts, other numbers, a loss, updates to compare.

    python -m benchmarks.probe.questions                  # two workloads, two threads; leave the machine alone
    python -m benchmarks.probe.questions --quick          # tiny sizes, to see that everything runs

All run in one process in turns; ratios are medians of ratios within a round. Each is first held against the two-pass engine,
asked the same of the first prompts. Memory is the growth of the resident set at its peak, in a process each. What is wrong gets
no speed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.kernels.machine import description
from benchmarks.kernels.memory import bytes_from, peak_of_process
from benchmarks.kernels.report import print_table
from benchmarks.kernels.timing import interleaved
from benchmarks.probe import report
from benchmarks.probe.setting import Setting, build
from benchmarks.probe.workloads import WORKLOADS, Workload, small_like
from entropy_fast import EstimateOptions, RunOptions, candidates, fast_delta_h1
from entropy_fast.errors import EntropyFastWarning
from entropy_fast.estimates.result import DeltaH1Result

PLAIN = "log-probs"
MEMORY_TARGET = 1.3
CHECKED = 3  # prompts, of which two responses
ALLOWED = 1e-3  # of row sums, relative to the largest, between the engines in fp32
HEADER = ["question", "ms", "x log-probs", "target", "memory", "x memory"]


@dataclasses.dataclass(frozen=True)
class Question:
    """One call by name.

    Attributes:
        name: of it.
        ask: arguments of `fast_delta_h1` for a setting.
        target: largest ratio of its time to that of the plainest call; None for none.
    """

    name: str
    ask: Callable[[Setting], dict[str, Any]]
    target: float | None = None


def _loss(setting: Setting, *, moved: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Clipped token ratios to a sampler that gave every token ``moved`` nats more."""
    rollouts = setting.update
    mask = rollouts.loss_mask.float()
    assert rollouts.advantages is not None
    advantages = rollouts.advantages.float()[:, None]

    def loss(s: Tensor, _: Tensor) -> Tensor:
        ratio = (s - s.detach() - moved * s.detach().cos()).exp()
        surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        return -(surrogate * mask).sum() / mask.sum()

    return loss


def _eight(setting: Setting) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"number {n}": torch.randn(setting.update.n_sequences, generator=generator) for n in range(8)}


SCORES = EstimateOptions(entropy_estimator="score_function", step="adam_static")
BOTH = EstimateOptions(step="adam_static")
QUESTIONS = (
    Question(PLAIN, lambda s: {"estimate": SCORES}),
    Question("direct part", lambda s: {"estimate": EstimateOptions(parts=("direct",), step="adam_static")}),
    Question("both parts", lambda s: {"estimate": BOTH}, 1.6),
    Question("both parts, the whole next step", lambda s: {"estimate": EstimateOptions(step="next")}),
    Question("log-probs, eight numbers", lambda s: {"estimate": SCORES, "functionals": _eight(s)}, 1.25),
    Question("log-probs, a loss", lambda s: {"estimate": SCORES, "update": _loss(s, moved=0.0)}, 1.35),
    Question("log-probs, a loss off policy", lambda s: {"estimate": SCORES, "update": _loss(s, moved=0.2)}),
    Question(
        "both parts, two updates more",
        lambda s: {
            "estimate": BOTH,
            "updates": {"bonus": candidates.entropy_bonus(0.01), "negatives": candidates.reweighted(positive=0.0)},
        },
    ),
)


def ask(setting: Setting, question: Question, engine: str = "one_pass", **run: Any) -> DeltaH1Result:
    """One call."""
    options = RunOptions(engine=engine, autocast_dtype=setting.autocast_dtype, **run)
    return fast_delta_h1(setting.model, setting.optimizer, setting.update, run=options, **question.ask(setting))


def complaint(setting: Setting, question: Question) -> str | None:
    """How a question's answer for the first prompts differs from the two-pass engine's; None where it does not."""
    rows = torch.cat([setting.update.rows_of_prompt(prompt)[:2] for prompt in range(CHECKED)])
    few = dataclasses.replace(setting, update=setting.update.select_rows(rows))
    found, expected = ask(few, question), ask(few, question, "two_pass")
    pairs = {"entropy": (found.row_sums, expected.row_sums)}
    for name, own in found.functionals.items():
        pairs[name] = own.by_unit, expected.functionals[name].by_unit
    for name, update in found.updates.items():
        pairs[name] = update.forecast.by_unit, expected.updates[name].forecast.by_unit
    if found.split is not None and expected.split is not None:
        pairs["direct part"] = found.split.direct.by_unit, expected.split.direct.by_unit
    for name, (ours, theirs) in pairs.items():
        off = float((ours - theirs).abs().max() / theirs.abs().max())
        if not off <= ALLOWED:
            return f"WRONG: {name} differs by {off:.2g}"
    return None


def measure(workload: Workload, rounds: int, *, memory: bool) -> dict[str, Any]:
    """Milliseconds, ratios and bytes of every question of one workload."""
    setting = build(workload)
    wrong = {q.name: said for q in QUESTIONS if (said := complaint(setting, q)) is not None}
    right = [q for q in QUESTIONS if q.name not in wrong]
    calls = {q.name: (lambda q=q: ask(setting, q)) for q in right}
    times = interleaved(calls, "cpu", rounds)
    peaks = {q.name: _peak(workload, q) for q in right} if memory else {}
    return {"workload": workload.label, "times": times, "peaks": peaks, "wrong": wrong}


def _peak(workload: Workload, question: Question) -> int:
    request = {"workload": dataclasses.asdict(workload), "question": question.name}
    return bytes_from("benchmarks.probe.questions", request, f"{question.name} of {workload.name}")


def rows_of(found: dict[str, Any]) -> list[list[str]]:
    """One row a question."""
    rows = []
    for question in QUESTIONS:
        name = question.name
        if name in found["wrong"]:
            rows.append([name, found["wrong"][name], "", "", "", ""])
            continue
        own, plain = found["times"][name], found["times"][PLAIN]
        ratio = statistics.median(a / b for a, b in zip(own, plain, strict=True))
        peak, of_plain = found["peaks"].get(name), found["peaks"].get(PLAIN)
        rows.append(
            [
                name,
                f"{1e3 * statistics.median(own):.0f}",
                f"{ratio:.2f}",
                "" if question.target is None else f"{question.target:g}",
                "" if peak is None else f"{peak / 2**20:.0f} MiB",
                "" if peak is None or not of_plain else f"{peak / of_plain:.2f}",
            ]
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; 1 when a result was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.probe.questions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workloads", default="short,long", help="some of the probe benchmark's, with commas between")
    parser.add_argument("--repeat", type=int, default=7, help="measured rounds")
    parser.add_argument("--threads", type=int, default=2, help="torch.set_num_threads")
    parser.add_argument("--no-memory", action="store_true", help="without the processes that measure memory")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results", help="folder for JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else 160)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EntropyFastWarning)
        for name in options.workloads.split(","):
            workload = next(w for w in WORKLOADS if w.name == name)
            workload = small_like(workload) if options.quick else workload
            memory = not (options.no_memory or options.quick)
            found.append(measure(workload, 1 if options.quick else options.repeat, memory=memory))
            print_table(console, found[-1]["workload"], HEADER, rows_of(found[-1]))
    written = report.write(
        options.out, "probe_questions.json", json.dumps({"machine": description("cpu"), "found": found}, indent=1)
    )
    console.print(f"Written: {written}", highlight=False, soft_wrap=True)
    return 1 if any(one["wrong"] for one in found) else 0


def _memory_of(request: dict[str, Any]) -> int:
    """Print the number of bytes; in a process of its own."""
    torch.set_num_threads(request["threads"])
    warnings.simplefilter("ignore", EntropyFastWarning)
    workload = Workload(**request["workload"])
    question = next(q for q in QUESTIONS if q.name == request["question"])
    # Libraries loaded and threads started at the first call are not memory of the call.
    ask(build(small_like(workload)), question)
    setting = build(workload)
    print(peak_of_process(lambda: ask(setting, question)))
    return 0


if __name__ == "__main__":
    asked = sys.argv[1] if len(sys.argv) == 2 else ""
    raise SystemExit(_memory_of(json.loads(asked)) if asked.startswith("{") else main())
