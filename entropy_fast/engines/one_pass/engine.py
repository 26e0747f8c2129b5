"""The one-pass engine: X and Y of every unit from one forward and one backward of the batch.

Legend (docs/theory.md): S_i sequence log-prob, c_i and a_i coefficients, X_u = Σ c_i ∇S_i, g_u = Σ a_i ∇S_i, Y_u = P g_u,
K_uw = X_u · Y_w, E entropy batch, U update batch.

One backward of Σ_i S_i brings every sequence its own ∇S_i signal; the coefficients, which the forward has made known by
then, are applied where each parameter's signal arrives (`entropy_fast.capture`). Where they differ from token to
token (`token_coefficients`), X and g take a backward each. Parameters that are used in ways no captured module knows get
their gradients from two backwards a unit over the same graph, and are named in the result's notes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from entropy_fast.capture import Directions, SequenceProjections, UnitGradients
from entropy_fast.checks.grad_context import assert_grad_context
from entropy_fast.engines.gradient_sum import GradientSum, parameter_products
from entropy_fast.engines.one_pass.by_sequence import one_batch_parts, refuse_without_stack, two_batch_parts
from entropy_fast.engines.one_pass.capture_pass import CapturePass
from entropy_fast.engines.one_pass.gradient_stack import GradientStack, kernel_of
from entropy_fast.engines.one_pass.planner import CostModel, Plan
from entropy_fast.engines.one_pass.sweep import Found, MicrobatchLimit, SweepReport, prompt_tokens, sweep
from entropy_fast.estimates.kernel_sums import CrossKernelSums, KernelSums
from entropy_fast.ops import precondition_accumulate
from entropy_fast.probe_components import ProbeComponents
from entropy_fast.rollouts import Rollouts
from entropy_fast.rollouts.units import prompt_units

__all__ = ["OnePassEngine"]

Storage = Callable[[list[int]], Mapping[str, tuple[Tensor | None, Tensor | None]]]  # for the given units, zeroed


class OnePassEngine:
    """Kernel sums for the components of a probe, by capture.

    Args:
        components: model, geometry, options and guards.
    """

    name = "one_pass"

    def __init__(self, components: ProbeComponents) -> None:
        self._components = components
        self._capture = CapturePass(components)
        self._costs = CostModel.of(components.model, components.registry.module, components.device)
        self._limit = MicrobatchLimit.of(components.config, self._costs)
        self._reports: list[tuple[SweepReport, float]] = []  # and operations, of every sweep
        self._stored = 0
        self._backwards = 1  # of the sweep that takes most

    @property
    def note(self) -> str | None:
        """What the result should say about parameters on the slower path; None when there are none."""
        return self._capture.note

    @property
    def plan(self) -> Plan:
        """How the batches were gone through, what that cost, and why; after `kernel_sums` or `cross_sums`."""
        assert self._reports
        reports = [report for report, _ in self._reports]
        largest = max(report.largest for report in reports)
        return Plan(
            way=self._capture.way,
            captured=self._capture.captured,
            kernel_kept=self._stored > 0,
            microbatches=max(report.microbatches for report in reports),
            largest_microbatch=largest,
            sweeps=len(reports),
            backwards=self._backwards,
            prompt_forwards=self._capture.prompt_forwards,
            prompt_backwards=2 if self._capture.shares else 1,
            operations=sum(operations for _, operations in self._reports),
            stored_bytes=self._stored,
            activation_bytes=largest * self._costs.bytes_per_token,
            reasons=tuple(self._reasons(sum(report.halved for report in reports))),
        )

    def _reasons(self, halved: int) -> list[str]:
        config = self._components.config
        if config.prompts_per_microbatch is not None:
            reasons = [f"prompts_per_microbatch={config.prompts_per_microbatch} was asked for"]
        elif self._capture.packs:
            reasons = [
                f"products reach their full rate at about {self._costs.full_rate_tokens} tokens, more only takes memory"
            ]
        else:
            reasons = ["one prompt at a time, since padded rows are not packed"]
        if not self._stored:
            reasons.append("gradients of all units do not fit memory_budget")
        if config.by_sequence:
            reasons.append("by_sequence takes one more sweep a batch, of whole sequences")
        if halved:
            reasons.append(f"memory ran out {halved} time(s) and microbatches were halved")
        return reasons

    def kernel_sums(self, rollouts: Rollouts) -> KernelSums:
        """Kernel sums over the units of ``config``, with the whole kernel K where gradients of all units fit the budget.

        Raises:
            GradientCoverageError: no parameter received a gradient, or too much of it has no second moment.
            ModelStateError: two forwards of the same sequences differ.
            ProbeMemoryError: memory ran out with a single prompt.
            ConfigError: ``by_sequence`` was asked for, and gradients of all units do not fit the budget.
        """
        assert_grad_context("OnePassEngine.kernel_sums")
        components = self._components
        units = prompt_units(rollouts.n_prompts, components.config.blocks)
        if components.config.by_sequence:
            needed = GradientStack.bytes_of(components.registry.tensors, len(units), "XY")
            refuse_without_stack(needed, components.config.memory_bytes)
        sums, stack = self._sums_of(rollouts, units, "XY")
        x_sum = components.finish_sum_X(sums[0], rollouts)
        y_sum = components.finish_sum_Y(sums[1], rollouts)
        x_dot_y = components.compare_sums(x_sum, y_sum)
        products = parameter_products(x_sum, y_sum)
        sizes = torch.tensor([len(unit) for unit in units])
        if stack is not None:
            components.preconditioner.precondition_in_place(stack.update)
            kernel, diagonals = kernel_of(stack.entropy, stack.update)
            return KernelSums(
                x_dot_y,
                kernel.diagonal().clone(),
                kernel.sum(1),
                kernel.sum(0),
                sizes,
                kernel,
                products - diagonals,
                one_batch_parts(components, self._project, rollouts, units, x_sum, y_sum, stack)
                if components.config.by_sequence
                else None,
            )
        dots = torch.zeros(len(units), 3, dtype=torch.float64)
        diagonals = torch.zeros_like(products)

        def project(numbers: list[int], gradients: UnitGradients) -> None:
            for position, number in enumerate(numbers):
                own = self._dots(gradients, position, x_sum, y_sum)
                dots[number] = own.sum(0)
                diagonals.add_(own[:, 0])

        self._sweep(rollouts, units, project, labels="XY", stage="projections")
        diagonal, rows, columns = dots.unbind(1)
        return KernelSums(
            x_dot_y,
            diagonal.contiguous(),
            rows.contiguous(),
            columns.contiguous(),
            sizes,
            None,
            products - diagonals,
        )

    def cross_sums(self, entropy: Rollouts, update: Rollouts) -> CrossKernelSums:
        """Kernel sums between two batches: U first, then E with X_n · Y_sum in the same backward.

        Raises:
            GradientCoverageError, ModelStateError, ProbeMemoryError: as `kernel_sums`.
        """
        assert_grad_context("OnePassEngine.cross_sums")
        components = self._components
        update_units = prompt_units(update.n_prompts, None)
        sums, stack = self._sums_of(update, update_units, "Y")
        y_sum = components.finish_sum_Y(sums[1], update)
        x_total = self._empty_sum()
        rows = torch.zeros(entropy.n_prompts, dtype=torch.float64)

        def project_entropy(numbers: list[int], gradients: UnitGradients) -> None:
            for position, number in enumerate(numbers):
                rows[number] = self._dots(gradients, position, x_total, y_sum)[:, 1].sum()
            self._add(x_total, gradients.entropy)

        entropy_units = prompt_units(entropy.n_prompts, None)
        self._sweep(entropy, entropy_units, project_entropy, labels="X", tables="X", start_again=x_total.clear)
        x_sum = components.finish_sum_X(x_total, entropy)
        x_dot_y = components.compare_sums(x_sum, y_sum)
        products = parameter_products(x_sum, y_sum)
        columns = torch.zeros(update.n_prompts, dtype=torch.float64)
        if stack is not None:
            components.preconditioner.precondition_in_place(stack.update)
            columns = kernel_of([x.unsqueeze(0) for x in x_sum.tensors], stack.update)[0][0]
        else:

            def project_update(numbers: list[int], gradients: UnitGradients) -> None:
                for position, number in enumerate(numbers):
                    columns[number] = self._dots(gradients, position, x_sum, y_sum)[:, 2].sum()

            self._sweep(update, update_units, project_update, labels="Y", stage="projections")
        by_sequence = (
            two_batch_parts(components, self._project, entropy, update, x_sum, y_sum)
            if components.config.by_sequence
            else None
        )
        return CrossKernelSums(x_dot_y, rows, columns, products, by_sequence=by_sequence)

    def _empty_sum(self) -> GradientSum:
        on_cpu = self._components.config.accumulate_on == "cpu"
        return GradientSum.zeros(self._components.registry.tensors, torch.device("cpu") if on_cpu else None)

    def _add(self, total: GradientSum, gradients: Mapping[str, Tensor]) -> None:
        total.add([gradients[n].sum(0) if n in gradients else None for n in self._components.registry.names])

    def _sums_of(
        self, rollouts: Rollouts, units: list[list[int]], labels: str
    ) -> tuple[tuple[GradientSum, GradientSum], GradientStack | None]:
        """Raw X_sum and g_sum, and, where they fit the budget, X and g of every unit."""
        registry = self._components.registry
        sums = self._empty_sum(), self._empty_sum()
        if GradientStack.bytes_of(registry.tensors, len(units), labels) > self._components.config.memory_bytes:

            def collect(_: list[int], gradients: UnitGradients) -> None:
                for total, found in zip(sums, (gradients.entropy, gradients.update), strict=True):
                    self._add(total, found)

            def start_again() -> None:
                for total in sums:
                    total.clear()

            self._sweep(rollouts, units, collect, labels=labels, tables=labels, start_again=start_again)
            return sums, None
        on_cpu = self._components.config.accumulate_on == "cpu"
        stack = GradientStack(registry.names, registry.tensors, len(units), labels, on_cpu=on_cpu)
        self._stored = max(self._stored, GradientStack.bytes_of(registry.tensors, len(units), labels))
        self._sweep(
            rollouts,
            units,
            stack.collect,
            labels=labels,
            tables=labels,
            storage=stack.storage,
            start_again=stack.clear,
        )
        for total, stored in zip(sums, (stack.entropy, stack.update), strict=True):
            for index, tensor in enumerate(stored):
                if stack.touched[index]:
                    torch.sum(tensor, 0, out=total.tensors[index])
            if stored:
                total.touched[:] = stack.touched
        return sums, stack

    def _project(
        self, rollouts: Rollouts, units: list[list[int]], directions: Directions, labels: str, *, by_unit: bool
    ) -> Tensor:
        """``[N, K]`` every sequence's part in X or g, as the K ``labels`` say, projected; by one sweep of whole sequences."""
        device = self._components.device
        values = torch.zeros(rollouts.n_sequences, len(labels), dtype=torch.float64, device=device)

        def recorder(numbers: list[int]) -> SequenceProjections:
            return SequenceProjections(
                lambda name, place: directions(name, numbers[place]),
                rollouts.n_sequences,
                labels,
                device,
                by_unit=by_unit,
            )

        def collect(_: list[int], found: SequenceProjections) -> None:
            values.add_(found.values)

        self._record(
            rollouts,
            units,
            recorder,
            collect,
            labels=labels,
            stage="sequences",
            shared=False,
            start_again=values.zero_,
        )
        return values.cpu()

    def _sweep(
        self,
        rollouts: Rollouts,
        units: list[list[int]],
        visit: Callable[[list[int], UnitGradients], None],
        *,
        storage: Storage | None = None,
        **options: Any,
    ) -> None:
        registry = self._components.registry
        parameters = dict(zip(registry.names, registry.tensors, strict=True))

        def recorder(numbers: list[int]) -> UnitGradients:
            return UnitGradients(parameters, len(numbers), None if storage is None else storage(numbers))

        self._record(rollouts, units, recorder, visit, **options)

    def _record(
        self,
        rollouts: Rollouts,
        units: list[list[int]],
        recorder: Callable[[list[int]], Found],
        visit: Callable[[list[int], Found], None],
        *,
        labels: str,
        shared: bool = True,
        **options: Any,
    ) -> None:
        """One `sweep`, counted in the plan."""
        components, capture, costs = self._components, self._capture, self._costs
        options |= {"labels": labels, "shared": shared}
        report = sweep(components, capture, self._limit, rollouts, units, recorder, visit, **options)
        shared = shared and capture.shares
        tokens = sum(prompt_tokens(rollouts, shared=shared))
        scored = int(rollouts.response_lengths.sum())
        prefix = max(0, tokens - scored) if shared else 0
        forwards = min(capture.prompt_forwards, len(labels))
        self._backwards = max(self._backwards, capture.backwards(labels))
        operations = costs.operations(
            prefix,
            tokens - prefix,
            scored,
            len(labels),
            forwards,
            backwards=capture.backwards(labels),
            entropies=components.config.wants_token_entropies_for(labels),
        )
        self._reports.append((report, operations))

    def _dots(self, gradients: UnitGradients, position: int, x_sum: GradientSum, y_sum: GradientSum) -> Tensor:
        """``[parameters, 3]`` X_u · Y_u, X_u · Y_sum and Y_u · X_sum of one unit, fp64 on the CPU."""
        moments = self._components.preconditioner.second_moments(x_sum.tensors)
        chosen = [i for i, name in enumerate(self._components.registry.names) if name in gradients.entropy]
        names = [self._components.registry.names[i] for i in chosen]
        on = [x_sum.tensors[i].device for i in chosen]
        dots = torch.zeros(len(x_sum.tensors), 3, dtype=torch.float64)
        dots[chosen] = precondition_accumulate(
            [gradients.entropy[name][position].to(device) for name, device in zip(names, on, strict=True)],
            [gradients.update[name][position].to(device) for name, device in zip(names, on, strict=True)],
            [moments.tensors[i] for i in chosen],
            [x_sum.tensors[i] for i in chosen],
            [y_sum.tensors[i] for i in chosen],
            bias_correction=[moments.bias_correction[i] for i in chosen],
            eps=[moments.eps[i] for i in chosen],
            ratio=[moments.ratio[i] for i in chosen],
            update=False,
        ).cpu()
        return dots
