"""Any number per sequence as a functional: its expectation changes with the policy, and the same backward knows by how much.

Legend: F_i the number of sequence i (a reward, its length), G responses of its prompt, S_i its log-prob.

    c_i = (F_i - mean_{j≠i} F_j) / G,     E Σ_i c_i ∇S_i = ∇E[F]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from entropy_fast.columns.coefficients import ColumnWeights
from entropy_fast.columns.column import ColumnDefaults, ScoredTokens, Side
from entropy_fast.columns.lengths import check_group_sizes
from entropy_fast.columns.tokens import TokenPlaces
from entropy_fast.errors import RolloutsError
from entropy_fast.rollouts import Rollouts

__all__ = ["Functionals", "SequenceFunctional", "functionals_of", "leave_one_out", "usual_functionals"]

Functionals = Mapping[str, Tensor | Sequence[float]]  # [N] numbers by name

TAKEN = frozenset({"entropy", "update", "direct", "visitation", "total"})


def leave_one_out(values: Tensor, places: TokenPlaces) -> Tensor:
    """[n] (F_i - mean_{j≠i} F_j) / G of values [n], whole prompts, fp64, on their device."""
    member, size = (t.to(values.device) for t in (places.member, places.group_size))
    others = (member @ (member.T @ values) - values) / (size - 1)
    return (values - others) / size


@dataclasses.dataclass(frozen=True, eq=False)
class SequenceFunctional(ColumnDefaults):
    """A number per sequence.

    Args:
        name: what results call it.
        values: [N] F_i of every row of the batch, fp64 on the CPU.
    """

    name: str
    values: Tensor
    side: ClassVar[Side] = Side.FUNCTIONAL
    by_token: ClassVar[bool] = False
    needs_entropies: ClassVar[bool] = False

    def check(self, rollouts: Rollouts) -> None:
        """See `Column.check`: every prompt needs the two responses of the leave-one-out baseline."""
        check_group_sizes(rollouts, instead="give no functionals")

    def weigh(self, scored: ScoredTokens) -> ColumnWeights:
        """See `Column.weigh`."""
        own = self.values[scored.rows.cpu()].to(scored.sequence_logprobs.device)
        return ColumnWeights(leave_one_out(own, scored.places))


def usual_functionals(rollouts: Rollouts) -> dict[str, Tensor]:
    """Length, and reward where there is one: what is asked for of any batch.

    Nothing where a prompt has one response, or a truncated policy drew them, and their forecasts are refused.
    """
    kept = rollouts.without_empty_responses()[0]
    if rollouts.truncated_by:
        return {}
    if int(torch.bincount(kept.prompt_index, minlength=kept.n_prompts).min()) < 2:
        return {}
    found = {"length": rollouts.response_lengths.to(torch.float64)}
    return found if rollouts.rewards is None else {"reward": rollouts.rewards.double().cpu(), **found}


def functionals_of(given: Functionals, rollouts: Rollouts) -> tuple[SequenceFunctional, ...]:
    """Columns of numbers that are given for every row of a batch, for its rows that have response tokens.

    Args:
        given: [N] numbers by name.
        rollouts: the batch, empty responses included.

    Raises:
        RolloutsError: a name is no text or stands for something else, or numbers are not N finite ones.
    """
    kept = torch.ones(rollouts.n_sequences, dtype=torch.bool)
    kept[list(rollouts.without_empty_responses()[1].sequences)] = False
    found = []
    for name, numbers in given.items():
        if not isinstance(name, str) or not name or name in TAKEN:
            raise RolloutsError(
                f"functionals: {name!r} is no name for one.", fix=f"use a text, and none of {', '.join(sorted(TAKEN))}."
            )
        try:
            values = torch.as_tensor(numbers).detach().to(device="cpu", dtype=torch.float64, copy=True)
        except (TypeError, ValueError, RuntimeError) as error:
            raise RolloutsError(
                f"functionals: {name!r} cannot be made a tensor ({error}).", fix="pass one number per sequence."
            ) from error
        if values.shape != kept.shape or not bool(torch.isfinite(values).all()):
            raise RolloutsError(
                f"functionals: {name!r} has shape {list(values.shape)}"
                + (" and numbers that are not finite" if values.shape == kept.shape else "")
                + f"; expected [{len(kept)}] finite numbers, one per row of the rollouts whose entropy is forecast.",
                fix="pass one number per sequence, in the order of the rows.",
            )
        found.append(SequenceFunctional(name, values[kept]))
    return tuple(found)
