"""Token ids of prompts and responses that are given as texts."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["LONE_SURROGATE", "prompt_token_ids", "token_ids"]

# JSON escapes can spell what UTF-8 cannot, and tokenizers refuse it with an error that names no row.
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
SAMPLE = "a"


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
    """Ids of every text, with or without what the tokenizer puts around it; nothing is padded or cut."""
    if not texts:
        return []
    encoding = tokenizer(
        list(texts),
        add_special_tokens=special,
        padding=False,
        truncation=False,
        verbose=False,
        return_attention_mask=False,
    )
    return [list(ids) for ids in encoding["input_ids"]]


def prompt_token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of prompts: what the tokenizer puts in front of a text is kept, what it puts behind it is not.

    A text that brings its own beginning (a rendered chat template starts with BOS) gets no second one. What a tokenizer
    appends (EOS, SEP) would stand between prompt and response, where no sampler saw it.
    """
    # What a tokenizer puts around a text is seen on one that holds no special token.
    *plain, plain_sample = token_ids(tokenizer, [*texts, SAMPLE])
    *special, special_sample = token_ids(tokenizer, [*texts, SAMPLE], special=True)
    beginning, ending = _around(plain_sample, special_sample, set(tokenizer.all_special_ids))
    return [
        alone if alone and alone[0] in beginning else whole[: len(whole) - len(ending)]
        for alone, whole in zip(plain, special, strict=True)
    ]


def _around(plain: list[int], special: list[int], special_ids: Collection[int]) -> tuple[list[int], list[int]]:
    """What stands in ``special`` in front of ``plain`` and behind it."""
    size = len(plain)
    for at in range(len(special) - size + 1):
        if special[at : at + size] == plain:
            return special[:at], special[at + size :]
    # The text is tokenised otherwise after a special token.
    kept = [at for at, token in enumerate(special) if token not in special_ids]
    return (special[: kept[0]], special[kept[-1] + 1 :]) if kept else (special, [])
