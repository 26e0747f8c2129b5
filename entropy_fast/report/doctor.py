"""The checklist behind ``entropy-fast doctor``: every precondition of a probe, tried on the user's own model."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import nn

from entropy_fast.checks.coverage import PassCoverage
from entropy_fast.checks.fit import check_rollouts_fit_model
from entropy_fast.checks.grad_context import assert_grad_context
from entropy_fast.checks.model_state import checkpointed_modules, reentrant_checkpointing
from entropy_fast.columns import Side
from entropy_fast.columns.lengths import check_group_sizes
from entropy_fast.config import EstimateOptions, RunOptions
from entropy_fast.engines.gradient_sum import GradientSum, inner_product
from entropy_fast.engines.sums import finish_functional, finish_update
from entropy_fast.errors import EntropyFastError
from entropy_fast.ops import backend_report
from entropy_fast.probe_components import ProbeComponents
from entropy_fast.rollouts import Rollouts
from entropy_fast.step import AdamState, ExcludedElements

__all__ = ["Check", "check_environment", "check_model", "synthetic_rollouts"]

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "triton")
# Batches of different padding give log-probs that differ by rounding; more than this is a model that mixes sequences.
INVARIANCE_LIMIT = 1e-3


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


def check_model(model: nn.Module, state: AdamState | None, rollouts: Rollouts) -> list[Check]:
    """Run every step of a probe once on a few sequences, and say how each went.

    Args:
        model: the policy, with its adapter.
        state: the optimizer's; None skips what needs it, visibly.
        rollouts: at least two responses per prompt.

    Returns:
        The checklist. A step that fails stops those that need it.
    """
    checks: list[Check] = []
    try:
        _run(checks, model, state, rollouts)
    except EntropyFastError as error:
        checks.append(Check("stopped here", False, f"{error.problem} {error.fix}"))
    return checks


def synthetic_rollouts(
    vocabulary: int, prompts: int = 2, responses: int = 2, length: int = 8, seed: int = 0
) -> Rollouts:
    """Random tokens in the shape of rollouts, for checks that need no meaning."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randint(vocabulary, (prompts, 1, length), generator=generator).expand(-1, responses, -1)
    ids = torch.cat([shared, torch.randint(vocabulary, (prompts, responses, length), generator=generator)], -1)
    rewards = torch.arange(prompts * responses).reshape(prompts, responses).remainder(2)
    return Rollouts.from_dict(
        {
            "sequences": ids,
            "attention_masks": torch.ones_like(ids),
            "prompt_lens": torch.full((prompts,), length),
            "rewards": rewards.to(torch.float64),
            "max_lengths": torch.full((prompts,), length),
        }
    )


def _run(checks: list[Check], model: nn.Module, state: AdamState | None, rollouts: Rollouts) -> None:
    def step(name: str, action: Callable[[], str]) -> None:
        checks.append(Check(name, True, action()))

    def grad_context() -> str:
        assert_grad_context("doctor")
        return "autograd records here"

    step("grad context", grad_context)
    known = state or AdamState.identity(model)
    rate = known.groups[0].learning_rate
    if state is not None:
        found = f"{rate}" if rate > 0 else f"{rate}: a probe needs learning_rate=...; the other checks go on without it"
        checks.append(Check("learning rate", rate > 0, found))
    estimate = EstimateOptions(learning_rate=rate if rate > 0 else 1.0)
    components = ProbeComponents(model, known, estimate, RunOptions(max_excluded_share=1.0))
    registry = components.context.registry
    step("trainable parameters", lambda: f"{len(registry.parameters)} tensors, {registry.numel:,} elements")
    checks.append(_checkpointing(model))
    batch, empty = rollouts.for_autograd().without_empty_responses()
    check_group_sizes(batch)
    check_rollouts_fit_model(batch, registry.module)
    checks.append(Check("empty responses", None, f"{len(empty.sequences)} of {rollouts.n_sequences}"))
    sampled = None if None in (batch.temperature, batch.top_p) else (batch.temperature, batch.top_p) == (1, 1)
    checks.append(
        Check("sampled at temperature 1, top-p 1", sampled, f"temperature {batch.temperature}, top-p {batch.top_p}")
    )
    few = batch.select_rows(torch.cat([batch.rows_of_prompt(n) for n in range(min(2, batch.n_prompts))]))
    rows = torch.arange(few.n_sequences)
    with components.context.probe_state():
        first = components._compute_aligned_batch_logprobs(few, rows)
        again = components._compute_aligned_batch_logprobs(few, rows)
        alone = [components._compute_aligned_batch_logprobs(few, row[None]) for row in rows]
    checks.append(
        Check("logits and S attached", True, f"S {first.sequence_logprobs.dtype}, {_grad_name(first.logits)}")
    )
    difference = _distance(first.sequence_logprobs, again.sequence_logprobs)
    checks.append(
        Check(
            "dropout off",
            difference == 0,
            f"two forwards differ by {difference:.3g} nats"
            + ("; remove dropout or noise from hooks and custom forwards" if difference else ""),
        )
    )
    separate = torch.cat([f.sequence_logprobs for f in alone])
    relative = _distance(first.sequence_logprobs, separate) / float(separate.detach().abs().max().clamp_min(1e-30))
    checks.append(
        Check(
            "sequences do not interact",
            relative < INVARIANCE_LIMIT,
            f"batched and single S differ by {relative:.2e} relative"
            + ("; remove batch statistics and expert capacity limits" if relative >= INVARIANCE_LIMIT else ""),
        )
    )
    context = components.context
    x_sum, x_coverage = finish_functional(context, components._pass(Side.FUNCTIONAL, few).total, few)
    checks.append(_coverage("X", x_coverage))
    y_sum, y_coverage, excluded = finish_update(context, components._pass(Side.UPDATE, few).total, few)
    checks.append(_coverage("Y", y_coverage))
    checks.append(_alpha(components, few, x_sum))
    checks.append(_optimizer(components, state, y_sum, excluded))


