"""Whether the policy that a trainer scores responses with is the model's own, where dropout hides it.

Without dropout what the training forward said of every token is compared at every forecast. With it no two forwards agree, so
one padded response is scored once more by the trainer, without dropout.

Legend: s_t log-prob of response token t.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from entropy_fast.checks.model_state import probe_state
from entropy_fast.config import EstimateOptions, RunOptions
from entropy_fast.engines.resolving import SCORES_MAY_MISS, SCORES_MAY_MISS_IN_16_BITS
from entropy_fast.errors import RolloutsError
from entropy_fast.integrations.trl.hooks import MicroBatch
from entropy_fast.rollouts import Rollouts
from entropy_fast.truth import scored

__all__ = ["check_same_policy"]


def check_same_policy(
    trainer: Any, batches: Sequence[MicroBatch], rollouts: Rollouts, *, estimate: EstimateOptions, run: RunOptions
) -> bool:
    """Compare the trainer's s_t with the model's, of the response whose prompt has the most padding beside it.

    Nothing of the model changes, and no random number is drawn from the training's.

    Args:
        trainer: whose ``_get_per_token_logps_and_entropies`` says what s_t are.
        batches: of the window.
        rollouts: their rows.
        estimate: of the forecast, for the policy's temperature.
        run: likewise.

    Returns:
        Whether it has padding at all, so that the comparison tells.

    Raises:
        RolloutsError: they differ.
        ModelStateError, OptimizerStateError, ConfigError: see `entropy_fast.truth.scored`.
    """
    padding = torch.cat([(b.inputs["prompt_mask"] == 0).sum(1).cpu() for b in batches])
    padding[rollouts.response_lengths.cpu() == 0] = -1
    place = int(padding.argmax())
    if padding[place] < 0:
        return False
    row, batch = place, 0
    while row >= len(batches[batch].inputs["prompt_ids"]):
        row -= len(batches[batch].inputs["prompt_ids"])
        batch += 1
    inputs = batches[batch].inputs
    width = inputs["completion_ids"].shape[1]
    ids, mask = (
        torch.cat([inputs[f"prompt_{what}"][row], inputs[f"completion_{what}"][row]])[None] for what in ("ids", "mask")
    )
    with probe_state(trainer.model), torch.no_grad():
        theirs = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width)[0][0].double().cpu()
    only = rollouts.select_rows(torch.tensor([place]))
    own = scored(trainer.model, trainer.optimizer, only, estimate=estimate, run=run).scores.logprobs[0]
    counted = only.loss_mask[0].cpu() == 1
    first = rollouts.input_ids.shape[1] - max(b.inputs["completion_ids"].shape[1] for b in batches)
    gap = float((theirs[counted[first : first + width]] - own.double().cpu()[counted]).abs().mean())
    if not gap <= (SCORES_MAY_MISS if run.autocast_dtype is None else SCORES_MAY_MISS_IN_16_BITS):
        raise RolloutsError(
            f"without dropout the trainer's log-probs of row {place} are {gap:.3g} nats a token away from the model's.",
            fix="look at what the trainer's forward does beside the model's; with learned positions and padding on the left, "
            "have it pass position_ids, or use prompts of one length.",
        )
    return bool(padding[place] > 0)
