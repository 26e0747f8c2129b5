"""Gradients of any coefficients by token from their definition: one unpadded sequence at a time, plain autograd.

Legend: s_t log-prob of response token t and H_t the entropy of the distribution it was drawn from, under softmax(logits/T);
a_t and e_t coefficients; g_n = Σ_{i in n} Σ_t (a_t ∇s_t + e_t ∇H_t) of prompt n.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from entropy_fast.rollouts import Rollouts


def token_values(model: nn.Module, rollouts: Rollouts, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """[N, T] s_t and H_t in the rollouts' columns with their graph; 0 where no response token stands."""
    was_training = model.training
    model.eval()
    tables = [torch.zeros(rollouts.input_ids.shape, dtype=torch.float64) for _ in range(2)]
    for row in range(rollouts.input_ids.shape[0]):
        real = [t for t in range(rollouts.input_ids.shape[1]) if rollouts.attention_mask[row, t] == 1]
        ids = torch.tensor([[int(rollouts.input_ids[row, t]) for t in real]])
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(len(real))[None])
        log_p = torch.log_softmax(output.logits[0].double() / temperature, -1)
        for place, column in enumerate(real):
            if place and rollouts.loss_mask[row, column] == 1:
                before = log_p[place - 1]
                here = (torch.tensor([row]), torch.tensor([column]))
                tables[0] = tables[0].index_put(here, before[ids[0, place]][None])
                tables[1] = tables[1].index_put(here, -(before.exp() * before).sum()[None])
    model.train(was_training)
    return tables[0], tables[1]


def flat_gradient(total: Tensor, model: nn.Module) -> Tensor:
    """[D] over all trainable parameters in order; 0 where one is not reached."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(total, parameters, allow_unused=True, retain_graph=True)
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1).double() for g, p in pairs])


def groups_of(rollouts: Rollouts) -> list[list[int]]:
    """Rows that have responses, by prompt in order of the first such row."""
    found: dict[int, list[int]] = {}
    for row, group in enumerate(rollouts.group_ids.tolist()):
        if int(rollouts.loss_mask[row].sum()):
            found.setdefault(group, []).append(row)
    return list(found.values())


def prompt_gradients_of(
    model: nn.Module, rollouts: Rollouts, a: Tensor | None, e: Tensor | None, temperature: float = 1.0
) -> Tensor:
    """[B, D] g_n for coefficients [N, T]."""
    s, h = token_values(model, rollouts, temperature)
    rows = []
    for members in groups_of(rollouts):
        total = torch.zeros((), dtype=torch.float64)
        for values, weights in ((s, a), (h, e)):
            if weights is not None:
                total = total + (values[members] * weights[members]).sum()
        rows.append(flat_gradient(total, model))
    return torch.stack(rows)