def _checkpointing(model: nn.Module) -> Check:
    on = checkpointed_modules(model)
    if not on:
        return Check("gradient checkpointing", None, "off")
    name = reentrant_checkpointing(model)
    if name is None:
        return Check("gradient checkpointing", True, f"on in {len(on)} modules, not reentrant")
    return Check(
        "gradient checkpointing", None, f"reentrant in '{name}': X and Y work, the alpha trick and autograd.grad do not"
    )


def _coverage(label: str, found: PassCoverage) -> Check:
    return Check(
        f"{label} gradients",
        not found.untouched,
        f"{found.n_with_gradient} of {found.n_trainable} tensors, {found.numel_share:.1%} of elements, norm {found.norm:.4g}"
        + (f"; none for '{found.untouched[0]}': use it in the forward or freeze it" if found.untouched else ""),
    )


def _alpha(components: ProbeComponents, batch: Rollouts, direction: GradientSum) -> Check:
    """s_n along X_sum by the alpha trick, against X_n · X_sum by one backward a prompt."""
    try:
        found = components._alpha_projections(batch, direction.tensors)
    except EntropyFastError as error:
        return Check("alpha trick", None, f"not usable: {error.problem} Per-prompt backwards are used instead.")
    projections = torch.cat([of_prompts.projections for of_prompts in found])
    reached = min(of_prompts.n_with_gradient for of_prompts in found)
    expected = components._projections(Side.FUNCTIONAL, batch, direction.tensors)
    relative = _distance(projections, expected) / float(expected.abs().max().clamp_min(1e-300))
    return Check(
        "alpha trick",
        relative < 1e-2,
        f"{reached} of {len(components.context.registry.parameters)} tensors, {len(projections)} prompts, "
        f"{relative:.1e} from per-prompt backwards",
    )


def _optimizer(
    components: ProbeComponents, state: AdamState | None, y_sum: GradientSum, excluded: ExcludedElements
) -> Check:
    if state is None:
        return Check("optimizer", None, "not given: coverage by second moments was not checked")
    registry = components.context.registry
    norm = inner_product(y_sum.tensors, y_sum.tensors) ** 0.5
    held = sum(p.group is not None for p in registry.parameters)
    stepped = sum(name in state.moments for name in registry.names)
    return Check(
        "optimizer",
        excluded.share <= RunOptions().max_excluded_share,
        f"holds {held} and has stepped {stepped} of {len(registry.parameters)} tensors; {excluded.share:.2%} of "
        f"‖g‖² without second moment, {excluded.below_eps} elements with sqrt(v̂) below ε, ‖Y_sum‖ {norm:.4g}",
    )


def _distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left.detach() - right.detach()).abs().max())


def _grad_name(tensor: torch.Tensor) -> str:
    assert tensor.grad_fn is not None
    return f"logits {tensor.dtype} from {type(tensor.grad_fn).__name__}"
