"""Probes by all ranks together beside those of one process; run by every process of `process_groups.run_ranks`.

Usage: python ranks_at_work.py RANK WORLD_SIZE STORE RESULT_FILE MODE CASE...

``together`` runs the named cases by all ranks; the first rank runs them by itself too, and writes both.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from probe_models.architectures import add_lora, build_model, stepped_adamw
from probe_models.batches import make_rollouts
from probe_options import options_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from entropy_fast import Rollouts, candidates, fast_delta_h1
from entropy_fast.estimates.result import DeltaH1Result

Run = Callable[[str], DeltaH1Result]  # by "own" or "all" ranks

SIZES = (2, 4, 3, 2, 2)  # divisible by no number of ranks, and by one of them not even into two each
LEFT_OUT = ("plan", "run_options", "estimate_options")
CASES: dict[str, Callable[[], Run]] = {}


def case(make: Callable[[], Run]) -> Callable[[], Run]:
    CASES[make.__name__] = make
    return make


def wide_model(*, lora: bool = True, family: str = "opt") -> nn.Module:
    """In fp64; OPT's and GPT-2's norms compute in the model's dtype."""
    base = build_model(family, tied=not lora) if not lora else add_lora(build_model(family))
    return base.double()


def probing(model: nn.Module, *batches: Rollouts, fields: Mapping[str, Any] | None = None, **options: Any) -> Run:
    """`fast_delta_h1` of a model with an AdamW of its own; the entropy batch is the second."""
    optimizer, given = stepped_adamw(model), dict(fields or {})
    if len(batches) == 2:
        given["entropy_rollouts"] = batches[1]

    def run(ranks: str) -> DeltaH1Result:
        chosen = options_of(**options)
        chosen["run"] = dataclasses.replace(chosen["run"], ranks=ranks, rank_timeout=60)
        return fast_delta_h1(model, optimizer, batches[0], **given, **chosen)

    return run


@case
def score_function() -> Run:
    return probing(wide_model(), make_rollouts(SIZES), by_sequence=True)


@case
def parts_along_the_next_step() -> Run:
    batch = make_rollouts(SIZES)
    fields = {
        "functionals": {"length": batch.response_lengths.double()},
        "updates": {"bonus": candidates.entropy_bonus(0.01)},
    }
    options = {"entropy_estimator": "rao_blackwell", "baseline": "prompts", "step": "next", "max_grad_norm": 0.5}
    return probing(wide_model(), batch, fields=fields, by_sequence=True, by_token=True, **options)


@case
def second_sweep() -> Run:
    options = {"entropy_estimator": "rao_blackwell", "baseline": "prompts", "step": "next", "memory_budget": 0}
    return probing(wide_model(), make_rollouts(SIZES), **options)


@case
def whole_model_with_blocks() -> Run:
    return probing(wide_model(lora=False, family="gpt2"), make_rollouts((2, 2, 2, 3)), blocks=2)


@case
def loss_of_the_batch() -> Run:
    batch = make_rollouts(SIZES)
    mask = batch.loss_mask.double()

    def loss(logprobs: Tensor, entropies: Tensor) -> Tensor:
        ours = -(logprobs * batch.advantages[:, None].to(logprobs) * mask).sum() / mask.sum()
        return ours - 0.01 * (entropies * mask).sum() / mask.sum()

    return probing(wide_model(), batch, fields={"update": loss}, entropy_weighting="pooled")


@case
def two_batches() -> Run:
    options = {"entropy_estimator": "rao_blackwell", "step": "next"}
    return probing(wide_model(), make_rollouts((2, 2, 2)), make_rollouts(SIZES, seed=7), by_sequence=True, **options)


@case
def fewer_prompts_than_ranks() -> Run:
    return probing(wide_model(), make_rollouts((2, 2)))


@case
def plain_reference() -> Run:
    return probing(wide_model(), make_rollouts(SIZES), engine="two_pass", full_kernel=True)


@case
def plain_reference_along_the_next_step() -> Run:
    batches = make_rollouts((2, 2, 2)), make_rollouts(SIZES, seed=7)
    return probing(wide_model(), *batches, engine="two_pass", entropy_estimator="rao_blackwell", step="next")


@case
def double_backward() -> Run:
    batches = make_rollouts((2, 2, 2)), make_rollouts(SIZES, seed=7)
    return probing(wide_model(), *batches, engine="two_pass", conditional_variance="alpha")


@case
def forwards_with_tangents() -> Run:
    batches = make_rollouts((2, 2, 2)), make_rollouts(SIZES, seed=7)
    return probing(wide_model(), *batches, engine="jvp", entropy_estimator="rao_blackwell", parts=("direct",))


@case
def live_gradient_of_a_sample() -> Run:
    batch, model = make_rollouts((2, 3, 2, 2, 2, 2)), wide_model()
    run = probing(
        model,
        batch,
        gradient="live",
        sample=4,
        step="next",
        entropy_estimator="rao_blackwell",
        parts=("direct",),
        max_grad_norm=0.5,
    )
    model.eval()
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    logprobs = torch.log_softmax(logits, -1).gather(-1, batch.input_ids[:, 1:, None])[..., 0] * batch.loss_mask[:, 1:]
    (-(logprobs.sum(1) * batch.advantages / 8).mean()).backward()
    return run


@case
def under_ddp() -> Run:
    model = wide_model()
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    return probing(wrapped, make_rollouts(SIZES))


@case
def single_precision() -> Run:
    return probing(add_lora(build_model("opt")), make_rollouts(SIZES), entropy_estimator="rao_blackwell", step="next")


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, list[float]]]:
    """Every number of a result, by where it stands."""
    if isinstance(value, Tensor):
        yield path, value.double().flatten().tolist()
    elif isinstance(value, (int, float)):
        yield path, [float(value)]
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            if field.name not in LEFT_OUT:
                yield from numbers(getattr(value, field.name), f"{path}.{field.name}")
    elif isinstance(value, Mapping):
        for key, own in value.items():
            yield from numbers(own, f"{path}.{key}")
    elif isinstance(value, (tuple, list)):
        for place, own in enumerate(value):
            yield from numbers(own, f"{path}.{place}")


def digest(found: Mapping[str, list[float]]) -> str:
    return hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()


def together(names: list[str], rank: int) -> dict[str, Any]:
    found = {}
    for name in names:
        run = CASES[name]()
        began = time.monotonic()
        result = run("all")
        ours = dict(numbers(result))
        found[name] = {
            "digest": digest(ours),
            "plan": str(result.diagnostics.plan),
            "warnings": list(result.diagnostics.warnings),
            "seconds": time.monotonic() - began,
        }
        if rank == 0:
            found[name] |= {"all": ours, "own": dict(numbers(run("own")))}
    return found


def main(rank: int, world: int, store: str, result: str, mode: str, *names: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(1000 + rank)  # nothing may depend on it
    limit = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=limit)
    found = together(list(names), rank)
    Path(result).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
    os._exit(0)
