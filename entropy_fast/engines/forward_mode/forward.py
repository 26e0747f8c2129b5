"""One forward with tangents: log-probs of the response tokens, and their derivatives along a direction of the parameters."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from entropy_fast.engines.forward_mode.functions import FunctionsWithTangents
from entropy_fast.engines.forward_mode.output import derivatives_of_hidden, derivatives_of_logits
from entropy_fast.engines.forward_mode.parameters import parameters_with_tangents, without_checkpointing
from entropy_fast.engines.forward_mode.quantized import quantized_modules, quantized_with_tangents
from entropy_fast.engines.forward_mode.refusals import naming_the_operator
from entropy_fast.errors import ForwardDerivativeError
from entropy_fast.reference import linear_logits
from entropy_fast.ways.teacher_forcing import (
    ForwardResult,
    OutputLayer,
    PaddedBatch,
    find_output_head,
    hidden_states,
    model_logits,
    result_of_values,
)

__all__ = ["ForwardDerivatives", "ForwardWithTangents"]

# Largest difference of a logit, relative to the largest of all: far below what a scale or a bias does, above rounding.
_ALLOWED_LOGITS = {torch.float64: 1e-6, torch.float32: 1e-3}
_ALLOWED_LOGITS_IN_16_BITS = 0.02

Autocast = Callable[[], contextlib.AbstractContextManager[object]]


@dataclasses.dataclass(frozen=True)
class ForwardDerivatives:
    """n sequences, without a graph.

    Attributes:
        values: log-probs and, where wanted, entropies.
        tokens: [n, T - 1] derivative of the log-prob of the token in column t + 1, nats per unit step along the direction;
            0 outside the loss mask.
        entropies: [n, T - 1] derivative of the entropy of the distribution that token was drawn from, likewise; None unless
            wanted.
    """

    values: ForwardResult
    tokens: Tensor
    entropies: Tensor | None


class ForwardWithTangents:
    """Forwards of one model; memory is that of a forward without a graph, twice, whatever the number of layers.

    Args:
        module: the model, not wrapped.
        parameters: its trainable parameters.
        autocast: makes the context of every forward.
        first: a batch of few sequences, on which it is tried once whether the output layer can be told from the model.
        temperature: T of the policy softmax(logits/T).
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Sequence[Tensor],
        autocast: Autocast,
        first: PaddedBatch,
        temperature: float = 1.0,
    ) -> None:
        self._module, self._parameters, self._autocast = module, list(parameters), autocast
        self._temperature = temperature
        self._quantized = quantized_modules(module)
        self.output_layer: OutputLayer | None = None
        head = find_output_head(module)
        if head is not None and head.linear is not None:
            with torch.no_grad(), autocast():
                self.output_layer = head.linear if same_logits(module, head.linear, first) else None

    @property
    def plan(self) -> str:
        """How log-probs are obtained, in words."""
        layer = self.output_layer
        if layer is None:
            return "log-probs and their derivatives from the model's own logits and their tangents"
        kind = "trained output layer, its own derivative added in blocks" if layer.trained else "frozen output layer"
        return f"log-probs and their derivatives from hidden states without logits ({kind})"

    def run(
        self, batch: PaddedBatch, direction: Sequence[Tensor], *, want_entropies: bool = False
    ) -> ForwardDerivatives:
        """Log-probs and their derivatives.

        Args:
            batch: the sequences.
            direction: one tensor a parameter, in its shape, dtype and device.
            want_entropies: whether entropies of the response tokens' distributions and their derivatives are wanted too.

        Raises:
            ForwardDerivativeError: an operation of the model has no forward derivative, or a derivative is not finite.
            GraphDetachedError: a log-prob is NaN.
        """
        scored = batch.loss_mask[:, batch.first_scored :] == 1
        targets = batch.input_ids[:, batch.first_scored :][scored]
        along = {id(p): t for p, t in zip(self._parameters, direction, strict=True)}
        with self._tangents(direction, along), naming_the_operator(self._module):
            layer, T = self.output_layer, self._temperature
            out = model_logits(self._module, batch) if layer is None else hidden_states(layer, batch)
            chosen = out[scored] if T == 1 else out[scored] / T
            if layer is None:
                found = derivatives_of_logits(chosen, targets, want_entropies=want_entropies)
            else:
                of_bias = along.get(id(layer.bias))
                found = derivatives_of_hidden(
                    chosen,
                    layer.at(T),
                    targets,
                    along.get(id(layer.weight)),
                    of_bias if of_bias is None else of_bias / T,
                    want_entropies=want_entropies,
                )
        values = result_of_values(found.logprobs, scored, out, batch, found.entropies)
        for name, derivatives in (("log-probs", found.of_logprobs), ("entropies", found.of_entropies)):
            if derivatives is not None and not bool(derivatives.isfinite().all()):
                bad = int((~derivatives.isfinite()).sum())
                raise ForwardDerivativeError(
                    f"engine 'jvp': {bad} of {derivatives.numel()} derivatives of token {name} are not finite although the "
                    "log-probs are.",
                    fix="use bfloat16 in place of float16, or engine='one_pass'.",
                )
        along_direction = result_of_values(found.of_logprobs, scored, out, batch, found.of_entropies)
        return ForwardDerivatives(values, along_direction.token_logprobs, along_direction.token_entropies)

    @contextlib.contextmanager
    def _tangents(self, direction: Sequence[Tensor], along: dict[int, Tensor]) -> Iterator[None]:
        with (
            torch.no_grad(),
            without_checkpointing(self._module),
            forward_ad.dual_level(),
            parameters_with_tangents(self._module, self._parameters, direction, self._quantized),
            quantized_with_tangents(self._quantized, along),
            sdpa_kernel(SDPBackend.MATH),
            FunctionsWithTangents(),
            self._autocast(),
        ):
            yield


def same_logits(module: nn.Module, layer: OutputLayer, batch: PaddedBatch) -> bool:
    """Whether the output layer gives the model's own logits for ``batch``; needs no graph."""
    expected = model_logits(module, batch)
    try:
        hidden = hidden_states(layer, batch)
    except (TypeError, AttributeError):
        # The decoder takes other arguments, or returns something else.
        return False
    found = linear_logits(hidden.flatten(0, 1), layer.weight, layer.bias, layer.softcap)
    if found.numel() != expected.numel():
        return False
    difference = (found.view_as(expected).double() - expected.double()).abs().max()
    allowed = _ALLOWED_LOGITS.get(expected.dtype, _ALLOWED_LOGITS_IN_16_BITS)
    return bool(difference <= allowed * expected.double().abs().max())
