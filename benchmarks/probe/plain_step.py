"""The unit of cost: the forward and backward of the update itself, as a good trainer does them."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from benchmarks.probe.padded import Padded

PROMPTS_AT_A_TIME = 4


def selected_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """[n, R] log-probs of ``targets`` [n, R] under ``logits`` [n, R, V], a sequence at a time.

    In float32 the gathered logit minus logsumexp, which keeps no second tensor of the logits' size for backward. In half
    precision that difference would lose most of its digits, so log_softmax is taken, as trainers do.
    """
    rows = []
    for row, target in zip(logits, targets, strict=True):
        if row.dtype == torch.float32:
            rows.append(row.gather(-1, target[:, None]).squeeze(-1) - torch.logsumexp(row, -1))
        else:
            rows.append(torch.log_softmax(row, -1).gather(-1, target[:, None]).squeeze(-1).float())
    return torch.stack(rows)


def sequence_logprobs(model: nn.Module, batch: Padded, autocast: AbstractContextManager[object]) -> Tensor:
    """[B, G] S, from logits at the response positions alone."""
    prompts, responses, columns = batch.ids.shape
    ids = batch.ids.reshape(-1, columns)
    with autocast:
        logits = model(
            input_ids=ids,
            attention_mask=batch.attention.reshape(-1, columns),
            position_ids=batch.positions.reshape(-1, columns),
            use_cache=False,
            logits_to_keep=batch.scored.shape[-1] + 1,
        ).logits[:, :-1]
    logprobs = selected_logprobs(logits, ids[:, batch.prompt_width :])
    return (logprobs.reshape(prompts, responses, -1) * batch.scored).sum(-1)


def plain_step(model: nn.Module, batch: Padded, autocast: AbstractContextManager[object]) -> Tensor:
    """Gradients of -Σ a S, accumulated over microbatches and left in ``.grad``.

    Returns:
        [B, G] S.
    """
    model.zero_grad(set_to_none=True)
    found = []
    for part in batch.microbatches(PROMPTS_AT_A_TIME):
        S = sequence_logprobs(model, part, autocast)
        torch.autograd.backward(-(part.coefficients(S)[1] * S).sum())
        found.append(S.detach())
    return torch.cat(found)
