"""Probes by one process or by all ranks of a group, with what they are made of; for `ranks_at_work`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from probe_models.architectures import add_lora, build_model, quantize_nf4, stepped_adamw
from probe_models.batches import make_rollouts
from probe_options import options_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from entropy_fast import Rollouts, candidates, fast_delta_h1
from entropy_fast.estimates.result import DeltaH1Result

Run = Callable[[str], DeltaH1Result]  # by "own" or "all" ranks


SIZES = (3, 2, 4, 2, 2)  # divisible by no number of ranks; three of them get [2], [0, 3] and [1, 4]: not in order
TIMEOUT = 60.0  # seconds
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
        chosen["run"] = dataclasses.replace(chosen["run"], ranks=ranks, rank_timeout=TIMEOUT)
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
def fewer_prompts_than_ranks_along_the_next_step() -> Run:
    options = {"entropy_estimator": "rao_blackwell", "step": "next", "parts": ("direct",)}
    return probing(wide_model(), make_rollouts((2, 2)), by_sequence=True, by_token=True, **options)


@case
def fewer_prompts_than_ranks_in_two_batches() -> Run:
    return probing(wide_model(), make_rollouts((2, 2)), make_rollouts((2, 2), seed=7), by_sequence=True, step="next")


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
    return live_gradient((2, 3, 2, 2, 2, 2), sample=4)


@case
def live_gradient_of_a_sample_and_other_updates() -> Run:
    return live_gradient((2, 3, 2, 2, 2, 2), sample=4, others=True)


@case
def live_gradient_and_other_updates() -> Run:
    return live_gradient((2, 3, 2), others=True)


def live_gradient(sizes: tuple[int, ...], *, others: bool = False, **options: Any) -> Run:
    batch, model = make_rollouts(sizes), wide_model()
    fields: dict[str, Any] = {}
    if others:
        scale = 8 * batch.n_sequences  # of the loss below
        another = torch.randn(batch.n_sequences, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        fields["coefficients"] = batch.advantages.double() / scale
        fields["updates"] = {"another": another / scale}
        fields["functionals"] = {"length": batch.response_lengths.double()}
    run = probing(
        model,
        batch,
        fields=fields,
        gradient="live",
        step="next",
        entropy_estimator="rao_blackwell",
        parts=("direct",),
        max_grad_norm=0.5,
        **options,
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


@case
def quantized_base() -> Run:
    return probing(add_lora(quantize_nf4(build_model("qwen2"))), make_rollouts(SIZES))
