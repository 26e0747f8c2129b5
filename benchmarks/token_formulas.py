"""Forecasts of the entropy change beside the token-local formulas of the field, against what real AdamW steps do.

    python -m benchmarks.token_formulas            # three checkpoints of a small policy, 54 real steps; some minutes
    python -m benchmarks.token_formulas --quick    # a few steps, to see that everything runs

A small transformer is trained by GRPO (`examples.train_policy`); from each checkpoint it goes on for some steps. Before each,
what every formula says is noted; the step is taken on the model, looked at and put back (`measure_delta_h`); then it is really
taken.

Legend: token y with probability p = π(y), log p = s, entropy H of its distribution, A advantage, w weight in the loss; sums are
over all response tokens, and signs are those of the entropy's change. Scales differ from formula to formula and do not matter.

    covariance      -Σ w (s - mean s)(A - mean A)              batch covariance, as Clip-Cov takes it
    π(1-π)(ln π+H)  -Σ w A p (1 - p)(s + H)                    as STEER weighs tokens
    π(ln π+H)       -Σ w A p (s + H)
    own softmax     -Σ w A [p (s + H) - Σ_k p_k² (ln p_k + H)] exact where every prefix has logits of its own: what is called
                                                               entropy polarity when its sign alone is taken
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.kernels.machine import description
from benchmarks.kernels.report import print_table
from benchmarks.probe import report
from entropy_fast import EstimateOptions, Rollouts, RunOptions, fast_delta_h1
from entropy_fast.errors import EntropyFastWarning
from entropy_fast.truth import measure_delta_h
from entropy_fast.ways.teacher_forcing import pad_rows
from examples.train_policy import SMALL, Settings, policy_at, sampled, take_step, train

FORMULAS = ("covariance", "π(1-π)(ln π+H)", "π(ln π+H)", "own softmax", "own softmax, signs")
OURS = ("direct, next", "direct, adam_static", "total, next", "total, adam_static")
HEADER = ["forecast", "of the direct change: r", "sign right", "of the total change: r", "sign right"]


@torch.no_grad()
def formulas(model: nn.Module, rollouts: Rollouts) -> dict[str, float]:
    """What every token-local formula says of a batch."""
    rows = torch.arange(rollouts.n_sequences)
    batch = pad_rows(rollouts, rows, next(model.parameters()).device)
    out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids)
    log_p = out.logits[:, :-1].double().log_softmax(-1)
    mask = batch.loss_mask[:, 1:].double()
    s = log_p.gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
    H = -(log_p.exp() * log_p).sum(-1)
    p = s.exp()
    assert rollouts.advantages is not None
    A = rollouts.advantages.double()[:, None].expand_as(s)
    own = p * (s + H) - (log_p.exp().square() * (log_p + H[..., None])).sum(-1)

    def total(values: Tensor) -> float:
        return -float((mask * values).sum())

    mean_s, mean_a = ((mask * values).sum() / mask.sum() for values in (s, A))
    found = (
        total((s - mean_s) * (A - mean_a)),
        total(A * p * (1 - p) * (s + H)),
        total(A * p * (s + H)),
        total(A * own),
        total(A * own.sign()),
    )
    return dict(zip(FORMULAS, found, strict=True))


def crossing(model: nn.Module, optimizer: torch.optim.Optimizer, rollouts: Rollouts) -> float:
    """Share of the batch's direct change, in absolute value, that one prompt's update makes at another prompt's prefixes."""
    estimate = EstimateOptions(parts=("direct",), step="adam_static")
    kernel = fast_delta_h1(model, optimizer, rollouts, estimate=estimate, run=RunOptions(full_kernel=True)).kernel
    assert kernel is not None
    return 1 - float(kernel.diagonal().abs().sum() / kernel.abs().sum())


