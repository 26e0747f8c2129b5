"""The influence kernel where coefficients differ from token to token, by definition: loops over sequences and tokens.

Nothing of the package is used here. Legend: s_t log-prob and H_t entropy of a response token, w length weight.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from probe_models.batches import Sample
from probe_models.oracle import _preconditioner

OldLogprobs = Mapping[Sample, Sequence[float]]


@dataclasses.dataclass(frozen=True)
class TokenKernel:
    """K; X_n and g_n of every prompt, parameter by parameter; and every sequence's part in them, flat, with P.

    Attributes:
        of_sequences: for every sample its prompt's number, its part in X_n and P times its part in g_n, [D] each.
        scale: [D] P.
    """

    matrix: Tensor
    x_gradients: list[list[Tensor]]
    g_gradients: list[list[Tensor]]
    of_sequences: dict[Sample, tuple[int, Tensor, Tensor]]
    scale: Tensor

    def shares(self, learning_rate: float) -> dict[Sample, tuple[float, float]]:
        """Every sequence's share of δH₁ as entropy and as update: products with the other prompts' sums."""
        n = len(self.matrix)
        x, y = (
            torch.stack([sum(part[1 + which] for part in self.of_sequences.values() if part[0] == p) for p in range(n)])
            for which in range(2)
        )
        factor = learning_rate / (n * (n - 1))
        return {
            sample: (
                factor * float(own_x @ (y.sum(0) - y[p])),
                factor * float(own_y @ (x.sum(0) - x[p])),
            )
            for sample, (p, own_x, own_y) in self.of_sequences.items()
        }


def token_kernel_by_definition(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    samples: Sequence[Sample],
    *,
    rao_blackwell: bool,
    old: OldLogprobs | None = None,
    clip: tuple[float, float] | None = None,
    weighting: str = "dr_grpo",
    budget: int = 8,
) -> TokenKernel:
    """K_nm = X_n · P g_m with prompts in order of first appearance.

    Args:
        model: in a state without dropout.
        optimizer: Adam or AdamW that has stepped.
        samples: the batch.
        rao_blackwell: the entropy gradient's estimator; otherwise the score function's.
        old: log-probs under the policy that sampled; without them every ratio is 1.
        clip: of the ratios.
        weighting: w.
        budget: L_max.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    x, g = [], []
    scale = [_preconditioner(optimizer, p) for p in parameters]
    flat_scale = torch.cat([s.flatten() for s in scale])
    of_sequences = {}
    for number, group in enumerate(dict.fromkeys(s.group for s in samples)):
        members = [s for s in samples if s.group == group]
        weights = [
            {"dr_grpo": 1 / budget, "per_token": 1 / len(s.response), "sequence": 1.0}[weighting] for s in members
        ]
        scored = [_scored(model, s) for s in members]
        s = [[float(v) for v in values.detach()] for values, _ in scored]
        h = [[float(v) for v in entropies.detach()] for _, entropies in scored]
        parts = []
        for i, (sample, (logprobs, entropies)) in enumerate(zip(members, scored, strict=True)):
            entropy_loss = update_loss = logprobs.new_zeros(())
            others = [j for j in range(len(members)) if j != i]
            for t in range(len(sample.response)):
                if not rao_blackwell:
                    c = weights[i] * sum(s[i]) - _mean([weights[j] * sum(s[j]) for j in others])
                    entropy_loss = entropy_loss - c / len(members) * logprobs[t]
                    continue
                if weighting == "per_token":
                    c = weights[i] * sum(h[i]) - _mean([weights[j] * sum(h[j]) for j in others])
                else:
                    reached = [weights[j] * sum(h[j][t + 1 :]) for j in others if len(h[j]) > t]
                    c = weights[i] * sum(h[i][t + 1 :]) - _mean(reached)
                entropy_loss = entropy_loss + c / len(members) * logprobs[t] + weights[i] / len(members) * entropies[t]
            for t in range(len(sample.response)):
                factor = 1.0
                if old is not None:
                    ratio = math.exp(s[i][t] - old[sample][t])
                    above = clip is not None and ratio > 1 + clip[1] and sample.advantage > 0
                    below = clip is not None and ratio < 1 - clip[0] and sample.advantage < 0
                    factor = 0.0 if above or below else ratio
                update_loss = update_loss + factor * sample.advantage * weights[i] / len(members) * logprobs[t]
            own = _gradients(entropy_loss, parameters, keep=True), _gradients(update_loss, parameters, keep=False)
            parts.append(own)
            own_x, own_g = (torch.cat([t.flatten() for t in tensors]) for tensors in own)
            of_sequences[sample] = number, own_x, flat_scale * own_g
        for total, gradients in zip((x, g), zip(*parts, strict=True), strict=True):
            total.append([torch.stack(tensors).sum(0) for tensors in zip(*gradients, strict=True)])
    rows = [
        [sum(float((a * b * c).sum()) for a, b, c in zip(one, other, scale, strict=True)) for other in g] for one in x
    ]
    return TokenKernel(torch.tensor(rows, dtype=torch.float64), x, g, of_sequences, flat_scale)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _scored(model: nn.Module, sample: Sample) -> tuple[Tensor, Tensor]:
    """[L] s_t and H_t of one unpadded sequence, with their graph."""
    ids = torch.tensor([[*sample.prompt, *sample.response]])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    logprobs = logits[len(sample.prompt) - 1 : -1].log_softmax(-1)
    chosen = logprobs[torch.arange(len(sample.response)), torch.tensor(sample.response)]
    return chosen, -(logprobs.exp() * logprobs).sum(-1)


def _gradients(loss: Tensor, parameters: list[nn.Parameter], *, keep: bool) -> list[Tensor]:
    if not loss.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    taken = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=keep)
    return [torch.zeros_like(p) if t is None else t for t, p in zip(taken, parameters, strict=True)]


def draw_old_logprobs(samples: Sequence[Sample], seed: int = 1) -> dict[Sample, tuple[float, ...]]:
    """Log-probs of a policy that never was, around those of a model that knows little."""
    generator = torch.Generator().manual_seed(seed)
    return {
        sample: tuple((-torch.empty(len(sample.response)).uniform_(1.0, 7.0, generator=generator)).tolist())
        for sample in samples
    }
