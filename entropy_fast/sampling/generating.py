"""Responses of a policy to prompts of token ids, with nothing changed in whoever asks for them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["generated"]


def generated(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Sequence[int]],
    generation: GenerationConfig,
    *,
    seed: int,
    prompts_per_batch: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    on_batch: Callable[[int], None] | None = None,
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
        on_batch: called with how many prompts are done.
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
            for start in range(0, len(prompts), prompts_per_batch):
                part = prompts[start : start + prompts_per_batch]
                rows += _of_batch(model, part, generation, tokenizer)
                if on_batch is not None:
                    on_batch(start + len(part))
    finally:
        base.generation_config = own_generation
        for module, training in flags:
            module.training = training
        random.setstate(others[0])
        np.random.set_state(others[1])
    return rows


def _of_batch(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Sequence[int]],
    generation: GenerationConfig,
    tokenizer: PreTrainedTokenizerBase | None,
) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), int(generation.pad_token_id), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = 1
    found: Tensor = model.generate(  # type: ignore[operator]  # nn.Module's __getattr__ hides the method
        ids.to(model.device), attention_mask=mask.to(model.device), generation_config=generation, tokenizer=tokenizer
    )
    rows: list[list[int]] = found[:, width:].tolist()
    return rows
