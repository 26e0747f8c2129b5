"""The policies that coverage is simulated on: the toy one, a small trained transformer, and what their responses are worth.

Legend: P prompts, R responses of at most T tokens, V tokens of the vocabulary; θ is a flat fp64 vector of D numbers; S = log p
of a response. A node is a token of a prompt, or a prefix of responses, which stands for its last token; N nodes to a prompt.
A context is what a response's next token is drawn from: the prompt and a prefix; C of them to a prompt.

The transformer reads every prefix once, however many responses go on from it: nodes attend to their own prefixes, a tree, not
to all nodes before. What it computes at a node is what it would compute at the end of that prompt and prefix alone.

Both policies know three kinds of rewards: ordinary ones; a jackpot, where one unlikely response to every prompt (the least
likely of at least 0.3 %) has 30 times the mean reward of the others; and rewards that are all equal within six of the prompts.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.error_bars import SUPPORT

sys.path.insert(0, str(SUPPORT))

from probe_oracle.toy_policy import END, ToyPolicy  # found by way of the line above

POLICIES = ("toy", "transformer")
REWARDS = ("ordinary", "jackpot", "mostly equal")
JACKPOT = 30.0
RARE = 0.003  # a response that is less likely would hardly ever be drawn
EQUAL = 6  # of the prompts
PRETRAINING, TRAINING = (60, 0.03), (30, 0.001)  # steps and learning rate


def policy_with(rewards: str, kind: str = "toy") -> Any:
    """A policy of one of the `POLICIES`, with rewards of one of the `REWARDS`."""
    policy = ToyPolicy(prompts=8, seed=3) if kind == "toy" else SmallTransformer(prompts=8, seed=3)
    # Before rewards are changed: the policy is the same in every world, trained for the ordinary rewards.
    rare = jackpot_responses(policy)
    table = policy.rewards.clone()
    if rewards == "jackpot":
        others = (table.sum(1) - table.gather(1, rare[:, None])[:, 0]) / (table.shape[1] - 1)
        table.scatter_(1, rare[:, None], JACKPOT * others[:, None])
    elif rewards == "mostly equal":
        table[:EQUAL] = 1.0
    vars(policy)["rewards"] = table  # where a cached property keeps its value
    return policy


def jackpot_responses(policy: ToyPolicy) -> Tensor:
    """[P] the least likely response to every prompt, of those that are not less likely than `RARE`."""
    probability = policy.logprob_table.exp()
    return torch.where(probability >= RARE, probability, torch.inf).argmin(1)


class Block(nn.Module):
    """Attention to the nodes that a node sees, and two layers on its own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = (nn.LayerNorm(width, dtype=torch.float64) for _ in range(2))
        sizes = ((width, 3 * width), (width, width), (width, 2 * width), (2 * width, width))
        self.into, self.out, self.up, self.down = (nn.Linear(*s, bias=False, dtype=torch.float64) for s in sizes)

    def forward(self, x: Tensor, sees: Tensor) -> Tensor:
        """From x [P, N, width] and sees [P, N, N], which says of every node what it attends to."""
        q, k, v = self.into(self.before(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        fit = torch.einsum("pihd,pjhd->phij", q, k) / q.shape[-1] ** 0.5
        weights = fit.masked_fill(~sees[:, None], -torch.inf).softmax(-1)
        x = x + self.out(torch.einsum("phij,pjhd->pihd", weights, v).flatten(-2))
        return x + self.down(nn.functional.gelu(self.up(self.between(x))))


class Network(nn.Module):
    """Token and position embeddings, blocks, and a head of its own."""

    def __init__(self, vocabulary: int, longest: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.token, self.place = (nn.Embedding(of, width, dtype=torch.float64) for of in (vocabulary, longest))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.last = nn.LayerNorm(width, dtype=torch.float64)
        self.head = nn.Linear(width, vocabulary, bias=False, dtype=torch.float64)

    def forward(self, tokens: Tensor, position: Tensor, sees: Tensor) -> Tensor:
        """[P, N, V] log-probs of what follows, from tokens and positions [P, N]."""
        x = self.token(tokens) + self.place(position)
        for block in self.blocks:
            x = block(x, sees)
        return self.head(self.last(x)).log_softmax(-1)


@dataclasses.dataclass(frozen=True)
class SmallTransformer(ToyPolicy):
    """A causal transformer, pre-trained so that prompts differ, then trained by exact policy gradients.

    Args:
        width: of the residual stream.
        heads: of every attention.
        layers: blocks of attention and two layers.
        longest: tokens of a prompt; half the prompts have one less.

    The toy policy's `hidden` and `scale` mean nothing here.
    """

    vocabulary: int = 5
    width: int = 8
    heads: int = 2
    layers: int = 2
    longest: int = 3

    @cached_property
    def prompt_tokens(self) -> list[tuple[int, ...]]:
        """Different prompts, without the end token."""
        generator, found = torch.Generator().manual_seed(self.seed), []
        for length in (self.longest - 1, self.longest):
            every = list(itertools.product(range(1, self.vocabulary), repeat=length))
            wanted = self.prompts // 2 if not found else self.prompts - len(found)
            found += [every[i] for i in torch.randperm(len(every), generator=generator)[:wanted].tolist()]
        return found

    @cached_property
    def network(self) -> Network:
        """Of which only the structure is used; the parameters come from θ."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return Network(self.vocabulary, self.longest + self.limit - 1, self.width, self.heads, self.layers)

    def following(self, theta: Tensor, tokens: Tensor, position: Tensor, sees: Tensor) -> Tensor:
        """[P, N, V] log-probs after every node."""
        named = dict(self.network.named_parameters())
        parts = theta.split([parameter.numel() for parameter in named.values()])
        own = {name: part.view_as(like) for part, (name, like) in zip(parts, named.items(), strict=True)}
        return torch.func.functional_call(self.network, own, (tokens, position, sees))

    @cached_property
    def _prefixes(self) -> list[tuple[int, ...]]:
        """What a response can go on from; nothing yet comes first."""
        going_on = range(1, self.vocabulary)
        return [p for length in range(self.limit) for p in itertools.product(going_on, repeat=length)]

    @cached_property
    def _tree(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and positions [P, N] of nodes, and what they see [P, N, N]; shorter prompts begin with one that none sees."""
        node = {prefix: self.longest - 1 + number for number, prefix in enumerate(self._prefixes)}
        count = self.longest - 1 + len(node)
        tokens, position = (torch.full((self.prompts, count), END) for _ in range(2))
        sees = torch.eye(count, dtype=torch.bool).repeat(self.prompts, 1, 1)
        for p, prompt in enumerate(self.prompt_tokens):
            first = self.longest - len(prompt)
            tokens[p, first : self.longest] = torch.tensor(prompt)
            position[p, first : self.longest] = torch.arange(len(prompt))
            sees[p, first : self.longest, first : self.longest] = torch.ones(len(prompt), len(prompt)).tril().bool()
            for prefix, at in node.items():
                if prefix:
                    tokens[p, at], position[p, at] = prefix[-1], len(prompt) + len(prefix) - 1
                    sees[p, at, first : self.longest] = True
                    sees[p, at, [node[prefix[:length]] for length in range(1, len(prefix))]] = True
        return tokens, position, sees

    @cached_property
    def _drawn(self) -> tuple[Tensor, Tensor, Tensor]:
        """[R, T] for every token of every response: its context, itself, and whether it is there."""
        context, token = torch.zeros(2, len(self.responses), self.limit, dtype=torch.int64).unbind()
        number = {prefix: at for at, prefix in enumerate(self._prefixes)}
        for r, response in enumerate(self.responses):
            context[r, : len(response)] = torch.tensor([number[response[:t]] for t in range(len(response))])
            token[r, : len(response)] = torch.tensor(response)
        return context, token, torch.arange(self.limit) < self.lengths[:, None]

    def token_values(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """[P, R, T] log-prob of every token of every response, and entropy of what it was drawn from; 0 after the end."""
        logprob = self.following(theta, *self._tree)[:, self.longest - 1 :]  # [P, C, V]
        entropy = -(logprob.exp() * logprob).sum(-1)
        context, token, exists = self._drawn
        return logprob[:, context, token] * exists, entropy[:, context] * exists

    @cached_property
    def rewards(self) -> Tensor:
        """[P, R] reward of every response: some noise, and how much of it are tokens of the prompt."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        table = torch.rand(self.prompts, len(self.responses), generator=generator, dtype=torch.float64)
        liking = [[sum(t in of for t in r) / len(r) for r in self.responses] for of in self.prompt_tokens]
        return table + self.preference * torch.tensor(liking, dtype=torch.float64)

    @cached_property
    def theta(self) -> Tensor:
        """[D] the parameters after both trainings."""
        generator = torch.Generator().manual_seed(self.seed + 2)
        wanted = 2 * torch.randn(self.prompts, len(self.responses), generator=generator, dtype=torch.float64)
        wanted = wanted.softmax(-1)
        begin = nn.utils.parameters_to_vector(self.network.parameters()).detach()
        pretrained = self.trained(begin, *PRETRAINING, lambda S: wanted * S)
        # Over all responses there is nothing to estimate: the gradient of the expected reward is the policy gradient.
        return self.trained(pretrained, *TRAINING, lambda S: S.exp() * self.rewards)

    def trained(self, theta: Tensor, steps: int, lr: float, gained: Callable[[Tensor], Tensor]) -> Tensor:
        """[D] where AdamW gets to from θ by what is gained in every response [P, R], given S: summed, mean over prompts."""
        parameter = nn.Parameter(theta.clone())
        optimizer = torch.optim.AdamW([parameter], lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            (-gained(self.logprobs(parameter)).sum(-1).mean()).backward()
            optimizer.step()
        return parameter.detach()
