"""Responses of a policy to prompts of token ids, with nothing changed in whoever asks for them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

__all__ = ["generated"]


def generated(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Sequence[int]],
    generation: GenerationConfig,
    *,
    seed: int,
    prompts_per_batch: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Token ids after every prompt, ``num_return_sequences`` of each, prompt by prompt, with whatever follows their end.

    Train/eval flags, the model's own generation settings and random states come back as they were, also after an exception.

    Args:
        model: the policy.
        prompts: token ids of each.
        generation: all that the sampling is made of; the model's own settings are not looked at. It has a pad token.
        seed: of torch's generator.
        prompts_per_batch: prompts generated together.
        tokenizer: where the settings have stop strings; None elsewhere.
        on_step: called with decoding steps done, and in all if no response ends before its budget.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    flags = [(m, m.training) for m in model.modules()]
    own_generation = base.generation_config
    others = random.getstate(), np.random.get_state()
    devices = [model.device] if model.device.type == "cuda" else []
    rows: list[list[int]] = []
    try:
        model.eval()
        for module, training in flags:
            # bitsandbytes re-packs 4-bit weights for CPU inference, in place, the first time a layer in eval() is called.
            if type(module).__module__.startswith("bitsandbytes"):
                module.training = training
        # generate() fills whatever a given config leaves open from the model's own (penalties, min_p, ...), and every
        # such processor changes the policy that is sampled.
        base.generation_config = GenerationConfig()  # type: ignore[assignment]  # a mixin's attribute, seen as nn.Module's
        # Not inference_mode: what a model keeps of a forward may be trained with afterwards.
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(seed)
            starts = range(0, len(prompts), prompts_per_batch)
            told = _Told(on_step, len(starts) * int(generation.max_new_tokens or 0))
            for batch, start in enumerate(starts):
                told.so_far(batch * int(generation.max_new_tokens or 0))
                rows += _of_batch(model, prompts[start : start + prompts_per_batch], generation, tokenizer, told)
            told.so_far(told.total)
    finally:
        base.generation_config = own_generation
        for module, training in flags:
            module.training = training
        random.setstate(others[0])
        np.random.set_state(others[1])
    return rows


class _Told(StoppingCriteria):
    """Tells after every decoding step how many there were, and stops nothing."""

    def __init__(self, on_step: Callable[[int, int], None] | None, total: int) -> None:
        self._on_step, self.total, self._done = on_step, total, 0

    def so_far(self, done: int) -> None:
        """So many steps are done."""
        self._done = done
        if self._on_step is not None:
            self._on_step(done, self.total)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        """[N] of False."""
        # All steps are told as done when the last response has been made.
        self.so_far(min(self._done + 1, self.total - 1))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _of_batch(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Sequence[int]],
    generation: GenerationConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    told: _Told,
) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), int(generation.pad_token_id), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = 1
    found: Tensor = model.generate(  # type: ignore[operator]  # nn.Module's __getattr__ hides the method
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=generation,
        stopping_criteria=StoppingCriteriaList([told]),
        tokenizer=tokenizer,
    )
    rows: list[list[int]] = found[:, width:].tolist()
    return rows
