"""Log-probs without logits: the decoder's hidden states, and the output layer by `entropy_fast.ops.linear_token_logprobs`.

For models whose logits are a linear map of the decoder's hidden states, with a softcap or without. Whether a model is
one of these is read off its modules and then tried: what else it may do to its logits shows in the numbers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from entropy_fast.libraries import transformers_base
from entropy_fast.ops import linear_token_logprobs
from entropy_fast.ways.teacher_forcing.batch import PaddedBatch
from entropy_fast.ways.teacher_forcing.forward import ForwardResult, result_of_values

__all__ = ["OutputHead", "OutputLayer", "find_output_head", "hidden_logprobs", "hidden_states"]


@dataclasses.dataclass(frozen=True)
class OutputLayer:
    """A linear output layer and the decoder before it.

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

    @property
    def trained(self) -> bool:
        """Whether weight or bias is."""
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)

    def at(self, temperature: float) -> OutputLayer:
        """The layer that makes logits/T of hidden states h/T.

        With a softcap c that is exact too: c·tanh(z/c)/T = (c/T)·tanh((z/T)/(c/T)), z = W h + b.
        """
        if temperature == 1:
            return self
        bias = None if self.bias is None else self.bias / temperature
        return OutputLayer(
            self.decoder, self.weight, bias, None if self.softcap is None else self.softcap / temperature
        )


@dataclasses.dataclass(frozen=True)
class OutputHead:
    """The decoder of a model and whatever makes logits of its hidden states.

    Attributes:
        decoder: the module whose ``last_hidden_state`` goes into the output layer.
        module: the output layer.
        softcap: of the logits, or None.
        linear: the same as a linear map; None where it is of another kind.
    """

    decoder: nn.Module
    module: nn.Module
    softcap: float | None
    linear: OutputLayer | None

    @property
    def frozen(self) -> OutputLayer | None:
        """The output layer as a linear map that is not trained."""
        return None if self.linear is None or self.linear.trained else self.linear

    def logits(self, hidden: Tensor, temperature: float = 1.0) -> Tensor:
        """[M, V] of hidden states [M, H], divided by a temperature, with their graph."""
        logits: Tensor = self.module(hidden[None])[0]
        logits = logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
        return logits if temperature == 1 else logits / temperature


def find_output_head(module: nn.Module) -> OutputHead | None:
    """The decoder and output layer of a transformers model, under adapter wrappers too; None for other models."""
    base = transformers_base(module)
    head = None if base is None else base.get_output_embeddings()
    if base is None or not isinstance(head, nn.Module):
        return None
    softcap = getattr(base.config, "final_logit_softcapping", None)
    if softcap is not None and not softcap > 0:
        return None
    decoder, linear = _decoder(base.base_model), None
    changed = bool(head._forward_hooks or head._forward_pre_hooks) or "forward" in head.__dict__
    if type(head) is nn.Linear and not changed and head.weight.is_floating_point() and head.weight.dtype.itemsize > 1:
        linear = OutputLayer(decoder, head.weight, head.bias, softcap)
    return OutputHead(decoder, head, softcap, linear)


def _decoder(base_model: Any) -> nn.Module:
    """What the model itself calls: some (OPT) go past a module that does no more than hold their decoder."""
    inner: nn.Module = base_model.get_decoder()
    held, all_of_it = ({id(p) for p in module.parameters()} for module in (inner, base_model))
    return inner if held == all_of_it else base_model


def hidden_logprobs(
    layer: OutputLayer, batch: PaddedBatch, *, want_entropies: bool = False, temperature: float = 1.0
) -> ForwardResult:
    """As `align_logprobs` of `model_logits`, with logits of response tokens alone, a block at a time."""
    start = batch.first_scored
    hidden = hidden_states(layer, batch)
    scored, layer = batch.loss_mask[:, start:] == 1, layer.at(temperature)
    found = linear_token_logprobs(
        hidden[scored] if temperature == 1 else hidden[scored] / temperature,
        layer.weight,
        batch.input_ids[:, start:][scored],
        bias=layer.bias,
        softcap=layer.softcap,
        want_entropy=want_entropies,
    )
    return result_of_values(found.logprob, scored, hidden, batch, found.entropy)


def hidden_states(layer: OutputLayer, batch: PaddedBatch) -> Tensor:
    """[n, T - first_scored, H] hidden states that predict the columns ``first_scored`` .. T - 1."""
    output = layer.decoder(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    )
    hidden: Tensor = output.last_hidden_state[:, batch.first_scored - 1 : -1]
    return hidden
