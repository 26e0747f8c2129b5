"""What the entropy to come is compared with in the visitation part; a number that does not depend on the token leaves no bias.

Legend: A_t what is to come after response token t (`EntropyMeasure.to_come`), H_t the entropy that the token was drawn from,
φ_t features that are known before it is drawn, B prompts.

E[b_t ∇s_t] = 0 for a b_t that depends on what came before token t, on other responses, and on other prompts. The nearer b_t is
to what is expected after the prefix, the less the sum varies. A prompt's few other responses say that with much noise of their
own; the batch's other prompts say it with little, for tokens of like entropy and position:

    b_t = φ_t · β_n,      β_n = argmin Σ_{m ≠ n} (1/M_m) Σ_t (A_t - φ_t · β)² + λ Σ_f β_f² s_f

over the M_m tokens of every other prompt, with s_f the sum that multiplies β_f² in the first term and λ = 1e-3, which only
keeps the solution finite. Prompts count alike, however long their responses. Beyond the largest entropy and the last position
that the other prompts have, φ_t stays there: a parabola says nothing outside of where it was fitted. Leaving prompt n out of
all of this keeps its b_t free of its own samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from entropy_fast.columns.tokens import TokenPlaces

__all__ = ["of_other_prompts", "of_other_responses"]

RIDGE = 1e-3


def of_other_responses(to_come: Tensor, places: TokenPlaces, *, of_whole: bool) -> Tensor:
    """[M] mean A_t over the prompt's other responses that have a token t; 0 where none has.

    Where others have ended nothing is to come: they are left out, since how many there are must not depend on the response.

    Args:
        to_come: [M] A_t, fp64.
        places: where the tokens stand; whole prompts.
        of_whole: whether A_t is one number for all tokens of a response; then every other response counts at every token.
    """
    others = places.member @ places.member.T
    others.fill_diagonal_(0.0)
    if of_whole:
        means = (others @ places.means(to_come)) / others.sum(1).clamp_min(1.0)
        return means[places.sequence]
    exists = places.table(to_come.new_ones(len(to_come)))
    found = (others @ places.table(to_come)) / (others @ exists).clamp_min(1.0)
    return found[places.sequence, places.column]


def of_other_prompts(to_come: Tensor, entropies: Tensor, places: TokenPlaces) -> Tensor:
    """[M] b_t from the regression above; 0 for a batch of one prompt.

    Args:
        to_come: [M] A_t, fp64.
        entropies: [M] H_t, fp64.
        places: where the tokens of the whole batch stand.
    """
    prompt, prompts = places.prompt[places.sequence], int(places.prompt.max()) + 1
    if prompts == 1:
        return torch.zeros_like(to_come)
    position = places.column.to(torch.float64)
    member = torch.nn.functional.one_hot(prompt, prompts).to(torch.float64)
    features = _features(entropies, position)
    weights = member / member.sum(0)
    # By matrix products, whose order of sums is one on every device.
    squares = torch.einsum("tp,tf,tg->pfg", weights, features, features)
    crossed = torch.einsum("tp,tf,t->pf", weights, features, to_come)
    # Of the other prompts alone, the penalty too: a prompt's own tokens must not come into its b_t by any way.
    squares, crossed = squares.sum(0) - squares, crossed.sum(0) - crossed
    size = squares.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    scaled = squares / (size.unsqueeze(1) * size.unsqueeze(2)) + RIDGE * torch.eye(
        features.shape[1], dtype=torch.float64
    )
    beta: Tensor = torch.linalg.solve(scaled, (crossed / size).unsqueeze(-1)).squeeze(-1) / size
    seen = [_largest_elsewhere(values, prompt, prompts)[prompt] for values in (entropies, position)]
    within = _features(torch.minimum(entropies, seen[0]), torch.minimum(position, seen[1]))
    return (within * beta[prompt]).sum(1)


def _features(entropies: Tensor, position: Tensor) -> Tensor:
    """[M, 4] φ_t."""
    return torch.stack([torch.ones_like(position), entropies, position, position.square()], 1)


def _largest_elsewhere(values: Tensor, prompt: Tensor, prompts: int) -> Tensor:
    """[prompts] the largest of values [M] in all prompts but each."""
    own = torch.full((prompts,), -torch.inf, dtype=values.dtype).scatter_reduce(0, prompt, values, "amax")
    return torch.stack([torch.cat([own[:n], own[n + 1 :]]).max() for n in range(prompts)])
