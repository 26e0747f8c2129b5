"""Results with everything in them, and with next to nothing, for tests of what is shown of results."""

from __future__ import annotations

import dataclasses
from functools import cache

import torch
from probe_options import options_of
from probe_oracle import models
from probe_oracle.batches import Shape, make_rollouts

from entropy_fast import DeltaH1Result, Rollouts, candidates, fast_delta_h1

SHAPE = Shape(sizes=(2, 3, 2, 3, 2), longest_response=4, budget=1, empty=1)
HOSTILE = '</script><img src=x onerror=alert(1)>\x1b[31m\u202edrow\u2069 $\\frac{ & "quoted"'


def rollouts() -> Rollouts:
    """Five prompts with texts, the second of them hostile; one row has no response tokens."""
    batch = make_rollouts(SHAPE, models.VOCABULARY, 0)
    return dataclasses.replace(batch, prompts=["first", HOSTILE, "third", "fourth", "fifth"])


def prompts() -> list[str]:
    """In the order in which they stand once that row is left out."""
    return list(rollouts().without_empty_responses()[0].prompts or [])


@cache
def full() -> DeltaH1Result:
    """Along the optimizer's whole step, with shares of everything, the kernel, functionals and another update."""
    model, batch = models.tiny_transformer().train(), rollouts()
    options = options_of(
        entropy_estimator="rao_blackwell", step="next", engine="one_pass", by_sequence=True, by_token=True, full_kernel=True,
        max_grad_norm=0.1,
    )  # fmt: skip
    lengths = batch.response_lengths.double()
    functionals = {"length": lengths, "odd": lengths % 2}
    updates = {"bonus": candidates.entropy_bonus(0.5)}
    optimizer = models.stepped_adam(model)
    return fast_delta_h1(model, optimizer, batch, functionals=functionals, updates=updates, **options)


@cache
def bare() -> DeltaH1Result:
    """From log-probs, along Adam's static step, in two blocks, above the memory in which the kernel is kept."""
    model = models.tiny_transformer().train()
    batch = make_rollouts(Shape(budget=2), models.VOCABULARY, 1)
    options = options_of(engine="one_pass", blocks=2, memory_budget=1)
    return fast_delta_h1(model, models.stepped_adam(model), batch, **options)


@cache
def static_blocks() -> DeltaH1Result:
    """Along Adam's static step with the kernel between blocks of three and two prompts."""
    model = models.tiny_transformer().train()
    batch = make_rollouts(Shape(sizes=(2, 3, 2, 3, 2, 2, 2), budget=2), models.VOCABULARY, 1)
    options = options_of(entropy_estimator="rao_blackwell", engine="one_pass", blocks=3, full_kernel=True)
    return fast_delta_h1(model, models.stepped_adam(model), batch, **options)


@cache
def two_batches() -> DeltaH1Result:
    """The direct part alone, by the forward engine."""
    model = models.tiny_transformer().train()
    entropy, update = (make_rollouts(SHAPE, models.VOCABULARY, seed) for seed in (1, 2))
    options = options_of(entropy_estimator="rao_blackwell", engine="jvp", parts=("direct",))
    return fast_delta_h1(model, models.stepped_adam(model), update, entropy_rollouts=entropy, **options)


def unknown_errors(result: DeltaH1Result) -> DeltaH1Result:
    """As of too few prompts for a standard error."""
    nan = torch.nan
    forecast = dataclasses.replace(result.forecast, std_error=nan, population_std_error=nan)
    split = result.split
    if split is not None:
        parts = {
            name: dataclasses.replace(getattr(split, name), std_error=nan) for name in ("total", "direct", "visitation")
        }
        split = dataclasses.replace(split, **parts)
    return dataclasses.replace(result, std_error=nan, forecast=forecast, split=split)
