"""Every response token's part in a prompt's product with a direction, from one forward with tangents.

Legend: s_t log-prob and H_t entropy of response token t, c_t and e_t its coefficients in a functional column, V a direction of
the parameters. The part is (c_t ∇s_t + e_t ∇H_t) · V; over the tokens of a prompt they add up to X_n · V.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from entropy_fast.columns import Coefficients, Columns, ScoredTokens, Side
from entropy_fast.context import ProbeContext
from entropy_fast.distributed.agreement import fingerprint
from entropy_fast.distributed.dealing import Share
from entropy_fast.engines.forward_mode.agreement import scaled_direction
from entropy_fast.engines.forward_mode.forward import ForwardWithTangents
from entropy_fast.resuming import Held, Tables
from entropy_fast.rollouts import Rollouts
from entropy_fast.ways.teacher_forcing import pad_rows

__all__ = ["TokenParts", "forward_of", "parts_by_unit", "token_parts"]


@dataclasses.dataclass(frozen=True)
class TokenParts:
    """Of n sequences with M response tokens, sequence by sequence.

    Attributes:
        scored: what the forward said of them.
        coefficients: theirs.
        logprobs: [M] ∇s_t · V, fp64.
        entropies: [M] ∇H_t · V, fp64; None where no column asks for entropies.
        parts: [M] of every column, fp64.
        places: [n, T] bool, where the tokens stand in the rollouts' own columns (CPU).
    """

    scored: ScoredTokens
    coefficients: Coefficients
    logprobs: Tensor
    entropies: Tensor | None
    parts: list[Tensor]
    places: Tensor

    def put(self, table: Tensor, values: Tensor) -> None:
        """Write values [M] into a table [N, T]."""
        rows = self.scored.rows
        table[rows] = table[rows].masked_scatter(self.places, values.cpu())


def forward_of(context: ProbeContext, rollouts: Rollouts) -> ForwardWithTangents:
    """Forwards with tangents of the probe's model, tried on a sequence of the batch."""
    first = pad_rows(rollouts, rollouts.rows_of_prompt(0)[:1], context.device)
    return ForwardWithTangents(
        context.registry.module, context.registry.tensors, context.autocast, first, context.estimate.policy_temperature
    )


def token_parts(
    context: ProbeContext,
    forward: ForwardWithTangents,
    columns: Columns,
    rollouts: Rollouts,
    rows: Tensor,
    direction: Sequence[Tensor],
    scale: float,
) -> TokenParts:
    """Of some rows, whole prompts.

    Args:
        context: of the probe, inside its ``probe_state``.
        forward: of its model.
        columns: functional ones.
        rollouts: the batch.
        rows: [n] indices into it.
        direction: V times ``scale``, one tensor a parameter.
        scale: what it is divided by again.

    Raises:
        ForwardDerivativeError: an operation of the model has no forward derivative.
    """
    context.registry.check("forward mode")
    batch = pad_rows(rollouts, rows, context.device)
    found = forward.run(batch, direction, want_entropies=columns.needs_entropies)
    scored = found.values.scored_tokens(rollouts, rows)
    coefficients = columns.weigh(scored)
    of_tokens = found.tokens[found.values.scored].double() / scale
    of_entropies = None if found.entropies is None else found.entropies[found.values.scored].double() / scale
    lengths = batch.loss_mask.sum(1)
    parts = [_parts(coefficients, place, lengths, of_tokens, of_entropies) for place in range(len(columns))]
    return TokenParts(scored, coefficients, of_tokens, of_entropies, parts, _places(rollouts, rows))


def parts_by_unit(
    context: ProbeContext,
    share: Share,
    direction: Callable[[int], list[Tensor]],
) -> list[Tensor]:
    """[N, T] of every functional column, where every unit has a direction of its own: a forward a unit.

    Args:
        context: of the probe.
        share: the units of a batch that this rank goes through.
        direction: V of a unit, by its place among these; tensors that may be scaled in place.

    Raises:
        ForwardDerivativeError: an operation of the model has no forward derivative.
    """
    columns, rollouts = context.columns.of_side(Side.FUNCTIONAL), share.rollouts
    share.team.enter("tokens")
    tables = [torch.zeros(rollouts.input_ids.shape, dtype=torch.float64) for _ in columns]
    kept = context.keeper.sweep(
        lambda: f"tokens: {fingerprint((rollouts, share.units, columns.members))}",
        Held({"tokens": Tables({str(place): table for place, table in enumerate(tables)})}),
    )
    done = sum(map(len, share.units[: kept.position]))
    if done:
        context.report("tokens", done, len(share.prompts))
    with context.probe_state():
        forward = forward_of(context, rollouts)
        for number, unit in kept.steps(enumerate(share.units)):
            along, scale = scaled_direction(direction(number), context.registry.tensors)
            rows = torch.cat([rollouts.rows_of_prompt(prompt) for prompt in unit])
            found = token_parts(context, forward, columns, rollouts, rows, along, scale)
            for table, own in zip(tables, found.parts, strict=True):
                found.put(table, own)
            done += len(unit)
            context.report("tokens", done, len(share.prompts))
    share.fill(tables)
    return tables


def _parts(
    coefficients: Coefficients, column: int, lengths: Tensor, of_tokens: Tensor, of_entropies: Tensor | None
) -> Tensor:
    if not coefficients.by_token(column):
        return coefficients.by_sequence[column].repeat_interleave(lengths) * of_tokens
    own, parts = coefficients.columns[column], torch.zeros_like(of_tokens)
    for weights, derivatives in ((own.of_logprob, of_tokens), (own.of_entropy, of_entropies)):
        if weights is not None:
            assert derivatives is not None
            parts = parts + weights * derivatives
    return parts


def _places(rollouts: Rollouts, rows: Tensor) -> Tensor:
    masks = (rollouts.loss_mask, rollouts.attention_mask)
    loss, attention = ((mask[rows.to(mask.device)] == 1).cpu() for mask in masks)
    return loss & attention
