"""The two-pass engine: X and Y by plain backward passes. Readable and guarded; every faster engine is checked against it.

Legend (docs/theory.md): S_i sequence log-prob, c_i and a_i coefficients, X_n = Σ c_i ∇S_i, Y_n = P Σ a_i ∇S_i,
K_nm = X_n · Y_m, E entropy batch, U update batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from entropy_fast.checks import coverage as coverage_guard
from entropy_fast.checks.coverage import PassCoverage
from entropy_fast.checks.grad_context import assert_attached, assert_grad_context
from entropy_fast.checks.model_state import probe_state, reentrant_checkpointing
from entropy_fast.checks.parameter_registry import ParameterRegistry
from entropy_fast.columns.coefficients import (
    Coefficients,
    SequenceTable,
    power_of_two_scale,
)
from entropy_fast.columns.losses import sequence_losses
from entropy_fast.columns.token_coefficients import ScoredTokens, coefficients_of
from entropy_fast.config import ProbeConfig
from entropy_fast.engines.gradient_sum import GradientSum, inner_product, parameter_products, per_parameter_products
from entropy_fast.engines.one_pass.planner import Plan
from entropy_fast.engines.two_pass import alpha_trick
from entropy_fast.engines.two_pass.gradient_routes import gradients_by_autograd_grad, gradients_by_backward
from entropy_fast.errors import ModelStateError
from entropy_fast.estimates.kernel_sums import CrossKernelSums, KernelSums
from entropy_fast.ops import precondition_accumulate
from entropy_fast.rollouts import Rollouts
from entropy_fast.rollouts.units import iter_microbatches, prompt_units
from entropy_fast.step.adam_state import AdamState
from entropy_fast.step.preconditioner import AdamPreconditioner, ExcludedElements, check_excluded
from entropy_fast.ways.padded import ForwardResult, PackedBatch, align_logprobs, model_logits, pack_rows

__all__ = ["ProbeComponents", "ProgressCallback"]

ProgressCallback = Callable[[str, int, int], None]  # stage, prompts done, prompts in all

LEADING_PARAMETERS = 5  # how many per-parameter products X·Y the diagnostics show
# Relative; far above what non-deterministic kernels do to a sum of log-probs, far below what dropout does.
REPEATABILITY = 1e-2
DETACHED_FIX = (
    "remove no_grad/inference_mode inside the model's forward, detach() and .data on hidden states, and "
    "disable_adapter() around the probe, and unmerge a merged adapter; for gradient checkpointing over frozen embeddings call "
    "model.enable_input_require_grads(); unfreeze the parameters that are trained."
)


class ProbeComponents:
    """Forwards, backwards and kernel sums for one model, one optimizer state and one configuration.

    Args:
        model: a causal language model, possibly wrapped in DistributedDataParallel or compiled.
        state: the optimizer's Adam state for this model.
        config: options; None takes the defaults.
        learning_rate: overrides the optimizer's, rescaling all groups alike.
        on_progress: called with stage, prompts done and prompts in all.

    Raises:
        ModelStateError, LearningRateError: see `ParameterRegistry.build` and `AdamPreconditioner`.
    """

    def __init__(
        self,
        model: nn.Module,
        state: AdamState,
        config: ProbeConfig | None = None,
        learning_rate: float | None = None,
        on_progress: ProgressCallback | None = None,
    ) -> None:
        self.model = model
        self.config = config or ProbeConfig()
        self.registry = ParameterRegistry.build(model, state.group_of)
        self.preconditioner = AdamPreconditioner(state, self.registry, learning_rate)
        self.coverage: dict[str, PassCoverage] = {}
        self.sequences: dict[str, SequenceTable] = {}
        self.leading_products: dict[str, float] = {}
        self.n_reached_by_alpha: int | None = None
        self.excluded: ExcludedElements | None = None
        self.notes: list[str] = []  # these two are what an engine wants said in the result
        self.plan: Plan | str | None = None
        self._on_progress = on_progress

    _assert_grad_context = staticmethod(assert_grad_context)

    @property
    def device(self) -> torch.device:
        """Where the first trainable parameter is; inputs are sent there."""
        return self.registry.tensors[0].device

    @property
    def compute_dtypes(self) -> set[torch.dtype]:
        """Dtypes of the trainable parameters and, where it is set, of autocast."""
        autocast = self.config.autocast_dtype
        return {p.dtype for p in self.registry.tensors} | (set() if autocast is None else {autocast})

    def probe_state(self) -> contextlib.AbstractContextManager[None]:
        """Context in which passes run: dropout off, gradients set aside; the model is restored on the way out."""
        return probe_state(self.model)

    def _teacher_force_logprobs(self, batch: PackedBatch) -> ForwardResult:
        """One forward of ``batch``: aligned token log-probs and S [n]; logits and S are checked to carry a graph."""
        self._assert_grad_context("ProbeComponents._teacher_force_logprobs")
        self.registry.check("ProbeComponents._teacher_force_logprobs")
        with self.autocast():
            logits = model_logits(self.registry.module, batch)
        assert_attached("logits", logits, "ProbeComponents._teacher_force_logprobs", DETACHED_FIX)
        forward = align_logprobs(logits, batch, want_entropies=self.config.wants_token_entropies)
        assert_attached("S", forward.sequence_logprobs, "ProbeComponents._teacher_force_logprobs", DETACHED_FIX)
        return forward

    def _compute_aligned_batch_logprobs(self, rollouts: Rollouts, rows: Tensor) -> ForwardResult:
        """The given rows of the rollouts, laid out without left padding and teacher-forced."""
        self._assert_grad_context("ProbeComponents._compute_aligned_batch_logprobs")
        return self._teacher_force_logprobs(pack_rows(rollouts, rows, self.device))

    def _coefficients(self, forward: ForwardResult, rollouts: Rollouts, rows: Tensor, labels: str) -> Coefficients:
        return coefficients_of(self.config, rollouts, rows, ScoredTokens.of(forward), labels)

    def _build_probe_loss(self, which: str, forward: ForwardResult, coefficients: Coefficients) -> Tensor:
        """L_X or L_Y, also where coefficients differ within a sequence and S does not tell enough."""
        if coefficients.tokens is not None:
            return sequence_losses(forward, coefficients, "XY".index(which)).sum()
        build = self._build_probe_loss_X_from_S if which == "X" else self._build_probe_loss_Y_from_S
        return build(forward.sequence_logprobs, coefficients)

    def _build_probe_loss_X_from_S(self, S: Tensor, coefficients: Coefficients) -> Tensor:  # noqa: N802 (X, S: theory)
        """L_X = Σ_i c_i S_i, a sum, whose gradient is Σ_n X_n over the prompts of ``S`` [n]."""
        return (coefficients.entropy.to(S.dtype) * S).sum()

    def _build_probe_loss_Y_from_S(self, S: Tensor, coefficients: Coefficients) -> Tensor:  # noqa: N802 (Y, S: theory)
        """L_Y = Σ_i a_i S_i, whose gradient is Σ_n g_n over the prompts of ``S`` [n]."""
        return (coefficients.update.to(S.dtype) * S).sum()

    def _iter_prompt_microbatches(self, rollouts: Rollouts, prompts: Sequence[int] | None = None) -> Iterator[Tensor]:
        """Row indices of successive microbatches of whole prompts."""
        chosen = list(range(rollouts.n_prompts)) if prompts is None else list(prompts)
        return iter_microbatches(rollouts, chosen, self.config.prompts_per_microbatch or 1)

    def _iter_prompts_as_units(self, rollouts: Rollouts) -> Iterator[list[int]]:
        """Prompt indices of every unit of the U-statistic (single prompts, or blocks)."""
        return iter(prompt_units(rollouts.n_prompts, self.config.blocks))

    def accumulate_sum_X(self, rollouts: Rollouts) -> GradientSum:  # noqa: N802 (X as in the theory)
        """X_sum = Σ_n X_n over all prompts, raw (not preconditioned).

        Raises:
            GradientCoverageError: no parameter received a gradient (or, strict, one did not).
        """
        self._assert_grad_context("ProbeComponents.accumulate_sum_X")
        total = self._gradient_sum("X", rollouts, range(rollouts.n_prompts), table=self.new_table("X", rollouts))
        return self.finish_sum_X(total, rollouts)

    def accumulate_sum_Y(self, rollouts: Rollouts) -> GradientSum:  # noqa: N802 (Y as in the theory)
        """Y_sum = P Σ_n g_n over all prompts, preconditioned.

        Raises:
            GradientCoverageError: no parameter received a gradient, or too much of it has no second moment.
        """
        self._assert_grad_context("ProbeComponents.accumulate_sum_Y")
        total = self._gradient_sum("Y", rollouts, range(rollouts.n_prompts), table=self.new_table("Y", rollouts))
        return self.finish_sum_Y(total, rollouts)

    def finish_sum_X(self, total: GradientSum, rollouts: Rollouts) -> GradientSum:  # noqa: N802 (X as in the theory)
        """Record what X_sum reached, and refuse a sum that reached nothing.

        Raises:
            GradientCoverageError: no parameter received a gradient (or, strict, one did not).
        """
        self._record_coverage("X", total, rollouts)
        return total

    def finish_sum_Y(self, total: GradientSum, rollouts: Rollouts) -> GradientSum:  # noqa: N802 (Y as in the theory)
        """Y_sum from Σ_n g_n: its coverage recorded, what has no second moment counted, the rest preconditioned.

        Raises:
            GradientCoverageError: no parameter received a gradient, or too much of it has no second moment.
        """
        self._record_coverage("Y", total, rollouts)
        self.excluded = self.preconditioner.excluded(total.tensors)
        check_excluded(self.excluded, self.config.max_excluded_share)
        return GradientSum(self.preconditioner.apply_preconditioner(total.tensors), total.touched)

    def _compute_delta_h1_exact(self, rollouts: Rollouts) -> KernelSums:
        """Kernel sums with every prompt as a unit."""
        return self._kernel_sums(rollouts, prompt_units(rollouts.n_prompts, None))

    def _compute_delta_h1_blocks(self, rollouts: Rollouts) -> KernelSums:
        """Kernel sums with ``config.blocks`` blocks of prompts as units."""
        return self._kernel_sums(rollouts, list(self._iter_prompts_as_units(rollouts)))

    def compute_cross_sums(self, entropy: Rollouts, update: Rollouts) -> CrossKernelSums:
        """Kernel sums between an entropy batch and an independent update batch."""
        self._assert_grad_context("ProbeComponents.compute_cross_sums")
        x_sum, y_sum = self.accumulate_sum_X(entropy), self.accumulate_sum_Y(update)
        x_dot_y = self.compare_sums(x_sum, y_sum)
        if self.config.conditional_variance == "alpha":
            y_mean = [y / update.n_prompts for y in y_sum.tensors]
            rows = self.compute_conditional_variance_over_E_alpha(entropy, y_mean) * update.n_prompts
        else:
            rows = self._projections("X", entropy, y_sum.tensors)
        columns = self._projections("Y", update, x_sum.tensors)
        return CrossKernelSums(x_dot_y, rows, columns, parameter_products(x_sum, y_sum))

    def compute_conditional_variance_over_E_alpha(  # noqa: N802 (E as in the theory)
        self, entropy: Rollouts, y_mean: Sequence[Tensor]
    ) -> Tensor:
        """s_n = X_n · Ȳ of every prompt of the entropy batch by the alpha trick.

        The conditional variance of X̄ · Ȳ given the update batch is var(s_n) / B_E (`two_batch_estimate`).

        Args:
            entropy: the entropy batch E, B_E prompts.
            y_mean: Ȳ, one tensor per registered parameter.

        Returns:
            [B_E] s_n, fp64 on the CPU.

        Raises:
            CheckpointingError: the model checkpoints in reentrant mode.
            GradientCoverageError: no parameter receives a gradient from L.
            GraphDetachedError: the model cannot be differentiated twice.
        """
        self._assert_grad_context("ProbeComponents.compute_conditional_variance_over_E_alpha")
        alpha_trick.refuse_reentrant_checkpointing(self.model)
        projections = []
        with self.probe_state(), alpha_trick.twice_differentiable_attention():
            for rows in self._iter_prompt_microbatches(entropy):
                forward = self._compute_aligned_batch_logprobs(entropy, rows)
                prompt = entropy.prompt_index[rows]
                found = alpha_trick.alpha_projections(
                    forward,
                    self._coefficients(forward, entropy, rows, "X"),
                    (prompt - prompt.min()).to(self.device),
                    self.registry.tensors,
                    y_mean,
                    strict=self.config.strict,
                )
                projections.append(found.projections)
                self.n_reached_by_alpha = found.n_with_gradient
                self.report("alpha", int(prompt.max()) + 1, entropy.n_prompts)
        return torch.cat(projections)

    def _kernel_sums(self, rollouts: Rollouts, units: list[list[int]]) -> KernelSums:
        """Aggregate passes, then the diagonal phase: X_u by one backward and Y_u by a second on a fresh graph."""
        x_sum, y_sum = self.accumulate_sum_X(rollouts), self.accumulate_sum_Y(rollouts)
        first, second = (self.sequences[label].sequence_logprobs for label in ("X", "Y"))
        self.check_repeatable(first, second, torch.arange(rollouts.n_sequences))
        x_dot_y = self.compare_sums(x_sum, y_sum)
        moments = self.preconditioner.second_moments(x_sum.tensors)
        dots = []  # per unit X_u · Y_u, X_u · Y_sum and Y_u · X_sum
        kept: list[tuple[list[Tensor], list[Tensor]]] = []
        for unit in units:
            x_unit, g_unit = (self._gradient_sum(label, rollouts, unit).tensors for label in ("X", "Y"))
            per_parameter = precondition_accumulate(
                x_unit,
                g_unit,
                moments.tensors,
                x_sum.tensors,
                y_sum.tensors,
                bias_correction=moments.bias_correction,
                eps=moments.eps,
                ratio=moments.ratio,
                update=False,
            )
            dots.append(per_parameter.cpu())
            if self.config.full_kernel:
                y_unit = self.preconditioner.apply_preconditioner(g_unit)
                kept.append(([x.cpu() for x in x_unit], [y.cpu() for y in y_unit]))
            self.report("diagonal", unit[-1] + 1, rollouts.n_prompts)
        diagonal, row_sums, column_sums = torch.stack([dot.sum(0) for dot in dots]).unbind(1)
        kernel = [[inner_product(x, y) for _, y in kept] for x, _ in kept]
        return KernelSums(
            x_dot_y=x_dot_y,
            diagonal=diagonal.contiguous(),
            row_sums=row_sums.contiguous(),
            column_sums=column_sums.contiguous(),
            unit_sizes=torch.tensor([len(unit) for unit in units]),
            kernel=torch.tensor(kernel, dtype=torch.float64) if kernel else None,
            by_parameter=parameter_products(x_sum, y_sum) - torch.stack(dots)[:, :, 0].sum(0),
        )

    def _projections(self, which: str, rollouts: Rollouts, direction: Sequence[Tensor]) -> Tensor:
        """[B] inner products of every prompt's X_n (or Y_n) with a direction, one backward a prompt."""
        products = []
        for prompt in range(rollouts.n_prompts):
            gradient = self._gradient_sum(which, rollouts, [prompt]).tensors
            if which == "Y":
                gradient = self.preconditioner.apply_preconditioner(gradient)
            products.append(inner_product(gradient, direction))
            self.report(f"{which} per prompt", prompt + 1, rollouts.n_prompts)
        return torch.tensor(products, dtype=torch.float64)

    def _gradient_sum(
        self, which: str, rollouts: Rollouts, prompts: Sequence[int], table: SequenceTable | None = None
    ) -> GradientSum:
        """Σ X_n or Σ g_n (raw) over the given prompts: a fresh forward and one backward per microbatch.

        With a ``table`` (the pass over the whole batch) every sequence's S_i, c_i and a_i are written into it.
        """
        on_cpu = self.config.accumulate_on == "cpu"
        total, done = GradientSum.zeros(self.registry.tensors, torch.device("cpu") if on_cpu else None), 0
        with self.probe_state():
            if which == "Y":
                # Every pass starts from the caller's random state. One draw more before Y, so that randomness nobody
                # switched off differs from that of X and `check_repeatable` sees it.
                torch.rand(1, device=self.device)
            for rows in self._iter_prompt_microbatches(rollouts, prompts):
                forward = self._compute_aligned_batch_logprobs(rollouts, rows)
                coefficients = self._coefficients(forward, rollouts, rows, which)
                scale = power_of_two_scale(coefficients.largest("XY".index(which)))
                loss = self._build_probe_loss(which, forward, coefficients) * scale
                if which == "Y" and self.config.y_pass == "autograd_grad":
                    total.add(self._y_gradients(loss, forward), scale)
                else:
                    total.add(gradients_by_backward(loss, self.registry), scale)
                if table is not None:
                    table.put(rows, forward.sequence_logprobs, coefficients)
                    done += len(torch.unique(rollouts.prompt_index[rows]))
                    self.report(which, done, rollouts.n_prompts)
        return total

    def check_repeatable(self, first: Tensor, second: Tensor, rows: Tensor) -> None:
        """Raise when two forwards of the same sequences gave different log-probs.

        Args:
            first: [n] S_i, nats.
            second: [n] S_i of the other forward.
            rows: [n] row indices, for the message.

        Raises:
            ModelStateError: they differ by more than kernels that are not deterministic explain.
        """
        difference = (first - second).abs()
        worst = int((difference / first.abs().clamp_min(1.0)).argmax())
        if float(difference[worst]) > REPEATABILITY * max(1.0, float(first[worst].abs())):
            raise ModelStateError(
                f"two forwards of sequence {int(rows[worst])} gave log-probs {float(first[worst]):.6g} and "
                f"{float(second[worst]):.6g} nats: something in the model is random although dropout modules are off.",
                fix="remove dropout or noise from hooks and custom forwards (a functional dropout that ignores training).",
            )

    def new_table(self, label: str, rollouts: Rollouts) -> SequenceTable:
        """An empty table of the sequences of pass ``label``, which the result will show."""
        self.sequences[label] = SequenceTable.of(rollouts)
        return self.sequences[label]

    def compare_sums(self, x_sum: GradientSum, y_sum: GradientSum) -> float:
        """X_sum · Y_sum, with the products of the first few parameters kept for the diagnostics."""
        coverage_guard.warn_if_coverage_differs(self.coverage["X"], self.coverage["Y"])
        products = per_parameter_products(x_sum.tensors, y_sum.tensors)
        self.leading_products = dict(zip(self.registry.names[:LEADING_PARAMETERS], products, strict=False))
        return sum(products)

    def _y_gradients(self, loss: Tensor, forward: ForwardResult) -> list[Tensor | None]:
        x = self.coverage.get("X")
        x_touched = None if x is None else [name not in x.untouched for name in self.registry.names]
        return gradients_by_autograd_grad(
            loss, forward.sequence_logprobs, self.registry, strict=self.config.strict, x_touched=x_touched
        )

    def _record_coverage(self, label: str, total: GradientSum, rollouts: Rollouts) -> None:
        found = PassCoverage(
            label=label,
            n_trainable=len(total.touched),
            n_with_gradient=sum(total.touched),
            numel_share=coverage_guard.numel_share(total.tensors, total.touched),
            norm=total.norm(),
            untouched=coverage_guard.untouched_names(self.registry.names, total.touched),
            mean_response_length=float(rollouts.response_lengths.to(torch.float64).mean()),
        )
        self.coverage[label] = found
        coverage_guard.require_gradients(found, strict=self.config.strict, cause=self._likely_cause())

    def _likely_cause(self) -> str:
        name = reentrant_checkpointing(self.model)
        if name is not None:
            return (
                f"'{name}' uses reentrant gradient checkpointing and its input does not require grad "
                "(call model.enable_input_require_grads())."
            )
        return "the trainable parameters are not used by this forward (an inactive or disabled adapter?)."

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Context of every forward: autocast with the configured dtype, or nothing."""
        if self.config.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.config.autocast_dtype)

    def report(self, stage: str, done: int, total: int) -> None:
        """Tell the caller how far a stage has come."""
        if self._on_progress is not None:
            self._on_progress(stage, done, total)
