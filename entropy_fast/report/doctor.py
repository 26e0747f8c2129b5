"""The checklist behind ``entropy-fast doctor``: the preconditions of a probe, and a small probe, on the user's own model."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import time
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from entropy_fast.api import fast_delta_h1
from entropy_fast.checks.fit import check_rollouts_fit_model
from entropy_fast.checks.grad_context import assert_grad_context
from entropy_fast.checks.model_state import checkpointed_modules, probe_state, reentrant_checkpointing
from entropy_fast.config import EstimateOptions, RunOptions
from entropy_fast.errors import EntropyFastError, EntropyFastWarning
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.ops import backend_report
from entropy_fast.report.doctor_rows import few_short_rows, prompts_with_advantage
from entropy_fast.rollouts import Rollouts
from entropy_fast.step import AdamState, OptimizerAtHand
from entropy_fast.step.joined import kind_name

__all__ = ["Check", "check_environment", "check_model", "verdict"]

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "triton")
# Batches of different padding give log-probs that differ by rounding; more than this is a model that mixes sequences.
INVARIANCE_LIMIT = 1e-3
# Between two engines in fp32; in 16 bits rounding alone can make more, so there it is only said.
AGREEMENT_LIMIT = 1e-2
REFERENCE = "two_pass"
TWO_BATCHES = ("jvp",)  # engines that one batch is not enough for


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the checklist.

    Attributes:
        name: what was checked.
        passed: True or False; None for information that is neither.
        detail: what was found and, where it failed, what to do.
    """

    name: str
    passed: bool | None
    detail: str


def check_environment() -> list[Check]:
    """Versions, and which op backends loaded and why the others did not."""
    checks = [Check("python", None, f"{platform.python_version()} on {platform.machine()}")]
    for package in PACKAGES:
        try:
            checks.append(Check(package, None, version(package)))
        except PackageNotFoundError:
            checks.append(Check(package, None, "not installed"))
    for record in backend_report():
        detail = "available" if record.available else f"not available: {record.reason}"
        checks.append(Check(f"ops backend {record.name}", None, detail))
    return checks


def check_model(
    model: nn.Module,
    state: AdamState | OptimizerAtHand | None,
    rollouts: Rollouts,
    *,
    estimate: EstimateOptions | None = None,
    run: RunOptions | None = None,
) -> list[Check]:
    """Look at everything a probe needs, and probe a few short rows by the default engine and by the reference.

    Args:
        model: the policy, with its adapter.
        state: the optimizer's, or as it was read; None skips what needs it, visibly.
        rollouts: at least two responses per prompt.
        estimate: what the probe will estimate; None takes the defaults.
        run: how it will be run; None takes the defaults. A two-batch engine is tried as the one-batch default.

    Returns:
        The checklist. A step that fails stops those that need it.
    """
    checks: list[Check] = []
    try:
        (run or RunOptions()).refuse_checkpoint("what is looked at takes a few rows")
        _run(checks, model, state, rollouts, estimate or EstimateOptions(), run or RunOptions())
    except EntropyFastError as error:
        checks.append(Check("stopped here", False, f"{error.problem} {error.fix}"))
    return checks


def verdict(checks: list[Check]) -> Check:
    """The last line: what the checks come to."""
    failed = [check.name for check in checks if check.passed is False]
    if failed:
        return Check("verdict", False, f"a probe would fail or mislead: see {', '.join(failed)}")
    if not any(check.passed for check in checks):
        return Check("verdict", None, "the installation is listed above; pass RUN or --model to have a model checked")
    if any(check.name == "optimizer" and check.passed is None for check in checks):
        return Check("verdict", True, "the model can be probed; whether the optimizer fits it was not checked")
    return Check("verdict", True, "a probe of this model and optimizer will run")


