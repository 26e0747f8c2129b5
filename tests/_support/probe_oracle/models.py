"""Small causal language models in fp64, and optimizers whose state is full and uneven."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor, nn

VOCABULARY = 23


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, hidden: Tensor, allowed: Tensor) -> Tensor:
        n, t, width = hidden.shape
        split = self.query_key_value(self.attention_norm(hidden)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = split
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        mixed = scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ value
        hidden = hidden + self.output(mixed.transpose(1, 2).reshape(n, t, width))
        return hidden + self.mlp(self.mlp_norm(hidden))


class TinyTransformer(nn.Module):
    """A LayerNorm transformer with learned positions, written out so that nothing is hidden in a library."""

    def __init__(self, vocabulary: int = VOCABULARY, width: int = 8, heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(32, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> SimpleNamespace:
        hidden = self.tokens(input_ids) + self.positions(position_ids)
        causal = torch.ones(input_ids.shape[1], input_ids.shape[1], dtype=torch.bool).tril()
        allowed = causal & (attention_mask == 1)[:, None, None, :]
        # A query that may look at nothing would give NaN; letting it see itself changes no real token.
        allowed = allowed | torch.eye(input_ids.shape[1], dtype=torch.bool)
        for block in self.blocks:
            hidden = block(hidden, allowed)
        return SimpleNamespace(logits=self.head(self.norm(hidden)))


def tiny_transformer(seed: int = 0, layers: int = 2) -> TinyTransformer:
    torch.manual_seed(seed)
    model = TinyTransformer(layers=layers).double()
    with torch.no_grad():  # away from the special values of the initialisation: norms of 1, biases of 0
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def qwen2(seed: int = 0) -> nn.Module:
    """A small Qwen2; its norm computes in fp32, so a caller in fp64 has to patch it (see `double_precision_norm`)."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.3,
        attn_implementation="sdpa",
    )
    return Qwen2ForCausalLM(config).double()


def double_precision_norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """Qwen2RMSNorm.forward without its casts to fp32."""
    variance = hidden_states.square().mean(-1, keepdim=True)
    normed: Tensor = self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)  # type: ignore[operator]
    return normed


def gpt2(seed: int = 0) -> nn.Module:
    """A small GPT-2: learned positions, and an output layer tied to the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,
        resid_pdrop=0.3,  # left in train(): the probe has to switch it off
        attn_pdrop=0.3,
        embd_pdrop=0.3,
        attn_implementation="sdpa",
    )
    return GPT2LMHeadModel(config).double()


def stepped_adam(model: nn.Module, seed: int = 0, kind: type[torch.optim.Adam] = torch.optim.AdamW) -> torch.optim.Adam:
    """Three groups that differ in everything, one of them AMSGrad, with a different number of steps per parameter.

    Gradients are random, so that every element has a second moment, and shrink, so that AMSGrad's maximum matters.
    """
    generator = torch.Generator().manual_seed(seed)
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": trainable[0::3], "lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8},
        {"params": trainable[1::3], "lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-2},
        {"params": trainable[2::3], "lr": 5e-4, "betas": (0.9, 0.9), "eps": 1e-6, "amsgrad": True},
    ]
    optimizer = kind(groups, lr=1.0)
    for step in range(4):
        for index, parameter in enumerate(trainable):
            skipped = index % 2 == 1 and step == 3
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.grad = None if skipped else noise * 0.5**step
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer
