"""Updates that are given rather than described: coefficients by sequence or token, or the loss itself.

Legend: L the loss of the batch, s_t log-prob and H_t entropy of response token t, B prompts with responses. Coefficients are

    a_t = -∂L/∂s_t,      e_t = -∂L/∂H_t

and Σ_t (a_t ∇s_t + e_t ∇H_t) = -∇L, the update's gradient. It is that of the whole batch, whose prompts' gradients are averaged
elsewhere; so a prompt's coefficients are B times these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from entropy_fast.columns.coefficients import ColumnWeights
from entropy_fast.columns.column import Column, ColumnDefaults, ScoredTokens, Side
from entropy_fast.columns.scores import TokenScores, weigh_whole
from entropy_fast.errors import ConfigError
from entropy_fast.rollouts import Rollouts

__all__ = ["GivenUpdate", "LossFunction", "LossUpdate", "coefficients_of_loss", "given_update"]

LossFunction = Callable[[Tensor, Tensor], Tensor]  # log-probs and entropies [N, T] to a scalar


@dataclasses.dataclass(frozen=True, eq=False)
class GivenUpdate(ColumnDefaults):
    """Coefficients as they are.

    Args:
        of_logprob: [N] or [N, T] a, fp64 on the CPU, of the rows and columns of the batch.
        of_entropy: [N, T] e, likewise; None for none.
        name: what results call it.
    """

    of_logprob: Tensor
    of_entropy: Tensor | None = None
    name: str = "update"
    side: ClassVar[Side] = Side.UPDATE

    @property
    def by_token(self) -> bool:
        """See `Column.by_token`."""
        return self.of_logprob.dim() == 2 or self.of_entropy is not None

    @property
    def needs_entropies(self) -> bool:
        """See `Column.needs_entropies`."""
        return self.of_entropy is not None

    def check(self, rollouts: Rollouts) -> None:
        """See `Column.check`: shapes were checked when it was made."""

    def weigh(self, scored: ScoredTokens) -> ColumnWeights:
        """See `Column.weigh`."""
        device, places, prompts = scored.logprobs.device, scored.places, scored.rollouts.n_prompts
        a = self.of_logprob[scored.rows] * prompts
        if not self.by_token:
            return ColumnWeights(a.to(scored.sequence_logprobs.device))
        mask = scored.rollouts.loss_mask.cpu()[scored.rows] == 1
        a = a[mask] if a.dim() == 2 else a[places.sequence]
        e = None if self.of_entropy is None else (self.of_entropy[scored.rows] * prompts)[mask].to(device)
        return ColumnWeights(places.means(a).to(device), a.to(device), e)


@dataclasses.dataclass(frozen=True, eq=False)
class LossUpdate(ColumnDefaults):
    """The loss that is minimised: its coefficients once log-probs and entropies of the batch are known.

    Args:
        loss: of log-probs and entropies [N, T] of all rows that were given, empty responses included.
        kept: [N'] rows of those that the batch has.
        shape: N and T.
        name: what results call it.
    """

    loss: LossFunction
    kept: Tensor
    shape: tuple[int, int]
    name: str = "update"
    side: ClassVar[Side] = Side.UPDATE
    by_token: ClassVar[bool] = True
    needs_entropies: ClassVar[bool] = True
    _known: list[tuple[TokenScores, GivenUpdate]] = dataclasses.field(default_factory=list, repr=False)

    def check(self, rollouts: Rollouts) -> None:
        """See `Column.check`: it can always be formed."""

    def resolved(self, scores: TokenScores, rollouts: Rollouts) -> Column:
        """See `ResolvedColumn.resolved`.

        Raises:
            ConfigError: see `coefficients_of_loss`.
        """
        # Once for the same scores, however many updates are made of it: a loss may count its calls, or draw.
        for known, column in self._known:
            if torch.equal(known.logprobs, scores.logprobs) and torch.equal(known.entropies, scores.entropies):
                return column
        column = self._column(scores, rollouts)
        self._known[:] = [(scores, column)]
        return column

    def _column(self, scores: TokenScores, rollouts: Rollouts) -> GivenUpdate:
        a, e = coefficients_of_loss(self.loss, scores, self.kept, self.shape, rollouts)
        if bool((e != 0).any()):
            return GivenUpdate(a, e, self.name)
        return GivenUpdate(_by_sequence(a, rollouts.loss_mask.cpu() == 1), None, self.name)

    def weigh(self, scored: ScoredTokens) -> ColumnWeights:
        """See `ResolvedColumn`."""
        return weigh_whole(self, scored)


def coefficients_of_loss(
    loss: LossFunction, scores: TokenScores, kept: Tensor, shape: tuple[int, int], rollouts: Rollouts
) -> tuple[Tensor, Tensor]:
    """[N', T] a and e of the batch's rows, fp64 on the CPU.

    Args:
        loss: of log-probs and entropies [N, T].
        scores: of the batch's N' rows.
        kept: [N'] which of the N rows those are; the others, empty responses, are 0.
        shape: N and T.
        rollouts: the batch.

    Raises:
        ConfigError: the loss is no scalar of its arguments, not finite, or weighs tokens that are no response tokens.
    """
    leaves = [
        torch.zeros(shape, dtype=t.dtype, device=t.device).index_copy(0, kept.to(t.device), t).requires_grad_()
        for t in (scores.logprobs, scores.entropies)
    ]
    with torch.enable_grad():
        value = loss(leaves[0], leaves[1])
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        kind = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        graph = " without a graph" if isinstance(value, Tensor) and not value.requires_grad else ""
        raise ConfigError(
            f"update: the loss function returned {kind}{graph}; expected a scalar computed from its arguments, the log-probs "
            "and entropies.",
            fix="return what is minimised, as a torch expression of both (or one) of them, without detach, item or no_grad.",
        )
    # One that a loss does not use has no gradient, which is 0 here and nothing unknown.
    found = torch.autograd.grad(value.reshape(()), leaves, allow_unused=True)
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[kept] = rollouts.loss_mask.cpu() == 1
    tables = []
    for gradient, what in zip(found, ("log-probs", "entropies"), strict=True):
        table = torch.zeros(shape, dtype=torch.float64) if gradient is None else -gradient.detach().double().cpu()
        if not bool(torch.isfinite(table).all()) or not bool(torch.isfinite(value.detach()).all()):
            raise ConfigError(
                f"update: the loss is {float(value.detach()):.6g}, and {int((~torch.isfinite(table)).sum())} of its "
                f"derivatives by {what} are not finite.",
                fix="look for a division by a mask's sum that is 0, a log of 0, or rows without response tokens.",
            )
        outside = int(((table != 0) & ~mask).sum())
        if outside:
            raise ConfigError(
                f"update: the loss weighs {outside} {what} where no response token stands (they are 0 there).",
                fix="multiply by the loss mask before summing, and divide by its sum.",
            )
        tables.append(table[kept])
    return tables[0], tables[1]


def given_update(given: object, rollouts: Rollouts, name: str = "update") -> GivenUpdate | LossUpdate:
    """A column of what a caller gave for an update.

    Args:
        given: a loss function; or coefficients [N] or [N, T] of log-probs; or a pair of those and coefficients [N, T] of
            entropies.
        rollouts: the update batch as it was given, empty responses included.
        name: what results call it.

    Raises:
        ConfigError: it is none of these.
    """
    kept = torch.tensor([row for row, length in enumerate(rollouts.response_lengths.tolist()) if length])
    shape = (int(rollouts.loss_mask.shape[0]), int(rollouts.loss_mask.shape[1]))
    if callable(given) and not isinstance(given, Tensor):
        return LossUpdate(given, kept, shape, name)
    first, second = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    mask = rollouts.loss_mask.cpu() == 1
    of_logprob = _coefficients(first, mask, name, by_sequence=True)
    of_entropy = None if second is None else _coefficients(second, mask, name, by_sequence=False)
    if of_entropy is None and of_logprob.dim() == 2:
        return GivenUpdate(_by_sequence(of_logprob[kept], mask[kept]), None, name)
    return GivenUpdate(of_logprob[kept], None if of_entropy is None else of_entropy[kept], name)


def _by_sequence(table: Tensor, mask: Tensor) -> Tensor:
    """[N] coefficients where all tokens of every response weigh alike, as they do before the policy has moved; else [N, T].

    By sequence they take no backward of their own.
    """
    most, least = (torch.where(mask, own, -torch.inf).amax(1) for own in (table, -table))
    return most if torch.equal(most, -least) else table


def _coefficients(given: object, mask: Tensor, name: str, *, by_sequence: bool) -> Tensor:
    shapes = f"{[len(mask)]} or {list(mask.shape)}" if by_sequence else str(list(mask.shape))
    fix = "pass -∂L/∂(log-prob) of every row, [N], or of every token in its own column, [N, T]; or the loss as a function."
    try:
        table = torch.as_tensor(given).detach().to(device="cpu", dtype=torch.float64, copy=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{name}: a {type(given).__name__} is neither a loss function nor coefficients ({error}).", fix=fix
        ) from error
    if table.shape != mask.shape and not (by_sequence and table.shape == mask.shape[:1]):
        raise ConfigError(f"{name}: coefficients have shape {list(table.shape)}; expected {shapes}.", fix=fix)
    table = torch.where(mask, table, 0.0) if table.dim() == 2 else table
    if not bool(torch.isfinite(table).all()):
        raise ConfigError(f"{name}: coefficients of response tokens are not finite.", fix=fix)
    return table