def _run(
    checks: list[Check],
    model: nn.Module,
    given: AdamState | OptimizerAtHand | None,
    rollouts: Rollouts,
    estimate: EstimateOptions,
    run: RunOptions,
) -> None:
    assert_grad_context("doctor")
    checks.append(Check("grad context", True, "autograd records here"))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    numel = sum(p.numel() for p in trained.values())
    checks.append(Check("trainable parameters", bool(trained), f"{len(trained)} tensors, {numel:,} elements"))
    at_hand = OptimizerAtHand(given) if isinstance(given, AdamState) else given
    # With another optimizer the engines are compared without its step, which may magnify their rounding (Muon's is of 16 bits).
    state = None if at_hand is None or not at_hand.is_adam else at_hand.state
    known = state or AdamState.identity(model)
    rate = (known if at_hand is None else at_hand.state).groups[0].learning_rate
    if at_hand is not None:
        found = f"{rate}" if rate > 0 else f"{rate}: a probe needs learning_rate=...; the other checks go on without it"
        checks.append(Check("learning rate", rate > 0, found))
    checks.append(_checkpointing(model))
    batch, empty = rollouts.for_autograd().without_empty_responses()
    check_rollouts_fit_model(batch, model)
    checks += _batch_checks(batch, rollouts, len(empty.sequences))
    few = few_short_rows(batch)
    # What every engine takes; the limit is checked below, where it does not stop the rest.
    plain = RunOptions(
        engine=REFERENCE, accumulate_on=run.accumulate_on, autocast_dtype=run.autocast_dtype, max_excluded_share=1.0
    )
    tried = plain if run.engine == REFERENCE else _default_engine(plain, run)
    checks += _forward_checks(model, few, tried)
    rate_option = None if rate > 0 else 1.0
    # The reference has no live gradient, and a few rows are not what one is of.
    described: dict[str, Any] = {"blocks": None, "gradient": "rollouts", "sample": None, "relative_error": None}
    whole = dataclasses.replace(estimate, **described, learning_rate=estimate.learning_rate or rate_option)
    asked = whole if state is not None or at_hand is None else dataclasses.replace(whole, step=None, max_grad_norm=None)
    start = time.perf_counter()
    result = _probe(model, known, few, asked, tried)
    seconds = time.perf_counter() - start
    checks += _coverage(result)
    checks.append(_cost(result, few, batch, seconds))
    if result.engine != REFERENCE:
        checks.append(_agreement(result, _probe(model, known, few, asked, plain), model, tried))
    if at_hand is not None and state is None:
        _probe(model, at_hand, few, whole, tried)
        checks.append(_other_optimizer(at_hand, list(trained)))
    else:
        checks.append(_optimizer(result, state, list(trained), run.max_excluded_share))


def _default_engine(plain: RunOptions, run: RunOptions) -> RunOptions:
    """The options of the folder as far as they fit one small batch."""
    engine = "auto" if run.engine in TWO_BATCHES else run.engine
    return dataclasses.replace(plain, engine=engine, memory_budget=run.memory_budget)


def _probe(
    model: nn.Module, state: AdamState | OptimizerAtHand, rows: Rollouts, estimate: EstimateOptions, run: RunOptions
) -> DeltaH1Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EntropyFastWarning)  # what it says stands in the result
        return fast_delta_h1(model, state, rows, estimate=estimate, run=run)


def _checkpointing(model: nn.Module) -> Check:
    on = checkpointed_modules(model)
    if not on:
        return Check("gradient checkpointing", None, "off")
    name = reentrant_checkpointing(model)
    if name is None:
        return Check("gradient checkpointing", True, f"on in {len(on)} modules, not reentrant")
    return Check(
        "gradient checkpointing",
        None,
        f"reentrant in '{name}': whole sequences are packed, and the double backward (conditional_variance) cannot be used",
    )


def _batch_checks(batch: Rollouts, rollouts: Rollouts, n_empty: int) -> list[Check]:
    """What the rollouts alone tell."""
    useful = len(prompts_with_advantage(batch))
    sampled: bool | None = not batch.truncated_by and batch.temperature in (None, 1)
    if sampled and None in (batch.temperature, batch.top_p):
        sampled = None
    others = [("top-k", batch.top_k), ("min-p", batch.min_p)]
    shown = [("temperature", batch.temperature), ("top-p", batch.top_p), *(o for o in others if o[1] is not None)]
    return [
        Check("empty responses", None, f"{n_empty} of {rollouts.n_sequences}"),
        Check(
            "prompts with an advantage",
            useful > 0,
            f"{useful} of {batch.n_prompts}" + ("" if useful else "; every advantage is 0, and so is the update"),
        ),
        Check("sampled at temperature 1, top-p 1", sampled, ", ".join(f"{name} {number}" for name, number in shown)),
    ]