def before_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, rollouts: Rollouts, held_out: Rollouts, settings: Settings
) -> dict[str, float]:
    """Every forecast of one step, and what it does."""
    estimate = EstimateOptions(step="next", max_grad_norm=settings.max_grad_norm)
    following = fast_delta_h1(model, optimizer, rollouts, estimate=estimate)
    static = fast_delta_h1(model, optimizer, rollouts, estimate=EstimateOptions(step="adam_static"))
    (found,) = measure_delta_h(model, optimizer, rollouts, held_out=held_out, etas=(1.0,), estimate=estimate).points
    assert following.split is not None and static.split is not None
    ours = (following.split.on_batch, static.split.on_batch, following.delta_h1, static.delta_h1)
    return {
        **dict(zip(OURS, ours, strict=True)),
        **formulas(model, rollouts),
        "direct": found.direct,
        "total": found.total,
        "total error": found.total_std_error,
        "crossing": crossing(model, optimizer, rollouts),
    }


def measure(settings: Settings, steps: int, folder: Path | None, say: Any) -> list[dict[str, float]]:
    """One record a step."""
    records = []
    for place, checkpoint in enumerate(train(settings, folder, say)):
        policy, optimizer = policy_at(checkpoint, settings)
        for step in range(steps):
            rollouts = sampled(policy, settings, settings.prompts, f"update {place}", step)
            held_out = sampled(policy, settings, settings.held_out_prompts, f"held out {place}", step)
            policy.model.train()
            found = before_step(policy.model, optimizer, rollouts, held_out, settings)
            take_step(policy.model, optimizer, rollouts, settings)
            records.append({"checkpoint": place, "step": step, **found})
            say(f"{checkpoint.name}, step {step + 1}: direct {found['direct']:+.3g}, forecast {found[OURS[0]]:+.3g}")
    return records


def rows_of(records: Sequence[dict[str, float]]) -> list[list[str]]:
    """Pearson's r and the share of right signs for every forecast."""
    rows = []
    for name in (*OURS, *FORMULAS):
        row = [name]
        for truth in ("direct", "total"):
            pairs = [(record[name], record[truth]) for record in records]
            x, y = zip(*pairs, strict=True)
            r = statistics.correlation(x, y) if len(set(x)) > 1 and len(set(y)) > 1 else math.nan
            row += [f"{r:+.3f}", f"{sum(a * b > 0 for a, b in pairs) / len(pairs):.0%}"]
        rows.append(row)
    return rows


def draw(records: Sequence[dict[str, float]], path: Path) -> None:
    """What happened against what was said, the exact forecasts beside token-local ones."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = ("direct, next", "direct, adam_static", "covariance", "π(1-π)(ln π+H)")
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots(1, len(shown), sharey=True)
    for one, name in zip(axes, shown, strict=True):
        for place in sorted({record["checkpoint"] for record in records}):
            own = [record for record in records if record["checkpoint"] == place]
            one.plot(
                [r[name] for r in own],
                [r["direct"] for r in own],
                "o",
                markersize=4,
                label=f"checkpoint {place + 1:.0f}",
            )
        one.axhline(0, color="0.8", linewidth=0.8)
        one.axvline(0, color="0.8", linewidth=0.8)
        one.set_xlabel(name)
    axes[0].set_ylabel("direct change found, nats per token of budget")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110, format="png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.token_formulas",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=18, help="from each checkpoint")
    parser.add_argument("--policy", type=Path, help="folder of the policy; the one in the user's cache without")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that everything runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for JSON")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120)
    settings, steps = SMALL, options.steps
    if options.quick:
        settings = dataclasses.replace(SMALL, steps=2, checkpoints=(2,), prompts=4, responses=3, warm_up_share=0.01)
        steps = 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EntropyFastWarning)
        records = measure(settings, steps, options.policy, lambda line: console.print(line, highlight=False))
    print_table(
        console, f"{len(records)} steps of AdamW at learning rate {settings.learning_rate:g}", HEADER, rows_of(records)
    )
    share = statistics.median(record["crossing"] for record in records)
    what = "what the fresh gradient does to the direct part (static geometry)"
    console.print(f"Of {what} {share:.0%} crosses from one prompt to another (median over steps).")
    text = json.dumps({"machine": description("cpu"), "records": records}, indent=1)
    written = report.write(options.out, "token_formulas.json", text)
    draw(records, options.out / "token_formulas.png")
    console.print(f"Written: {written}, and a picture", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
