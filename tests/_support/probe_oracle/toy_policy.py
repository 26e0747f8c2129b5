"""A policy small enough to sum over every sequence it can produce: the population values of X̄ and Ȳ, and batches from it.

Legend: p(y) probability of response y to a prompt, S = log p(y), w length weight, R reward, L length in tokens, X̄ and Ȳ
population means of X_n and Y_n over prompts and G-tuples of responses. θ is a flat fp64 vector of D numbers.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from functools import cached_property

import torch
from torch import Tensor

END = 0  # the last token of a response that does not run into the limit


@dataclasses.dataclass(frozen=True)
class ToyPolicy:
    """An autoregressive two-layer network over the prompt, the position and the previous token.

    Args:
        vocabulary: tokens, the end token included.
        limit: longest response.
        prompts: number of prompts, all equally likely.
        hidden: width of the hidden layer.
        scale: how far θ is from the uniform policy.
        preference: strength of the rewards' dependence on the response.
        seed: of θ and rewards.
    """

    vocabulary: int = 3
    limit: int = 3
    prompts: int = 4
    hidden: int = 2
    scale: float = 0.7
    preference: float = 1.0
    seed: int = 0

    @cached_property
    def responses(self) -> list[tuple[int, ...]]:
        """Every response: the end token comes last, or the limit is reached without it."""
        found: list[tuple[int, ...]] = []
        for length in range(1, self.limit + 1):
            for tokens in itertools.product(range(self.vocabulary), repeat=length):
                ended = tokens[-1] == END
                if END not in tokens[:-1] and (ended or length == self.limit):
                    found.append(tokens)
        return found

    @property
    def lengths(self) -> Tensor:
        """[R] L of every response."""
        return torch.tensor([len(response) for response in self.responses], dtype=torch.float64)

    @cached_property
    def _shapes(self) -> list[tuple[int, ...]]:
        features = self.prompts + self.limit + self.vocabulary + 1
        return [(features, self.hidden), (self.hidden, self.vocabulary), (self.vocabulary,)]

    @cached_property
    def theta(self) -> Tensor:
        """[D] the parameters."""
        generator = torch.Generator().manual_seed(self.seed)
        count = sum(math.prod(shape) for shape in self._shapes)
        return self.scale * torch.randn(count, generator=generator, dtype=torch.float64)

    @cached_property
    def rewards(self) -> Tensor:
        """[P, R] reward of every response: some structure that an update can follow, and some noise."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        table = torch.rand(self.prompts, len(self.responses), generator=generator, dtype=torch.float64)
        liking = torch.tensor([sum(t == 1 for t in r) / len(r) for r in self.responses], dtype=torch.float64)
        return table + self.preference * liking

    def logprobs(self, theta: Tensor) -> Tensor:
        """[P, R] S of every response to every prompt."""
        return self.token_values(theta)[0].sum(-1)

    def token_values(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """[P, R, limit] log-prob of every token of every response, and entropy of what it was drawn from; 0 after the end."""
        sizes = [math.prod(shape) for shape in self._shapes]
        parts = [part.view(shape) for part, shape in zip(theta.split(sizes), self._shapes, strict=True)]
        first, second, bias = parts
        rows = []
        nothing = theta.new_zeros(())
        for prompt in range(self.prompts):
            for response in self.responses:
                values = []
                previous = self.vocabulary  # nothing yet
                for position, token in enumerate(response):
                    hidden = (
                        first[prompt] + first[self.prompts + position] + first[self.prompts + self.limit + previous]
                    )
                    following = (torch.tanh(hidden) @ second + bias).log_softmax(-1)
                    values.append(torch.stack([following[token], -(following.exp() * following).sum()]))
                    previous = token
                values += [torch.stack([nothing, nothing])] * (self.limit - len(response))
                rows.append(torch.stack(values))
        table = torch.stack(rows).view(self.prompts, len(self.responses), self.limit, 2)
        return table[..., 0], table[..., 1]

    @cached_property
    def scores(self) -> Tensor:
        """[P, R, D] ∇S of every response to every prompt."""
        return torch.autograd.functional.jacobian(self.logprobs, self.theta).detach()

    @cached_property
    def logprob_table(self) -> Tensor:
        """[P, R] S at θ."""
        return self.logprobs(self.theta).detach()

    def expected_weighted_entropy(self, theta: Tensor, weight: Tensor) -> Tensor:
        """E[-w S], mean over prompts; -Σ p log p for w = 1."""
        logprobs = self.logprobs(theta)
        return (logprobs.exp() * -weight * logprobs).sum(-1).mean()

    def expected_surrogate(self, theta: Tensor, weight: Tensor) -> Tensor:
        """E[w (1 - S)], mean over prompts."""
        logprobs = self.logprobs(theta)
        return (logprobs.exp() * weight * (1 - logprobs)).sum(-1).mean()

    def population(self, weight: Tensor, group_size: int, precondition: Tensor) -> tuple[Tensor, Tensor]:
        """X̄ and Ȳ [D] for weights [R] that are the same in every group, with group-centred advantages.

        X̄ = -E[w S ∇S] (a leave-one-out baseline is independent of the sample it is used on, and E ∇S = 0); centring by
        the group's own mean makes ḡ = (1 - 1/G) (E[w R ∇S] - E[R] E[w ∇S]), expectations within a prompt.
        """
        probability = self.logprob_table.exp()
        x = -torch.einsum("pr,r,pr,prd->d", probability, weight, self.logprob_table, self.scores) / self.prompts
        mean_reward = (probability * self.rewards).sum(-1, keepdim=True)
        centred = self.rewards - mean_reward
        g = torch.einsum("pr,r,pr,prd->d", probability, weight, centred, self.scores) / self.prompts
        return x, precondition * g * (1 - 1 / group_size)

    def sample(
        self,
        replicates: int,
        batch: int,
        group_size: int,
        weight: Tensor,
        precondition: Tensor,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """X_n and Y_n [replicates, batch, D] of batches of prompts drawn with replacement and G responses each."""
        prompt = torch.randint(self.prompts, (replicates, batch), generator=generator)
        probability = self.logprob_table.exp()[prompt].reshape(replicates * batch, -1)
        drawn = torch.multinomial(probability, group_size, replacement=True, generator=generator)
        drawn = drawn.view(replicates, batch, group_size)
        at = prompt[..., None].expand_as(drawn)
        weighted = weight[drawn] * self.logprob_table[at, drawn]
        others = (weighted.sum(-1, keepdim=True) - weighted) / (group_size - 1)
        rewards = self.rewards[at, drawn]
        c = -(weighted - others) / group_size
        a = (rewards - rewards.mean(-1, keepdim=True)) * weight[drawn] / group_size
        scores = self.scores[at, drawn]
        return torch.einsum("nbg,nbgd->nbd", c, scores), torch.einsum("nbg,nbgd->nbd", a, scores) * precondition
