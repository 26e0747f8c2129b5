"""The one-pass engine: X and Y of every unit from one forward and one backward of the batch.

Legend (docs/theory.md): S_i sequence log-prob, c_i and a_i coefficients, X_u = Σ c_i ∇S_i, g_u = Σ a_i ∇S_i, Y_u = P g_u,
K_uw = X_u · Y_w, E entropy batch, U update batch.

One backward of Σ_i S_i brings every sequence its own ∇S_i signal; the coefficients, which the forward has made known by then,
are applied where each parameter's signal arrives (`entropy_fast.engines.capture`). Parameters that are used in ways no captured
module knows get their gradients from two backwards a unit over the same graph, and are named in the result's notes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from entropy_fast.engines.capture import UnitGradients
from entropy_fast.engines.capture_pass import CapturePass
from entropy_fast.engines.gradient_sum import GradientSum
from entropy_fast.engines.kernel_sums import CrossKernelSums, KernelSums
from entropy_fast.engines.units import iter_microbatches, prompt_units
from entropy_fast.guards.grad_context import assert_grad_context
from entropy_fast.ops import precondition_accumulate
from entropy_fast.probe_components import ProbeComponents
from entropy_fast.rollouts import Rollouts

__all__ = ["OnePassEngine"]

Visit = Callable[[list[int], UnitGradients], None]  # unit numbers, and their gradients

_COLUMNS = 2**18  # of a stack of gradients, converted to fp64 at a time


class OnePassEngine:
    """Kernel sums for the components of a probe, by capture.

    Args:
        components: model, geometry, options and guards.
    """

    name = "one_pass"

    def __init__(self, components: ProbeComponents) -> None:
        self._components = components
        self._capture = CapturePass(components)

    @property
    def note(self) -> str | None:
        """What the result should say about parameters on the slower path; None when there are none."""
        return self._capture.note

    def plan(self, n_units: int) -> str:
        """How the batch was gone through, and what was kept, in words."""
        kept = "every unit's gradients kept" if self.fits(n_units) else "a second sweep for projections (memory_budget)"
        return f"{self._capture.plan}; {kept}"

    def kernel_sums(self, rollouts: Rollouts) -> KernelSums:
        """Kernel sums over the units of ``config``, with the whole kernel K where gradients of all units fit the budget.

        Raises:
            GradientCoverageError: no parameter received a gradient, or too much of it has no second moment.
            ModelStateError: two forwards of the same sequences differ.
        """
        assert_grad_context("OnePassEngine.kernel_sums")
        components = self._components
        units = prompt_units(rollouts.n_prompts, components.config.blocks)
        keep = self.fits(len(units))
        sums, stack = self._sums_of(rollouts, units, keep, "XY")
        x_sum = components.finish_sum_X(sums[0], rollouts)
        y_sum = components.finish_sum_Y(sums[1], rollouts)
        x_dot_y = components.compare_sums(x_sum, y_sum)
        sizes = torch.tensor([len(unit) for unit in units])
        if keep:
            kernel = self._kernel(stack[0], components.preconditioner.apply_preconditioner(stack[1]))
            return KernelSums(x_dot_y, kernel.diagonal().clone(), kernel.sum(1), kernel.sum(0), sizes, kernel)
        dots = torch.zeros(len(units), 3, dtype=torch.float64)

        def project(numbers: list[int], gradients: UnitGradients) -> None:
            for position, number in enumerate(numbers):
                dots[number] = self._dots(gradients, position, x_sum, y_sum)

        self._sweep(rollouts, units, project, stage="projections")
        diagonal, rows, columns = dots.unbind(1)
        return KernelSums(x_dot_y, diagonal.contiguous(), rows.contiguous(), columns.contiguous(), sizes)

    def cross_sums(self, entropy: Rollouts, update: Rollouts) -> CrossKernelSums:
        """Kernel sums between two batches: U first, then E with X_n · Y_sum in the same backward.

        Raises:
            GradientCoverageError, ModelStateError: as `kernel_sums`.
        """
        assert_grad_context("OnePassEngine.cross_sums")
        components = self._components
        update_units = prompt_units(update.n_prompts, None)
        keep = self.fits(len(update_units))
        sums, stack = self._sums_of(update, update_units, keep, "Y")
        y_sum = components.finish_sum_Y(sums[1], update)
        x_total = self._empty_sum()
        rows = torch.zeros(entropy.n_prompts, dtype=torch.float64)

        def project_entropy(numbers: list[int], gradients: UnitGradients) -> None:
            for position, number in enumerate(numbers):
                rows[number] = self._dots(gradients, position, x_total, y_sum)[1]
            self._add(x_total, gradients.entropy)

        entropy_units = prompt_units(entropy.n_prompts, None)
        self._sweep(entropy, entropy_units, project_entropy, labels="X", start_again=x_total.clear)
        x_sum = components.finish_sum_X(x_total, entropy)
        x_dot_y = components.compare_sums(x_sum, y_sum)
        columns = torch.zeros(update.n_prompts, dtype=torch.float64)
        if keep:
            y_stack = components.preconditioner.apply_preconditioner(stack[1])
            columns = self._kernel([x.unsqueeze(0) for x in x_sum.tensors], y_stack)[0]
        else:

            def project_update(numbers: list[int], gradients: UnitGradients) -> None:
                for position, number in enumerate(numbers):
                    columns[number] = self._dots(gradients, position, x_sum, y_sum)[2]

            self._sweep(update, update_units, project_update, stage="projections")
        return CrossKernelSums(x_dot_y, rows, columns)

    def fits(self, n_units: int) -> bool:
        """Whether every unit's gradients fit the memory budget."""
        registry = self._components.registry
        bytes_each = sum(p.numel() * max(4, p.element_size()) for p in registry.tensors)
        # X and g of every unit, and Y beside them.
        return 3 * n_units * bytes_each <= self._components.config.memory_budget

    def _empty_sum(self) -> GradientSum:
        on_cpu = self._components.config.accumulate_on == "cpu"
        return GradientSum.zeros(self._components.registry.tensors, torch.device("cpu") if on_cpu else None)

    def _add(self, total: GradientSum, gradients: dict[str, Tensor]) -> None:
        total.add([gradients[n].sum(0) if n in gradients else None for n in self._components.registry.names])

    def _sums_of(
        self, rollouts: Rollouts, units: list[list[int]], keep: bool, labels: str
    ) -> tuple[tuple[GradientSum, GradientSum], tuple[list[Tensor], list[Tensor]]]:
        """Raw X_sum and g_sum, and with ``keep`` the stacks ``[units, *shape]`` of X and g, in registry order."""
        sums = self._empty_sum(), self._empty_sum()
        stacks: tuple[list[Tensor], list[Tensor]] = ([], [])
        for label, stack, total in zip("XY", stacks, sums, strict=True):
            if keep and label in labels:
                stack.extend(t.new_zeros(len(units), *t.shape) for t in total.tensors)

        def collect(numbers: list[int], gradients: UnitGradients) -> None:
            for total, stack, found in zip(sums, stacks, (gradients.entropy, gradients.update), strict=True):
                self._add(total, found)
                for index, name in enumerate(self._components.registry.names if stack else ()):
                    if name in found:
                        stack[index][numbers[0] : numbers[-1] + 1] = found[name].to(stack[index].device)

        def start_again() -> None:
            for total, stack in zip(sums, stacks, strict=True):
                total.clear()
                for tensor in stack:
                    tensor.zero_()

        self._sweep(rollouts, units, collect, labels=labels, start_again=start_again)
        return sums, stacks

    def _sweep(
        self,
        rollouts: Rollouts,
        units: list[list[int]],
        visit: Visit,
        *,
        labels: str = "",
        stage: str | None = None,
        start_again: Callable[[], None] = lambda: None,
    ) -> None:
        """One forward and backward over the batch; ``visit`` sees the gradients of a few complete units at a time.

        ``labels`` are the passes (X, Y) whose tables of sequences are written.
        """
        components = self._components
        tables = {label: components.new_table(label, rollouts) for label in labels}
        parameters = dict(zip(components.registry.names, components.registry.tensors, strict=True))
        groups = _groups(units, components.config.prompts_per_microbatch)
        with components.probe_state():
            position = 0
            while position < len(groups):
                numbers = groups[position]
                gradients = UnitGradients(parameters, len(numbers))
                unit_of = {prompt: place for place, number in enumerate(numbers) for prompt in units[number]}
                prompts = [prompt for number in numbers for prompt in units[number]]
                refused: set[str] = set()
                for rows in iter_microbatches(rollouts, prompts, components.config.prompts_per_microbatch):
                    unit = [unit_of[int(prompt)] for prompt in rollouts.prompt_index[rows]]
                    refused = self._capture.run(rollouts, rows, unit, gradients, tables)
                    if refused:
                        break
                if refused:
                    # From the start: what was visited lacks these parameters.
                    self._capture.leave_out(refused)
                    start_again()
                    position = 0
                    continue
                if position == 0 and labels:
                    self._check_repeatable(rollouts, prompts, labels[0])
                visit(numbers, gradients)
                position += 1
                components.report(stage or labels, prompts[-1] + 1, rollouts.n_prompts)

    def _dots(self, gradients: UnitGradients, position: int, x_sum: GradientSum, y_sum: GradientSum) -> Tensor:
        """``[3]`` X_u · Y_u, X_u · Y_sum and Y_u · X_sum of one unit, fp64 on the CPU."""
        moments = self._components.preconditioner.second_moments(x_sum.tensors)
        chosen = [i for i, name in enumerate(self._components.registry.names) if name in gradients.entropy]
        names = [self._components.registry.names[i] for i in chosen]
        on = [x_sum.tensors[i].device for i in chosen]
        per_parameter = precondition_accumulate(
            [gradients.entropy[name][position].to(device) for name, device in zip(names, on, strict=True)],
            [gradients.update[name][position].to(device) for name, device in zip(names, on, strict=True)],
            [moments.tensors[i] for i in chosen],
            [x_sum.tensors[i] for i in chosen],
            [y_sum.tensors[i] for i in chosen],
            bias_correction=[moments.bias_correction[i] for i in chosen],
            eps=[moments.eps[i] for i in chosen],
            ratio=[moments.ratio[i] for i in chosen],
            update=False,
        )
        return per_parameter.sum(0).cpu()

    @staticmethod
    def _kernel(x_stack: Sequence[Tensor], y_stack: Sequence[Tensor]) -> Tensor:
        """``[units of x, units of y]`` inner products, in fp64."""
        kernel = torch.zeros(x_stack[0].shape[0], y_stack[0].shape[0], dtype=torch.float64)
        for x, y in zip(x_stack, y_stack, strict=True):
            left, right = (torch.split(stack.reshape(len(stack), -1), _COLUMNS, 1) for stack in (x, y))
            for a, b in zip(left, right, strict=True):
                kernel += (a.double() @ b.double().t()).cpu()
        return kernel

    def _check_repeatable(self, rollouts: Rollouts, prompts: list[int], label: str) -> None:
        """Raise when a second forward of the first microbatch, from another random state, gives other log-probs."""
        components = self._components
        torch.rand(1, device=components.device)
        rows = next(iter_microbatches(rollouts, prompts, components.config.prompts_per_microbatch))
        again = self._capture.logprobs_again(rollouts, rows)
        components.check_repeatable(components.sequences[label].sequence_logprobs[rows], again.double().cpu(), rows)


def _groups(units: list[list[int]], prompts: int) -> list[list[int]]:
    """Unit numbers in groups of about ``prompts`` prompts, at least one unit each."""
    groups: list[list[int]] = []
    held = 0
    for number, unit in enumerate(units):
        if groups and held + len(unit) <= prompts:
            groups[-1].append(number)
            held += len(unit)
        else:
            groups.append([number])
            held = len(unit)
    return groups
