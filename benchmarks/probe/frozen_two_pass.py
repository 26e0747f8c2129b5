"""The yardstick: the two-pass algorithm as it is written in eager torch, frozen, with nothing of the package in it.

Legend (docs/theory.md): S sequence log-probs, c and a coefficients, X_n = Σ c ∇S and g_n = Σ a ∇S over the responses of
prompt n, Y_n = P g_n, K_nm = X_n · Y_m.

Whole padded sequences, logits at all positions in float32, log_softmax and gather; a pass for X_sum and one for Y_sum, four
prompts at a time; then X_n and Y_n again prompt by prompt. What is measured against it stays comparable as long as nobody
improves it.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.probe.padded import Padded
from benchmarks.probe.sums import Sums

PROMPTS_AT_A_TIME = 4


def adam_scales(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Adam's 1 / (sqrt(v̂) + ε) of every parameter, 0 where v is 0."""
    scales = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            root = (state["exp_avg_sq"] / (1 - math.pow(group["betas"][1], float(state["step"])))).sqrt()
            scales.append(torch.where(root > 0, 1 / (root + group["eps"]), 0.0))
    return scales


def _sequence_logprobs(model: nn.Module, batch: Padded, autocast: AbstractContextManager[object]) -> Tensor:
    prompts, responses, columns = batch.ids.shape
    ids = batch.ids.reshape(-1, columns)
    with autocast:
        logits = model(
            input_ids=ids,
            attention_mask=batch.attention.reshape(-1, columns),
            position_ids=batch.positions.reshape(-1, columns),
            use_cache=False,
        ).logits.float()
    logprobs = F.log_softmax(logits, dim=-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (logprobs[:, batch.prompt_width - 1 :].reshape(prompts, responses, -1) * batch.scored).sum(-1)


def _dot(left: list[Tensor], right: list[Tensor]) -> float:
    return sum(float((a * b).sum()) for a, b in zip(left, right, strict=True))


def frozen_two_pass(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Padded, autocast: AbstractContextManager[object]
) -> Sums:
    """Four forwards and backwards of the batch. Gradients of the model are overwritten."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    scales = adam_scales(optimizer)

    def gradient(part: Padded, which: str) -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        S = _sequence_logprobs(model, part, autocast)
        c, a = part.coefficients(S)
        torch.autograd.backward(((c if which == "X" else a) * S).sum())
        gradients = [p.grad for p in parameters]
        assert all(g is not None for g in gradients)
        return [g * s for g, s in zip(gradients, scales, strict=True)] if which == "Y" else gradients

    def total(which: str) -> list[Tensor]:
        sums = [torch.zeros_like(p) for p in parameters]
        for part in batch.microbatches(PROMPTS_AT_A_TIME):
            for held, new in zip(sums, gradient(part, which), strict=True):
                held += new
        return sums

    X_sum, Y_sum = total("X"), total("Y")
    per_prompt = []
    for part in batch.microbatches(1):
        X, Y = gradient(part, "X"), gradient(part, "Y")
        per_prompt.append((_dot(X, Y), _dot(X, Y_sum), _dot(Y, X_sum)))
    model.zero_grad(set_to_none=True)
    diagonal, rows, columns = torch.tensor(per_prompt, dtype=torch.float64).unbind(1)
    return Sums(_dot(X_sum, Y_sum), diagonal, rows, columns)
