"""Inputs for linear_token_logprobs, and the rule by which a result of it is judged."""

from __future__ import annotations

import dataclasses

import torch
from logprob_cases import IGNORE, accumulator
from torch import Tensor

from entropy_fast import reference
from entropy_fast.reference import LinearTokenLogprobs


@dataclasses.dataclass(frozen=True)
class LinearCase:
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    softcap: float | None

    def to(self, dtype: torch.dtype) -> LinearCase:
        bias = None if self.bias is None else self.bias.to(dtype)
        return dataclasses.replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=bias)

    def arguments(self) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, object]]:
        return (self.hidden, self.weight, self.targets), {"bias": self.bias, "softcap": self.softcap}


def make_linear_case(
    rows: int,
    hidden_size: int,
    vocabulary: int,
    dtype: torch.dtype,
    *,
    bias: bool = False,
    softcap: float | None = None,
    scale: float = 2.0,
    masked: float = 0.2,
    seed: int = 0,
) -> LinearCase:
    """Random hidden states and weights whose logits have a standard deviation of ``scale``."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < masked] = IGNORE
    weight = random(vocabulary, hidden_size) * scale / hidden_size**0.5
    return LinearCase(random(rows, hidden_size), weight, targets, random(vocabulary) if bias else None, softcap).to(
        dtype
    )


def certain_case(dtype: torch.dtype, vocabulary: int = 3000) -> LinearCase:
    """Rows whose logits peak by 0 to 60 nats: at the target, at another token, at two; and a flat one."""
    case = make_linear_case(16, 24, vocabulary, torch.float64, masked=0, scale=1.0)
    hidden, weight = case.hidden.clone(), case.weight.clone()
    hidden[:, :4] = 0
    weight[:, :4] = 0
    at = torch.tensor([5, vocabulary // 2, vocabulary - 1])
    weight[at, torch.arange(3)] = 1.0
    targets = at[torch.arange(16) % 3].clone()
    heights = torch.tensor([2.0, 10.0, 17.0, 25.0, 60.0], dtype=torch.float64)
    for row in range(10):
        hidden[row, row % 3] = heights[row % 5]  # at the target
    for row in range(10, 13):
        hidden[row, (row + 1) % 3] = heights[row - 8]  # at another token
    hidden[13, :2] = 30.0
    hidden[14] = 0.0
    return dataclasses.replace(case, hidden=hidden, weight=weight, targets=targets).to(dtype)


def plain(case: LinearCase, dtype: torch.dtype | None = None) -> LinearTokenLogprobs:
    """By plain torch: matrix product, log-softmax, autograd. In float64, or in ``dtype`` as eager code would."""
    arguments = case.to(dtype or torch.float64)
    hidden = arguments.hidden.clone().requires_grad_()
    logits = torch.nn.functional.linear(hidden, arguments.weight, arguments.bias)
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    wide = logits.to(accumulator(logits.dtype))
    kept = case.targets != IGNORE
    log_p = torch.log_softmax(wide[kept], 1)
    logprob = log_p.gather(1, case.targets[kept].unsqueeze(1)).squeeze(1)
    terms = log_p.exp() * log_p
    entropy = -terms.masked_fill(log_p == -torch.inf, 0.0).sum(1)
    units = [torch.autograd.grad(part.sum(), hidden, retain_graph=True)[0] for part in (logprob, entropy)]

    def spread(part: Tensor) -> Tensor:
        whole = torch.zeros(len(kept), dtype=torch.float64)
        whole[kept] = part.detach().double()
        return whole

    lse = torch.logsumexp(wide[kept], 1)
    return LinearTokenLogprobs(spread(logprob), spread(lse), spread(entropy), units[0].double(), units[1].double())


def _sizes(case: LinearCase) -> tuple[Tensor, Tensor, Tensor]:
    """Per row, what the unit gradients are sums of: max |W| Σ_v |coefficient of W_v|; and the largest logit."""
    wide = case.to(torch.float64)
    logits = reference.linear_logits(wide.hidden, wide.weight, wide.bias, case.softcap)
    log_p = torch.log_softmax(logits, 1)
    p = log_p.exp()
    rest = p.clone()
    kept = (case.targets != IGNORE).nonzero().squeeze(1)
    rest[kept, case.targets[kept]] = 0
    log_p = log_p.masked_fill(log_p == -torch.inf, 0.0)
    entropy = -(p * log_p).sum(1, keepdim=True)
    largest = wide.weight.abs().max()
    finite = logits.masked_fill(logits.isinf(), 0.0).abs().amax(1)
    # A likely token's log p + entropy is a difference of numbers of the size of the logits.
    of_entropy = (p * (log_p + entropy).abs()).sum(1)
    return 2 * largest * rest.sum(1), largest * of_entropy, finite


def assert_right(fast: LinearTokenLogprobs, case: LinearCase) -> None:
    """|fast - truth| <= 2 |eager - truth| + rounding, where a row's errors are relative to the size of what it sums up.

    The rounding is a few units in the last place of the accumulator, times the logits, which are rounded too.
    """
    truth, eager = plain(case), plain(case, case.hidden.dtype)
    eps = torch.finfo(accumulator(case.hidden.dtype)).eps
    kept = case.targets != IGNORE
    if not kept.any():
        assert not any(part.any() for part in fast if part is not None)
        return
    size_logprob, size_entropy, logit = _sizes(case)
    ones = torch.ones_like(logit)
    tiny = torch.finfo(accumulator(case.hidden.dtype)).tiny
    sizes = {"logprob": ones, "lse": ones, "entropy": ones, "unit_logprob": size_logprob, "unit_entropy": size_entropy}
    for name, size in sizes.items():
        found = getattr(fast, name)
        if found is None:
            continue
        assert not found[~kept].any(), f"{name} of ignored rows"
        error, eager_error = (
            (result.double() - getattr(truth, name)).abs().view(len(kept), -1).amax(1)[kept]
            for result in (found, getattr(eager, name))
        )
        scale = size[kept]
        rounding = 8 * eps * (1 + logit[kept]) * scale
        if case.hidden.dtype == torch.bfloat16 and name.startswith("unit"):
            # Weights and products of a block are rounded to bfloat16, each by half a unit in the last place.
            rounding = rounding + torch.finfo(torch.bfloat16).eps * scale
        if not name.startswith("unit"):
            rounding = rounding + 8 * eps * getattr(truth, name)[kept].abs()
        if name == "unit_logprob":
            # The truth takes 1 - p from p, in float64.
            rounding = rounding + 8 * torch.finfo(torch.float64).eps * case.weight.double().abs().max()
        if name == "unit_entropy":
            rounding = rounding + 8 * eps * (1 + logit[kept]) * case.weight.double().abs().max()
        # Of all rows the worst, relative to its size: a single row's eager error may happen to be small.
        allowed = 2 * (eager_error / (scale + tiny)).max() * scale + rounding + 1e4 * tiny
        assert (error <= allowed).all(), f"{name}: off by {error.max()}, {(error - allowed).max()} too much"


def reference_of(case: LinearCase) -> LinearTokenLogprobs:
    arguments, options = case.to(torch.float64).arguments()
    return reference.linear_token_logprobs(
        *arguments, **options, want_entropy=True, unit_gradients=True, ignore_index=IGNORE
    )
