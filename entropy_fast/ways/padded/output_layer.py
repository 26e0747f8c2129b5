"""Log-probs without logits: the decoder's hidden states, and the output layer by `entropy_fast.ops.linear_token_logprobs`.

For models whose logits are a linear map of the decoder's hidden states, with a softcap or without. Whether a model is
one of these is read off its modules and then tried: what else it may do to its logits shows in the numbers.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from entropy_fast.ops import linear_token_logprobs
from entropy_fast.reference import linear_logits
from entropy_fast.ways.padded.batch import PackedBatch
from entropy_fast.ways.padded.forward import ForwardResult, model_logits, result_of_values

__all__ = [
    "OutputHead",
    "OutputLayer",
    "allowed_difference",
    "find_output_head",
    "find_output_layer",
    "hidden_logprobs",
    "hidden_states",
    "same_logits",
]

# Largest difference of a logit, relative to the largest of all: far below what a scale or a bias does, above rounding.
_ALLOWED_LOGITS = {torch.float64: 1e-6, torch.float32: 1e-3}
_ALLOWED_LOGITS_IN_16_BITS = 0.05
# Of a token's log-prob, nats.
_ALLOWED = {torch.float64: 1e-6, torch.float32: 1e-3}
_ALLOWED_IN_16_BITS = 0.3


@dataclasses.dataclass(frozen=True)
class OutputLayer:
    """An output layer and the decoder before it.

    Attributes:
        decoder: the module whose ``last_hidden_state`` goes into the output layer.
        weight: [V, H].
        bias: [V], or None.
        softcap: of the logits, or None.
    """

    decoder: nn.Module
    weight: Tensor
    bias: Tensor | None
    softcap: float | None


@dataclasses.dataclass(frozen=True)
class OutputHead:
    """The decoder of a model and whatever makes logits of its hidden states.

    Attributes:
        decoder: the module whose ``last_hidden_state`` goes into the output layer.
        module: the output layer.
        softcap: of the logits, or None.
        frozen: the same as a frozen linear map; None where it is trained or of another kind.
    """

    decoder: nn.Module
    module: nn.Module
    softcap: float | None
    frozen: OutputLayer | None


def find_output_head(module: nn.Module) -> OutputHead | None:
    """The decoder and output layer of a transformers model, under adapter wrappers too; None for other models."""
    unwrap = getattr(module, "get_base_model", None)
    base = unwrap() if callable(unwrap) else module
    if not isinstance(base, PreTrainedModel) or base.base_model is base:
        return None
    head = base.get_output_embeddings()
    if not isinstance(head, nn.Module):
        return None
    softcap = getattr(base.config, "final_logit_softcapping", None)
    if softcap is not None and not softcap > 0:
        return None
    return OutputHead(base.base_model, head, softcap, find_output_layer(module))


def find_output_layer(module: nn.Module, *, trained: bool = False) -> OutputLayer | None:
    """The output layer of a transformers model, under adapter wrappers too; None where it is of another kind.

    Args:
        module: the model.
        trained: whether the layer may have trainable parameters; without it, such a layer is None too.
    """
    unwrap = getattr(module, "get_base_model", None)
    base = unwrap() if callable(unwrap) else module
    if not isinstance(base, PreTrainedModel) or base.base_model is base:
        return None
    head = base.get_output_embeddings()
    if type(head) is not nn.Linear or (not trained and any(p.requires_grad for p in head.parameters())):
        return None
    if head._forward_hooks or head._forward_pre_hooks or "forward" in head.__dict__:
        return None
    softcap = getattr(base.config, "final_logit_softcapping", None)
    if not (head.weight.is_floating_point() and head.weight.dtype.itemsize > 1) or (
        softcap is not None and not softcap > 0
    ):
        return None
    return OutputLayer(base.base_model, head.weight, head.bias, softcap)


def hidden_logprobs(layer: OutputLayer, batch: PackedBatch, *, want_entropies: bool = False) -> ForwardResult:
    """As `align_logprobs` of `model_logits`, with logits of response tokens alone, a block at a time.

    Raises:
        GraphDetachedError: a log-prob is NaN.
    """
    start = batch.first_scored
    hidden = hidden_states(layer, batch)
    scored = batch.loss_mask[:, start:] == 1
    found = linear_token_logprobs(
        hidden[scored],
        layer.weight,
        batch.input_ids[:, start:][scored],
        bias=layer.bias,
        softcap=layer.softcap,
        want_entropy=want_entropies,
    )
    return result_of_values(found.logprob, scored, hidden, batch, found.entropy)


def hidden_states(layer: OutputLayer, batch: PackedBatch) -> Tensor:
    """[n, T - first_scored, H] hidden states that predict the columns ``first_scored`` .. T - 1."""
    output = layer.decoder(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    )
    hidden: Tensor = output.last_hidden_state[:, batch.first_scored - 1 : -1]
    return hidden


def same_logits(module: nn.Module, layer: OutputLayer, batch: PackedBatch) -> bool:
    """Whether the output layer gives the model's own logits for ``batch``; needs no graph."""
    with torch.no_grad():
        expected = model_logits(module, batch)
        try:
            hidden = hidden_states(layer, batch)
            found = linear_logits(hidden.flatten(0, 1), layer.weight, layer.bias, layer.softcap)
        except (TypeError, AttributeError, ValueError, RuntimeError):
            # The decoder takes other arguments, or returns something else.
            return False
        if found.numel() != expected.numel():
            return False
        difference = (found.view_as(expected).double() - expected.double()).abs().max()
        allowed = _ALLOWED_LOGITS.get(expected.dtype, _ALLOWED_LOGITS_IN_16_BITS)
        return bool(difference <= allowed * expected.double().abs().max())


def allowed_difference(dtype: torch.dtype) -> float:
    """How far apart two ways to the same token's log-prob may be, nats, for logits or hidden states of this dtype."""
    return _ALLOWED.get(dtype, _ALLOWED_IN_16_BITS)
