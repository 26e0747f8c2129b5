"""One prompt's responses, its own tokens run once: the responses continue from a detached copy of its keys and values.

Legend: c_i and a_i coefficients, K and V the prompt's keys and values, h_p its last hidden state, which predicts the first
response token.

A backward of Σ_i S_i through the responses gives their signals and every response's own ∂S_i/∂K, ∂S_i/∂V, ∂S_i/∂h_p. Those are
summed with c_i and with a_i, and the two sums go back through the prompt's graph one after the other: what arrives there is
already weighted.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from entropy_fast.capture.signal_rows import SignalRows
from entropy_fast.columns.coefficients import power_of_two_scale
from entropy_fast.ops import linear_token_logprobs
from entropy_fast.ways.padded import OutputLayer, PackedBatch, hidden_logprobs
from entropy_fast.ways.padded.forward import refuse_nan
from entropy_fast.ways.padded.output_layer import allowed_difference

__all__ = [
    "SharedPrefixForward",
    "backward_through_prefix",
    "forward_with_shared_prefix",
    "frequencies_depend_on_length",
    "prefix_length",
    "same_with_shared_prefix",
]


@dataclasses.dataclass(frozen=True)
class SharedPrefixForward:
    """The two forwards of one prompt with G responses.

    Attributes:
        sequence_logprobs: [G] S_i, with the graph of the responses.
        token_logprobs: [G, R] log-probs of the tokens after the prompt, 0 where they are not scored.
        scored: [G, R] bool.
        token_entropies: [G, R] likewise, None unless wanted.
        prefix: what the responses continue from, with the prompt's graph: K and V of every layer [1, ...], and h_p [1, H].
        leaves: the detached copies of them, one row a response.
    """

    sequence_logprobs: Tensor
    token_logprobs: Tensor
    scored: Tensor
    token_entropies: Tensor | None
    prefix: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]


def prefix_length(batch: PackedBatch) -> int | None:
    """Number of tokens before the first scored one, None unless it is the same in all rows, and the tokens too."""
    first = batch.loss_mask.argmax(1)
    length = int(first[0])
    same = bool((first == length).all()) and bool((batch.input_ids[:, :length] == batch.input_ids[:1, :length]).all())
    return length if same and length > 0 else None


def forward_with_shared_prefix(
    layer: OutputLayer, batch: PackedBatch, length: int, *, want_entropies: bool = False
) -> SharedPrefixForward:
    """Both forwards.

    The cache is built without the model's configuration: with it, layers with a sliding window drop keys that the first
    response tokens still see. Rows are padded on the right and the prompt is not padded, so no query is without keys and
    distances in the cache are distances in the text.

    Args:
        layer: decoder and output layer.
        batch: the responses of one prompt, whole sequences.
        length: from `prefix_length`.
        want_entropies: whether the entropy at every scored token is computed too.

    Raises:
        GraphDetachedError: a log-prob is NaN.
    """
    rows = batch.input_ids.shape[0]
    cache: Any = DynamicCache()
    ids = batch.input_ids[:1, :length]
    before = layer.decoder(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=batch.position_ids[:1, :length],
        past_key_values=cache,
        use_cache=True,
    )
    states = [state for entry in cache.layers for state in (entry.keys, entry.values)]
    prefix = (*states, before.last_hidden_state[:, -1])
    leaves = tuple(t.detach().expand(rows, *t.shape[1:]).contiguous().requires_grad_() for t in prefix)
    continued: Any = DynamicCache()
    for index in range(len(states) // 2):
        continued.update(leaves[2 * index], leaves[2 * index + 1], index)
    targets = batch.input_ids[:, length:]
    scored = batch.loss_mask[:, length:] == 1
    after = layer.decoder(
        input_ids=targets,
        attention_mask=batch.attention_mask,
        # Padding has a position too, which no real token sees.
        position_ids=length + torch.arange(targets.shape[1], device=targets.device).expand(rows, -1),
        past_key_values=continued,
        use_cache=True,
    )
    hidden = torch.cat([leaves[-1].unsqueeze(1), after.last_hidden_state[:, :-1]], dim=1)
    found = linear_token_logprobs(
        hidden[scored],
        layer.weight,
        targets[scored],
        bias=layer.bias,
        softcap=layer.softcap,
        want_entropy=want_entropies,
    )
    refuse_nan(found.logprob)

    def in_place(values: Tensor) -> Tensor:
        return values.new_zeros(targets.shape).masked_scatter(scored, values)

    tokens = in_place(found.logprob)
    entropies = None if found.entropy is None else in_place(found.entropy)
    return SharedPrefixForward(tokens.sum(-1), tokens, scored, entropies, prefix, leaves)


def same_with_shared_prefix(layer: OutputLayer, batch: PackedBatch, length: int) -> bool:
    """Whether a model gives the same log-probs both ways; needs no graph.

    False for models whose state is something else than keys and values, and for those whose rotary frequencies depend on
    how long the input of a forward is: one batch would not tell for another.
    """
    if frequencies_depend_on_length(getattr(layer.decoder, "config", None)):
        return False
    whole = hidden_logprobs(layer, batch)
    try:
        found = forward_with_shared_prefix(layer, batch, length).token_logprobs
    except (AttributeError, TypeError, ValueError, IndexError, RuntimeError):
        return False
    expected = whole.token_logprobs[:, length - 1 :]
    return bool(((found - expected).abs() <= allowed_difference(whole.logits.dtype)).all())


def frequencies_depend_on_length(config: object) -> bool:
    """Whether a configuration asks for rotary embeddings of type longrope or dynamic, for any kind of layer."""
    found = [getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")]
    while found:
        value = found.pop()
        if isinstance(value, dict):
            found.extend(value.values())
        elif value in ("longrope", "dynamic"):
            return True
    return False


def backward_through_prefix(
    forward: SharedPrefixForward,
    coefficients: tuple[Tensor, Tensor],
    unit: int,
    gradients: SignalRows,
    length: int,
    *,
    more: bool,
) -> None:
    """The backwards through the prompt's graph, after the one through the responses has filled the leaves' gradients.

    Args:
        forward: from `forward_with_shared_prefix`.
        coefficients: [G] what the responses' parts are summed with for X and for g, fp64.
        unit: whose prompt it is.
        gradients: the recorder.
        length: tokens of the prompt.
        more: whether the graphs are needed once more; the leaves' gradients are taken away.
    """
    pairs = [
        (state, leaf.grad)
        for state, leaf in zip(forward.prefix, forward.leaves, strict=True)
        if state.requires_grad and leaf.grad is not None
    ]
    if not pairs:
        return
    for leaf in forward.leaves:
        leaf.grad = None
    labels = [label for label, weights in enumerate(coefficients) if bool((weights != 0).any())]
    for which in labels:
        weights = coefficients[which]
        # What goes through the graph is of ordinary size; the sums get it back scaled.
        scale = power_of_two_scale(weights)
        both = torch.zeros(2, 1, dtype=torch.float64, device=weights.device)
        both[which] = 1.0 / scale
        cotangents = []
        for state, grad in pairs:
            wide = torch.promote_types(state.dtype, torch.float32)
            summed = torch.tensordot((scale * weights).to(device=grad.device, dtype=wide), grad.to(wide), dims=1)
            cotangents.append(summed.unsqueeze(0).to(state.dtype))
        gradients.expect([unit], (both[0], both[1]), length)
        torch.autograd.backward([state for state, _ in pairs], cotangents, retain_graph=more or which != labels[-1])
    gradients.pause()
