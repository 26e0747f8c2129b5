"""How a batch is cut for the one-pass engine, and what that costs: a cost model read off the model, and the plan it leads to.

Legend: P and Q tokens of prompts and of responses that go through the decoder, M scored tokens, H hidden size, V vocabulary.

Operations are counted as a multiply and an add each. A token costs 2 operations per weight of every linear map on its way
forward, as many backward, and 2 more per trained weight and kind of signal (X, g); a scored token costs 4 H V in the output
layer. Bytes are what autograd keeps of a token: what goes into a linear map and what comes out of it. Both are estimates that
serve to choose; neither is a measurement.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from entropy_fast.checks.model_state import checkpointed_modules

__all__ = ["CostModel", "Plan", "cut"]

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
            weight = next(submodule.parameters(recurse=False))
            linear += sizes[0] * sizes[1]
            trained += sizes[0] * sizes[1] if weight.requires_grad else 0
            kept += (sizes[0] + sizes[1]) * max(2, weight.element_size())
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


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the one-pass engine went through a batch.

    Attributes:
        way: how sequences were laid out and log-probs taken.
        captured: how many parameters were captured.
        kernel_kept: whether every unit's gradients were kept, which gives the whole kernel.
        microbatches: in one sweep over the batch.
        largest_microbatch: tokens.
        sweeps: over a batch, each one forward and one backward or more.
        backwards: of a sweep: 2 where coefficients differ from token to token, once for X and once for Y.
        prompt_forwards: how often a sweep runs the tokens that a prompt's responses share forward: 2 where they stand in the
            row of the responses, once for X and once for Y.
        prompt_backwards: and how often backward.
        operations: estimate, multiplies and adds.
        stored_bytes: of the gradients that were kept.
        activation_bytes: estimate, of the largest microbatch.
        reasons: why it was chosen.
    """

    way: str
    captured: str
    kernel_kept: bool
    microbatches: int
    largest_microbatch: int
    sweeps: int
    backwards: int
    prompt_forwards: int
    prompt_backwards: int
    operations: float
    stored_bytes: int
    activation_bytes: int
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        kept = "every unit's gradients kept" if self.kernel_kept else "a second sweep for projections"
        prompts = ""
        if self.backwards > 1:
            prompts = "; coefficients differ from token to token, so X and Y take a backward each"
        elif self.prompt_forwards > 1:
            prompts = ", with the prompts' tokens in it once for X and once for Y"
        elif self.prompt_backwards > 1:
            prompts = f" (and {self.prompt_backwards} through the prompts' tokens)"
        return (
            f"{self.way}; {self.captured}; {kept}; {self.microbatches} microbatch(es) of at most {self.largest_microbatch} "
            f"tokens; {self.sweeps} sweep(s) of one forward and {_number(self.backwards)}{prompts}; about "
            f"{self.operations / 1e9:.3g} billion operations, {_size(self.stored_bytes)} of gradients and "
            f"{_size(self.activation_bytes)} of activations. " + "; ".join(self.reasons) + "."
        )


def cut(tokens: Sequence[int], limit: int) -> list[list[int]]:
    """Consecutive units in groups of about equal numbers of tokens.

    Args:
        tokens: of every unit.
        limit: tokens a group should not exceed; a unit that does stands alone.

    Returns:
        Unit numbers of every group.
    """
    rest = sum(tokens)  # from the group under way on
    share = _share(rest, limit)
    groups: list[list[int]] = [[]]
    held = 0
    for number, own in enumerate(tokens):
        # The boundary nearest to an equal share, as long as the limit holds.
        if groups[-1] and (held + own > limit or held + own / 2 > share):
            # What earlier groups have more or less than their share is spread over those to come.
            rest -= held
            share = _share(rest, limit)
            groups.append([])
            held = 0
        groups[-1].append(number)
        held += own
    return groups


def _share(tokens: int, limit: int) -> float:
    """Tokens of each group when as few as can be are equal."""
    return tokens / max(1, -(-tokens // max(1, limit)))


def _number(backwards: int) -> str:
    return "one backward" if backwards == 1 else f"{backwards} backwards"


def _size(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"
