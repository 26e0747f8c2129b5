"""Is this a causal language model, does it know these tokens, and can it see that far? Asked before any forward."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

import torch
from torch import nn

from entropy_fast.errors import ModelStateError, RolloutsError
from entropy_fast.rollouts import Rollouts

__all__ = ["check_rollouts_fit_model"]

# What stands in a sequence for pixels or sound, which the model puts in its place: "image_token_id", "audio_token_index", ...
PLACEHOLDER = re.compile(r"(image|video|vision|audio|speech)_token_(id|index)")


def check_rollouts_fit_model(rollouts: Rollouts, module: nn.Module) -> None:
    """Raise when the model is no causal language model, or the rollouts hold what it cannot take.

    Args:
        rollouts: the sequences.
        module: the model, unwrapped; one without a ``config`` is taken for what it says it is.

    Raises:
        ModelStateError: it is an encoder-decoder, or attends in both directions.
        RolloutsError: token ids exceed the embedding, sequences the learned positions, or a token stands for an image, a
            video or sound, for which rollouts have no place.
    """
    config = getattr(module, "config", None)
    _check_causal(module, config)
    attended = rollouts.input_ids[rollouts.attention_mask == 1]
    embedding = getattr(module, "get_input_embeddings", lambda: None)()
    size = getattr(embedding, "num_embeddings", None)
    if size is not None and int(attended.max()) >= size:
        raise RolloutsError(
            f"Rollouts: `input_ids` holds token id {int(attended.max())}, the model's embedding has {size} rows.",
            fix="use the tokenizer that belongs to this model; resize embeddings as in training.",
        )
    present = set(torch.unique(attended).tolist())
    for name, token in _placeholders(config):
        if token in present:
            row = int(((rollouts.input_ids == token) & (rollouts.attention_mask == 1)).any(-1).nonzero()[0])
            raise RolloutsError(
                f"Rollouts: `input_ids` holds token {token} in row {row}, the model's {name}, a placeholder of pixels or sound "
                "for which rollouts have no place; its own embedding means nothing.",
                fix="probe with prompts of text alone.",
            )
    limit = getattr(config, "n_positions", None)
    longest = int(rollouts.attention_mask.sum(-1).max())
    if isinstance(limit, int) and longest > limit:
        raise RolloutsError(
            f"Rollouts: the longest sequence has {longest} tokens, the model has {limit} learned positions.",
            fix="drop or truncate sequences as training does.",
        )


def _check_causal(module: nn.Module, config: object) -> None:
    if getattr(config, "is_encoder_decoder", False) is True:
        found = "an encoder-decoder"
    elif _attends_both_ways(config):
        found = (
            f"a model that attends in both directions ({getattr(config, 'model_type', '?')}, not set up as a decoder)"
        )
    else:
        return
    raise ModelStateError(
        f"{type(module).__name__} is {found}; the log-prob of a token is then not that of sampling it.",
        fix="probe a causal language model (of such a family: one whose config has is_decoder=True and that was trained so).",
    )


def _attends_both_ways(config: object) -> bool:
    """Whether transformers knows models of this config for filling in masks, and the config does not make it a decoder."""
    transformers = sys.modules.get("transformers")  # no config of its can be there otherwise
    if transformers is None or not isinstance(config, transformers.PretrainedConfig):
        return False
    decoder = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    return not decoder and type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING


def _placeholders(config: object) -> Iterator[tuple[str, int]]:
    """Names and ids of placeholders in a config and the configs within it (of its text, vision and audio parts)."""
    for name, value in getattr(config, "__dict__", {}).items():
        if PLACEHOLDER.fullmatch(name) and isinstance(value, int) and not isinstance(value, bool):
            yield name, value
        elif name.endswith("_config") and hasattr(value, "__dict__"):
            yield from _placeholders(value)
