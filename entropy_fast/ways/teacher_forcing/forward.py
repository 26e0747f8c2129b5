"""Logits and aligned log-probs of given tokens.

A sampler's temperature has no place here. A temperature that belongs to the policy itself, because its loss is of log-probs of
logits/T, has: it is 1 unless it was asked for.
"""

from __future__ import annotations

import dataclasses
import inspect

import torch
from torch import Tensor, nn

from entropy_fast.columns import ScoredTokens
from entropy_fast.errors import ModelStateError
from entropy_fast.ops import token_logprobs
from entropy_fast.rollouts import Rollouts
from entropy_fast.ways.teacher_forcing.batch import PaddedBatch

__all__ = ["ForwardResult", "align_logprobs", "model_logits", "result_of_values"]


@dataclasses.dataclass(frozen=True)
class ForwardResult:
    """One teacher-forced forward of n sequences, graph attached.

    Attributes:
        sequence_logprobs: [n] S_i = sum of response token log-probs, nats.
        token_logprobs: [n, T - 1] log-prob of the token in column t + 1, nats; 0 outside the loss mask.
        response_lengths: [n] int64.
        logits: [n, k, V] what the model returned (columns ``first_scored - 1`` .. T - 2); the hidden states [n, k, H] of
            those columns where the output layer was not run by the model.
        scored: [n, T - 1] bool, whether the token in column t + 1 is one of the response.
        token_entropies: [n, T - 1] entropy of the distribution that the token in column t + 1 was drawn from, nats; 0 outside
            the loss mask; None unless wanted.
    """

    sequence_logprobs: Tensor
    token_logprobs: Tensor
    response_lengths: Tensor
    logits: Tensor
    scored: Tensor
    token_entropies: Tensor | None = None

    @property
    def logprobs(self) -> Tensor:
        """[M] log-probs of the scored tokens, sequence by sequence, with their graph."""
        return self.token_logprobs[self.scored]

    @property
    def entropies(self) -> Tensor | None:
        """[M] entropies likewise; None where they were not computed."""
        return None if self.token_entropies is None else self.token_entropies[self.scored]

    def scored_tokens(self, rollouts: Rollouts, rows: Tensor) -> ScoredTokens:
        """What this forward of the given rows said, without a graph.

        Raises:
            GraphDetachedError, RolloutsError: a log-prob is not finite.
        """
        entropies = self.entropies
        return ScoredTokens(
            rollouts,
            rows,
            self.sequence_logprobs.detach(),
            self.logprobs.detach(),
            None if entropies is None else entropies.detach(),
        )


def model_logits(module: nn.Module, batch: PaddedBatch) -> Tensor:
    """Logits that predict the columns ``first_scored`` .. T - 1 of ``batch``.

    Args:
        module: a causal language model that takes ``input_ids`` and ``attention_mask`` and returns an object with
            ``logits`` (or a tensor); ``position_ids``, ``use_cache`` and ``logits_to_keep`` are passed where its forward
            names them.
        batch: the sequences.

    Returns:
        [n, T - first_scored, V] logits.

    Raises:
        ModelStateError: the output has no logits of that shape.
    """
    accepted = _forward_parameters(module)
    n_columns = batch.input_ids.shape[1] - batch.first_scored
    arguments: dict[str, object] = {}
    if "position_ids" in accepted:
        arguments["position_ids"] = batch.position_ids
    if "use_cache" in accepted:
        arguments["use_cache"] = False
    if "logits_to_keep" in accepted:
        arguments["logits_to_keep"] = n_columns + 1
    output = module(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **arguments)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[1] < n_columns + 1:
        found = (
            f"logits {list(logits.shape)}"
            if isinstance(logits, Tensor)
            else f"a {type(output).__name__} without logits"
        )
        raise ModelStateError(
            f"the forward of {type(module).__name__} returned {found}; expected [n, columns, V] with at least "
            f"{n_columns + 1} columns.",
            fix="probe a causal language model (AutoModelForCausalLM).",
        )
    return logits[:, -(n_columns + 1) : -1]


def align_logprobs(
    logits: Tensor, batch: PaddedBatch, *, want_entropies: bool = False, temperature: float = 1.0
) -> ForwardResult:
    """Log-probs of the response tokens and their sums per sequence.

    Accumulates in fp32, or in the dtype of the logits where that is wider.

    Args:
        logits: [n, T - first_scored, V] from `model_logits`.
        batch: the sequences those logits belong to.
        want_entropies: whether the entropy at every response token is computed too.
        temperature: T of the policy softmax(logits/T).
    """
    start = batch.first_scored
    scored = batch.loss_mask[:, start:] == 1
    chosen = logits[scored] if temperature == 1 else logits[scored] / temperature
    found = token_logprobs(chosen, batch.input_ids[:, start:][scored], want_entropy=want_entropies)
    return result_of_values(found.logprob, scored, logits, batch, found.entropy)


def result_of_values(
    values: Tensor, scored: Tensor, logits: Tensor, batch: PaddedBatch, entropies: Tensor | None = None
) -> ForwardResult:
    """Token log-probs back in their places, and summed by sequence.

    Args:
        values: [number of scored tokens] log-probs, in the order of ``scored``.
        scored: [n, T - first_scored] bool, which tokens were scored.
        logits: what the log-probs were taken from.
        batch: the sequences.
        entropies: [number of scored tokens] entropies, likewise; None where they were not computed.
    """
    n, width = batch.input_ids.shape
    start = batch.first_scored

    def in_place(found: Tensor) -> Tensor:
        # masked_scatter and a row sum, not index_add: that one is not deterministic on CUDA.
        table = found.new_zeros(n, width - 1)
        return torch.cat([table[:, : start - 1], table[:, start - 1 :].masked_scatter(scored, found)], dim=1)

    tokens = in_place(values)
    return ForwardResult(
        sequence_logprobs=tokens.sum(-1),
        token_logprobs=tokens,
        response_lengths=batch.loss_mask.sum(-1),
        logits=logits,
        scored=batch.loss_mask[:, 1:] == 1,
        token_entropies=None if entropies is None else in_place(entropies),
    )


def _forward_parameters(module: nn.Module) -> set[str]:
    """Names the forward of the language model under adapter wrappers accepts."""
    base = getattr(module, "get_base_model", None)
    inner = base() if callable(base) else module
    return set(inspect.signature(inner.forward).parameters)