def _forward_checks(model: nn.Module, rows: Rollouts, run: RunOptions) -> list[Check]:
    """Whether a forward is repeatable, and whether a sequence's log-prob is its own."""
    with probe_state(model):
        first, again = (_sequence_logprobs(model, rows, run) for _ in range(2))
        single = [_sequence_logprobs(model, rows.select_rows(torch.tensor([i])), run) for i in range(rows.n_sequences)]
    difference = float((first - again).abs().max())
    relative = float((first - torch.cat(single)).abs().max() / first.abs().max().clamp_min(1e-30))
    # In 16 bits another batch size takes other kernels, which round otherwise.
    exact = _is_exact(model, run)
    mixes = relative >= INVARIANCE_LIMIT
    return [
        Check(
            "dropout off",
            difference == 0,
            f"two forwards differ by {difference:.3g} nats"
            + ("; remove dropout or noise from hooks and custom forwards" if difference else ""),
        ),
        Check(
            "sequences do not interact",
            not mixes if exact or not mixes else None,
            f"batched and single log-probs differ by {relative:.2e} relative"
            + ("; remove batch statistics and expert capacity limits" if mixes and exact else ""),
        ),
    ]


def _sequence_logprobs(model: nn.Module, rows: Rollouts, run: RunOptions) -> Tensor:
    """[N] S_i in nats by the model's own forward; rows are padded on the right."""
    device = next(model.parameters()).device
    ids, attention, loss = (t.to(device) for t in (rows.input_ids, rows.attention_mask, rows.loss_mask))
    dtype = run.torch_autocast_dtype
    autocast = contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
    with torch.no_grad(), autocast:
        logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1]
        logprobs = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    found: Tensor = (logprobs * loss[:, 1:]).double().sum(-1)
    return found


def _coverage(result: DeltaH1Result) -> list[Check]:
    checks = []
    for label, found in result.diagnostics.coverage.items():
        norm = "" if found.norm is None else f", norm {found.norm:.4g}"
        missing = f"; none for '{found.untouched[0]}': use it in the forward or freeze it" if found.untouched else ""
        detail = f"{found.n_with_gradient} of {found.n_trainable} tensors, {found.numel_share:.1%} of elements{norm}{missing}"
        # A norm of 0 was computed, but says nothing: without advantages, say.
        checks.append(Check(f"{label} gradients", not found.untouched and found.norm != 0, detail))
    return checks


def _cost(result: DeltaH1Result, few: Rollouts, batch: Rollouts, seconds: float) -> Check:
    """The default engine's plan for the few rows, and what the time it took comes to for the batch."""
    tried, all_tokens = (int(rows.attention_mask.sum()) for rows in (few, batch))
    return Check(
        f"engine {result.engine}",
        True,
        f"{few.n_sequences} short responses, {tried} tokens, took {seconds:.2g} s; at that rate the batch's {all_tokens:,} "
        f"tokens take {seconds * all_tokens / tried:.2g} s, usually less. Plan: {result.plan}",
    )


def _agreement(result: DeltaH1Result, reference: DeltaH1Result, model: nn.Module, run: RunOptions) -> Check:
    name = f"{result.engine} agrees with {REFERENCE}"
    scale = float(reference.row_sums.abs().max())
    if scale == 0:
        return Check(name, None, "nothing to compare: the kernel of these rows is 0")
    relative = float((result.row_sums - reference.row_sums).abs().max()) / scale
    exact = _is_exact(model, run)
    detail = f"row sums of the kernel differ by {relative:.1e}" + ("" if exact else ", most of it rounding to 16 bits")
    return Check(name, relative < AGREEMENT_LIMIT if exact else None, detail)


def _is_exact(model: nn.Module, run: RunOptions) -> bool:
    """Whether forwards run in at least 32 bits."""
    floating = {p.dtype for p in model.parameters() if p.is_floating_point()}
    quantised = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    return run.autocast_dtype is None and not quantised and not floating & {torch.bfloat16, torch.float16}


def _optimizer(result: DeltaH1Result, state: AdamState | None, trained: list[str], limit: float) -> Check:
    if state is None:
        return Check("optimizer", None, "not given: coverage by second moments was not checked")
    held = sum(name in state.group_of for name in trained)
    stepped = sum(name in state.moments for name in trained)
    excluded = result.diagnostics.excluded
    return Check(
        "optimizer",
        excluded.share <= limit,
        f"holds {held} and has stepped {stepped} of {len(trained)} tensors; {excluded.share:.2%} of ‖g‖² without second "
        f"moment (the limit is {limit:.0%}), {excluded.below_eps} elements with sqrt(v̂) below ε",
    )


def _other_optimizer(at_hand: OptimizerAtHand, trained: list[str]) -> Check:
    held = sum(name in at_hand.state.group_of for name in trained)
    return Check(
        "optimizer",
        True,
        f"{kind_name(at_hand.live)}, made again from its file: holds {held} of {len(trained)} tensors, and its whole next step "
        "was found by steps on copies",
    )
