"""Sample G responses for each prompt and make them rollouts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from entropy_fast.errors import SamplingError
from entropy_fast.rollouts import Rollouts
from entropy_fast.sampling.generating import generated
from entropy_fast.sampling.tasks import PromptTask, format_prompt
from entropy_fast.sampling.verifiers import Verifier
from entropy_fast.scalars import as_number

__all__ = ["SamplingSettings", "sample_rollouts"]

LARGEST_TOP_K = 2**31 - 1  # more than any vocabulary


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How responses are sampled.

    Args:
        responses_per_prompt: G, at least 2 (the leave-one-out baseline needs another response).
        max_new_tokens: generation budget, recorded as L_max.
        temperature, top_p: of the sampler; anything but (1, 1) biases the entropy gradient, and the result says so.
        top_k: of the sampler; None, 0 and -1 for none, kept as None. Biases likewise.
        min_p: of the sampler; 0 for none. Biases likewise.
        stop: strings that end a response.
        seed: of torch's generator; the caller's random state is left alone.
        prompts_per_batch: prompts generated together.

    Raises:
        SamplingError: a value that cannot be used.
    """

    responses_per_prompt: int = 8
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    prompts_per_batch: int = 8
    top_k: int | None = None
    min_p: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "top_k", 0 if self.top_k is None else self.top_k)
        fractions = ("temperature", "top_p", "min_p")
        for field in ("responses_per_prompt", "max_new_tokens", "prompts_per_batch", "seed", "top_k", *fractions):
            number = as_number(getattr(self, field))
            if number is None or (isinstance(number, float) and field not in fractions):
                raise SamplingError(
                    f"sampling: `{field}` is {getattr(self, field)!r}.", fix="pass a number, an integer for counts."
                )
            object.__setattr__(self, field, number)
        for field, low in (("responses_per_prompt", 2), ("max_new_tokens", 1), ("prompts_per_batch", 1)):
            if getattr(self, field) < low:
                raise SamplingError(f"sampling: `{field}` is {getattr(self, field)}.", fix=f"use {low} or more.")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise SamplingError(
                f"sampling: `temperature` is {self.temperature}.", fix="use a number above 0; 1 for an unbiased probe."
            )
        if not 0 < self.top_p <= 1:
            raise SamplingError(
                f"sampling: `top_p` is {self.top_p}.", fix="use a number in (0, 1]; 1 for an unbiased probe."
            )
        if not 0 <= self.min_p < 1:
            raise SamplingError(
                f"sampling: `min_p` is {self.min_p}.", fix="use a number in [0, 1); 0 for an unbiased probe."
            )
        assert self.top_k is not None
        if not -1 <= self.top_k <= LARGEST_TOP_K:
            raise SamplingError(
                f"sampling: `top_k` is {self.top_k}.", fix="use 1 or more tokens; 0 for all, and an unbiased probe."
            )
        object.__setattr__(self, "top_k", self.top_k if self.top_k > 0 else None)


def sample_rollouts(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[PromptTask],
    verifier: Verifier,
    settings: SamplingSettings,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Rollouts:
    """G responses to every task, rewarded by the verifier.

    Args:
        model: the policy; its train/eval flags come back as they were.
        tokenizer: its tokenizer; prompts go through the chat template where there is one.
        tasks: B prompts.
        verifier: response text and task -> reward.
        settings: see `SamplingSettings`.
        on_progress: called with a stage, decoding steps done, and decoding steps in all if no response ends before its budget.

    Returns:
        Rollouts of B·G sequences in task order, with rewards and group-centred advantages.

    Raises:
        SamplingError: no task, no end-of-sequence token, or the verifier refused a task.
    """
    if not tasks:
        raise SamplingError("sampling: no prompt was given.", fix="pass at least one prompt.")
    for task in tasks:
        verifier("", task)  # refuses a task now that it would refuse after hours of sampling
    prompts = [format_prompt(task, tokenizer) for task in tasks]
    responses = generated(
        model,
        prompts,
        _generation_config(tokenizer, settings),
        seed=settings.seed,
        prompts_per_batch=settings.prompts_per_batch,
        tokenizer=tokenizer if settings.stop else None,
        on_step=None if on_progress is None else lambda done, total: on_progress("sampling", done, total),
    )
    g = settings.responses_per_prompt
    rows = [(i // g, prompts[i // g], _cut(response, tokenizer, settings.stop)) for i, response in enumerate(responses)]
    return _as_rollouts(rows, tokenizer, tasks, verifier, settings)


def _generation_config(tokenizer: PreTrainedTokenizerBase, settings: SamplingSettings) -> GenerationConfig:
    if tokenizer.eos_token_id is None:
        raise SamplingError("sampling: the tokenizer has no end-of-sequence token.", fix="set tokenizer.eos_token.")
    pad = tokenizer.pad_token_id
    return GenerationConfig(
        do_sample=True,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k or 0,
        min_p=settings.min_p or None,
        max_new_tokens=settings.max_new_tokens,
        num_return_sequences=settings.responses_per_prompt,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if pad is None else pad,
        stop_strings=list(settings.stop) or None,
    )


def _cut(response: list[int], tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> list[int]:
    """The response up to and including its first end-of-sequence token or the token that completes a stop string."""
    if tokenizer.eos_token_id in response:
        response = response[: response.index(tokenizer.eos_token_id) + 1]
    if stop:
        for end in range(1, len(response) + 1):
            text = _decode(tokenizer, response[:end])
            if any(mark in text for mark in stop):
                return response[:end]
    return response


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int], skip_special_tokens: bool = False) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))


def _as_rollouts(
    rows: Sequence[tuple[int, list[int], list[int]]],
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[PromptTask],
    verifier: Verifier,
    settings: SamplingSettings,
) -> Rollouts:
    texts = [_decode(tokenizer, response, skip_special_tokens=True) for _, _, response in rows]
    rewards = [verifier(text, tasks[task]) for text, (task, _, _) in zip(texts, rows, strict=True)]
    width = max(len(prompt) + len(response) for _, prompt, response in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.int64)
    attention, loss = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (_, prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        attention[row, :end] = 1
        loss[row, len(prompt) : end] = 1
    return Rollouts(
        input_ids=ids,
        attention_mask=attention,
        loss_mask=loss,
        group_ids=torch.tensor([task for task, _, _ in rows]),
        rewards=torch.tensor(rewards, dtype=torch.float64),
        max_lengths=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        min_p=settings.min_p,
        prompts=[task.prompt for task in tasks],
        responses=texts,
    )
