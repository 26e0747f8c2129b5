"""What a sweep of the one-pass engine costs: a model of it read off the language model.

Legend: P and Q tokens of prompts and of responses that go through the decoder, M scored tokens, H hidden size, V vocabulary.

Operations are counted as a multiply and an add each. A token costs 2 operations per weight of every linear map on its way
forward, as many backward, and 2 more per trained weight and kind of signal (X, g); a scored token costs 4 H V in the output
layer. Bytes are what autograd keeps of a token: what goes into a linear map and what comes out of it. Both are estimates that
serve to choose; neither is a measurement.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from entropy_fast.checks.model_state import checkpointed_modules

__all__ = ["CostModel"]

# Tokens in one forward from which on more of them only take memory: products run at full rate, and the calls of a forward and
# a backward are few beside them. A quarter as many where whole matrices are trained: larger products. Measured on a CPU.
_FULL_RATE = {"cpu": 4096}
_FULL_RATE_ELSEWHERE = 16384


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Operations and bytes of a model, by token.

    Attributes:
        linear: weights of the linear maps that every token goes through.
        trained: those of them that are trained.
        output: weights of the output layer.
        bytes_per_token: that a forward keeps for its backward.
        full_rate_tokens: tokens in one forward at which products run at their full rate.
    """

    linear: int
    trained: int
    output: int
    bytes_per_token: int
    full_rate_tokens: int

    @classmethod
    def of(cls, model: nn.Module, module: nn.Module, device: torch.device) -> CostModel:
        """Read off a model: ``module`` is what runs the forward, ``model`` what wraps it."""
        unwrap = getattr(module, "get_base_model", None)
        base = unwrap() if callable(unwrap) else module
        head = getattr(base, "get_output_embeddings", lambda: None)()
        linear = trained = kept = 0
        for submodule in module.modules():
            sizes = _sizes(submodule)
            if sizes is None or submodule is head:
                continue
            # A map may have its weight from elsewhere (a bank of vectors, a parametrization) and none of its own.
            own = list(submodule.parameters())
            linear += sizes[0] * sizes[1]
            trained += sizes[0] * sizes[1] if any(parameter.requires_grad for parameter in own) else 0
            kept += (sizes[0] + sizes[1]) * max([2, *(parameter.element_size() for parameter in own[:1])])
        if checkpointed_modules(model):
            layers = getattr(getattr(base, "config", None), "num_hidden_layers", 1)
            kept = kept // max(1, layers) * 2
        sizes = None if head is None else _sizes(head)
        return cls(
            linear=linear,
            trained=trained,
            output=0 if sizes is None else sizes[0] * sizes[1],
            bytes_per_token=kept,
            full_rate_tokens=_FULL_RATE.get(device.type, _FULL_RATE_ELSEWHERE) // (4 if 2 * trained > linear else 1),
        )

    def operations(
        self,
        prefix: int,
        tail: int,
        scored: int,
        labels: int,
        prompt_forwards: int = 1,
        *,
        backwards: int = 1,
        entropies: bool = False,
    ) -> float:
        """Of one sweep over P, Q and M tokens with ``labels`` kinds of signal; attention scores are not counted.

        Args:
            prefix: P.
            tail: Q.
            scored: M.
            labels: 1 or 2, of X and Y.
            prompt_forwards: how often the P tokens run forward.
            backwards: through the Q tokens.
            entropies: whether the output layer gives gradients of entropies beside those of log-probs.
        """
        once = 2.0 * self.linear
        responses = tail * ((1 + backwards) * once + 2.0 * labels * self.trained)
        prompts = prefix * (prompt_forwards * once + labels * (once + 2.0 * self.trained))
        return responses + prompts + (6.0 if entropies else 4.0) * scored * self.output


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """In and out features of a linear map, quantised or not."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, torch.Tensor):
        return weight.shape[0], weight.shape[1]
    return None
