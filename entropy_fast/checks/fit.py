"""Does the model know these tokens, and can it see that far? Asked before a forward fails with an index error."""

from __future__ import annotations

from torch import nn

from entropy_fast.errors import RolloutsError
from entropy_fast.rollouts import Rollouts

__all__ = ["check_rollouts_fit_model"]


def check_rollouts_fit_model(rollouts: Rollouts, module: nn.Module) -> None:
    """Raise when token ids exceed the embedding, or sequences the model's learned positions.

    Raises:
        RolloutsError: they do; the message gives both numbers.
    """
    attended = rollouts.input_ids[rollouts.attention_mask == 1]
    embedding = getattr(module, "get_input_embeddings", lambda: None)()
    size = getattr(embedding, "num_embeddings", None)
    if size is not None and int(attended.max()) >= size:
        raise RolloutsError(
            f"Rollouts: `input_ids` holds token id {int(attended.max())}, the model's embedding has {size} rows.",
            fix="use the tokenizer that belongs to this model; resize embeddings as in training.",
        )
    limit = getattr(getattr(module, "config", None), "n_positions", None)
    longest = int(rollouts.attention_mask.sum(-1).max())
    if isinstance(limit, int) and longest > limit:
        raise RolloutsError(
            f"Rollouts: the longest sequence has {longest} tokens, the model has {limit} learned positions.",
            fix="drop or truncate sequences as training does.",
        )
