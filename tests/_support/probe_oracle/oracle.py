"""X_n, Y_n and K from their definitions: one unpadded sequence at a time, torch.autograd.grad of S_i, plain loops.

Legend: S_i sequence log-prob, w_i length weight, c_i and a_i coefficients, X_n entropy gradient of prompt n, g_n update
gradient, P Adam's preconditioner, Y_n = P g_n, K_nm = X_n · Y_m. Gradients are flat fp64 vectors over all trainable
parameters in model.parameters() order. Nothing here calls the package; `Rollouts` is read as plain fields.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from entropy_fast.rollouts import Rollouts


@dataclasses.dataclass(frozen=True)
class Sequence:
    """One row with a response: its group id, S_i, ∇S_i, L_i and A_i."""

    row: int
    group: int
    logprob: float
    gradient: Tensor
    length: int
    advantage: float


@dataclasses.dataclass(frozen=True)
class PromptGradients:
    """X_n and Y_n of every prompt, [B, D] each, and what they were made from.

    Attributes:
        x: [B, D] X_n.
        y: [B, D] Y_n.
        groups: group id of every prompt.
        entropy: row -> c_i.
        update: row -> a_i.
        logprobs: row -> S_i.
    """

    x: Tensor
    y: Tensor
    groups: list[int]
    entropy: dict[int, float]
    update: dict[int, float]
    logprobs: dict[int, float]

    @property
    def kernel(self) -> Tensor:
        """K [B, B], entry by entry."""
        return cross_kernel(self.x, self.y)


def cross_kernel(x: Tensor, y: Tensor) -> Tensor:
    return torch.tensor([[float((a * b).sum()) for b in y] for a in x], dtype=torch.float64)


def sequences_of(model: nn.Module, rollouts: Rollouts) -> list[Sequence]:
    """S_i and ∇S_i of every row that has a response, by a forward of that row alone without padding."""
    was_training = model.training
    model.eval()
    trainable = [p for p in model.parameters() if p.requires_grad]
    found = []
    for row in range(rollouts.input_ids.shape[0]):
        real = [t for t in range(rollouts.input_ids.shape[1]) if rollouts.attention_mask[row, t] == 1]
        tokens = [int(rollouts.input_ids[row, t]) for t in real]
        scored = [int(rollouts.loss_mask[row, t]) for t in real]
        if sum(scored) == 0:
            continue
        logits = model(
            input_ids=torch.tensor([tokens]),
            attention_mask=torch.ones(1, len(tokens), dtype=torch.int64),
            position_ids=torch.arange(len(tokens))[None],
        ).logits[0]
        terms = []
        for position in range(1, len(tokens)):
            if scored[position]:
                before = logits[position - 1]
                terms.append(before[tokens[position]] - torch.logsumexp(before, 0))
        total = torch.stack(terms).sum()
        gradients = torch.autograd.grad(total, trainable, allow_unused=True)
        pairs = zip(gradients, trainable, strict=True)
        flat = torch.cat([torch.zeros(p.numel()).double() if g is None else g.reshape(-1) for g, p in pairs])
        found.append(
            Sequence(
                row=row,
                group=int(rollouts.group_ids[row]),
                logprob=float(total.detach()),
                gradient=flat.detach().double(),
                length=sum(scored),
                advantage=float(rollouts.advantages[row]),  # type: ignore[index]
            )
        )
    model.train(was_training)
    return found


def preconditioner(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    """P per element, flat: (lr_group / lr_first) / (sqrt(v / (1 - beta2^step)) + eps) from optimizer.state itself.

    0 where there is no v, or v is 0.
    """
    first_rate = optimizer.param_groups[0]["lr"]
    pieces = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        scale = torch.zeros(parameter.shape, dtype=torch.float64)
        for group in optimizer.param_groups:
            state = optimizer.state.get(parameter)
            if not state or not any(parameter is held for held in group["params"]):
                continue
            moment = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
            corrected = moment.double() / (1 - group["betas"][1] ** float(state["step"]))
            scale = group["lr"] / first_rate / (corrected.sqrt() + group["eps"])
            scale[moment == 0] = 0.0
        pieces.append(scale.reshape(-1))
    return torch.cat(pieces)


def _length_weight(weighting: str, length: int, budget: int) -> float:
    return {"dr_grpo": 1 / budget, "per_token": 1 / length, "sequence": 1.0}[weighting]


def prompt_gradients(
    model: nn.Module, optimizer: torch.optim.Optimizer, rollouts: Rollouts, weighting: str
) -> PromptGradients:
    """X_n and Y_n of every prompt that has responses, in order of the first row that has one."""
    sequences = sequences_of(model, rollouts)
    scale = preconditioner(model, optimizer)
    appearance = list(dict.fromkeys(rollouts.group_ids.tolist()))  # budgets are listed in this order
    groups = list(dict.fromkeys(s.group for s in sequences))
    x, y = [], []
    entropy: dict[int, float] = {}
    update: dict[int, float] = {}
    for group in groups:
        members = [s for s in sequences if s.group == group]
        size = len(members)
        budget = max(s.length for s in members)
        if rollouts.max_lengths is not None:
            budget = int(rollouts.max_lengths[appearance.index(group)])  # type: ignore[index]
        x_n, g_n = torch.zeros_like(scale), torch.zeros_like(scale)
        for s in members:
            weight = _length_weight(weighting, s.length, budget)
            others = [_length_weight(weighting, o.length, budget) * o.logprob for o in members if o is not s]
            entropy[s.row] = -(weight * s.logprob - math.fsum(others) / len(others)) / size
            update[s.row] = s.advantage * weight / size
            x_n += entropy[s.row] * s.gradient
            g_n += update[s.row] * s.gradient
        x.append(x_n)
        y.append(scale * g_n)
    return PromptGradients(
        torch.stack(x), torch.stack(y), groups, entropy, update, {s.row: s.logprob for s in sequences}
    )


def flatten(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1).double() for t in tensors])


def relative_error(actual: object, expected: object) -> float:
    """max |actual - expected| / max |expected|; 1.0 where something is missing or not finite."""
    a = torch.as_tensor(actual, dtype=torch.float64).reshape(-1)
    e = torch.as_tensor(expected, dtype=torch.float64).reshape(-1)
    if a.shape != e.shape or not bool(torch.isfinite(a).all()) or not bool(torch.isfinite(e).all()):
        return 1.0
    scale = float(e.abs().max())
    return float((a - e).abs().max()) / (scale if scale > 0 else 1.0)
