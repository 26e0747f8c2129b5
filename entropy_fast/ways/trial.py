"""Whether a model gives the same log-probs packed as it gives by itself, and what is wrong where it does not."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from entropy_fast.errors import ModelStateError
from entropy_fast.probe_components import ProbeComponents
from entropy_fast.rollouts import Rollouts
from entropy_fast.ways.packed.passes import PackedPass
from entropy_fast.ways.padded import align_logprobs, model_logits, pack_rows
from entropy_fast.ways.padded.output_layer import allowed_difference

__all__ = ["PlainLogprobs", "plain_logprobs", "refuse_interaction", "same_packed", "sees_a_window", "trial_rows"]

# What a model may raise that does not work on packed tokens.
_DOES_NOT_FIT = (AttributeError, TypeError, ValueError, IndexError, RuntimeError, KeyError)


# A prompt of at least so many tokens is tried, if there is one.
_PROMPT_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class PlainLogprobs:
    """Log-probs of a few rows.

    Attributes:
        values: of the scored tokens, row by row, nats.
        sequences: [k] their sums.
        dtype: of the logits.
    """

    values: Tensor
    sequences: Tensor
    dtype: torch.dtype

    def agrees_with(self, found: Tensor) -> bool:
        """Whether another way to the same log-probs is as near as their dtype lets it be."""
        if found.shape != self.values.shape:
            return False
        return bool(((found - self.values).abs() <= allowed_difference(self.dtype)).all())


def trial_rows(rollouts: Rollouts, *, longest: bool) -> Tensor:
    """[2 or 3] sequences to try with: the two shortest answers to a short prompt, which cost little, and the longest."""
    attended, answered = rollouts.attention_mask.sum(-1).cpu(), rollouts.response_lengths.cpu()
    asked = attended - answered
    # Of very few tokens the next one says little about how they were attended to.
    enough = asked >= min(_PROMPT_TOKENS, int(asked.max()))
    own = rollouts.rows_of_prompt(int(rollouts.prompt_index[int(asked.masked_fill(~enough, asked.max() + 1).argmin())]))
    chosen = own[answered[own].argsort(stable=True)[:2]].tolist()
    if longest:
        attended[chosen] = 0
        chosen.append(int(attended.argmax()))
    return torch.tensor(chosen)


def sees_a_window(config: object) -> bool:
    """Whether a model's attention looks back a limited number of tokens, in some layer."""
    kinds = getattr(config, "layer_types", None) or ()
    return getattr(config, "sliding_window", None) is not None or any(kind != "full_attention" for kind in kinds)


def plain_logprobs(
    components: ProbeComponents, rollouts: Rollouts, rows: Tensor, *, together: bool = True
) -> PlainLogprobs:
    """Log-probs of the given rows by the model's own logits, in one forward or each in its own."""
    found: list[Tensor] = []
    with torch.no_grad(), components.autocast():
        for part in [rows] if together else [row[None] for row in rows]:
            batch = pack_rows(rollouts, part, components.device)
            logits = model_logits(components.registry.module, batch)
            tokens = align_logprobs(logits, batch).token_logprobs
            found.extend(row[keep == 1] for row, keep in zip(tokens, batch.loss_mask[:, 1:], strict=True))
    return PlainLogprobs(torch.cat(found), torch.stack([values.sum() for values in found]), logits.dtype)


def same_packed(packed: PackedPass, rollouts: Rollouts, rows: Tensor, expected: PlainLogprobs) -> bool:
    """Whether packing works for this model.

    Args:
        packed: the pass to try.
        rollouts: the batch.
        rows: [k] to try with.
        expected: their log-probs.
    """
    try:
        return expected.agrees_with(packed.logprobs(rollouts, rows))
    except _DOES_NOT_FIT:
        return False


def refuse_interaction(components: ProbeComponents, rollouts: Rollouts) -> None:
    """Raise when log-probs are random, or depend on the other sequences of a batch.

    Raises:
        ModelStateError: they do; then a sequence has no gradient of its own.
    """
    rows = trial_rows(rollouts, longest=True)
    expected = plain_logprobs(components, rollouts, rows, together=False)
    # From another random state, so that randomness nobody switched off shows as a difference.
    torch.rand(1, device=components.device)
    again = plain_logprobs(components, rollouts, rows, together=False)
    components.check_repeatable(expected.sequences.double().cpu(), again.sequences.double().cpu(), rows)
    found = plain_logprobs(components, rollouts, rows).values
    if not expected.agrees_with(found):
        worst = float((found - expected.values).abs().max())
        raise ModelStateError(
            f"sequences interact: log-probs of rows {rows.tolist()} in one forward differ by up to {worst:.3g} nats from those "
            "of the same rows in forwards of their own.",
            fix="remove what mixes rows (batch statistics, expert capacity limits); engine='two_pass' differentiates the "
            "prompts of a microbatch together, as the model is.",
        )
