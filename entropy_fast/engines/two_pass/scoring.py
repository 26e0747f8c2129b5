"""Log-probs and entropies of a batch by the model's own padded forwards."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from entropy_fast.columns import TokenScores
from entropy_fast.context import ProbeContext
from entropy_fast.distributed.dealing import Share
from entropy_fast.engines.two_pass.kept import kept_steps
from entropy_fast.resuming import Tables
from entropy_fast.ways.teacher_forcing import align_logprobs, model_logits, pad_rows

__all__ = ["padded_scores"]


def padded_scores(context: ProbeContext, share: Share, microbatches: Iterable[Tensor]) -> TokenScores:
    """Of every response token, by forwards without a graph.

    Args:
        context: of the probe.
        share: the prompts of this rank.
        microbatches: their rows, in successive forwards.

    Raises:
        GraphDetachedError, RolloutsError: a log-prob is not finite.
    """
    rollouts, temperature = share.rollouts, context.estimate.policy_temperature
    scores = TokenScores.empty(rollouts)
    share.team.enter("scores")
    asked = rollouts, context.columns, share.prompts
    with context.probe_state():
        for rows in kept_steps(context, "scores", asked, {"scores": Tables(vars(scores))}, microbatches):
            batch = pad_rows(rollouts, rows, context.device)
            with torch.no_grad(), context.autocast():
                logits = model_logits(context.registry.module, batch)
            forward = align_logprobs(logits, batch, want_entropies=True, temperature=temperature)
            scores.put(forward.scored_tokens(rollouts, rows))
            context.report("scores", int(rollouts.prompt_index[rows].max()) + 1, rollouts.n_prompts)
    share.fill([scores.logprobs, scores.entropies])
    return scores
