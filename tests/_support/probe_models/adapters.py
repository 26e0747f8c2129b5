"""Small models with adapters of every kind that peft offers for linear maps and embeddings."""

from __future__ import annotations

import peft
import torch
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedModel

from probe_models.architectures import ROPE_SHAPE, WIDTH, build_model


def with_adapter(base: PreTrainedModel, config: peft.PeftConfig, *, seed: int = 1) -> peft.PeftModel:
    """``base`` with an adapter away from where adapters start, where they change nothing and much has no gradient.

    What is trained besides the adapter moves too, and is then no copy of what is frozen.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = peft.get_peft_model(base, config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * WIDTH)
    return model.train()


def lora_over(family: str, *, dtype: torch.dtype = torch.float64, **options: object) -> peft.PeftModel:
    """A model of ``family``, adapters included in ``dtype``; ``options`` are those of `peft.LoraConfig`."""
    config = peft.LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2", **options)
    return with_adapter(build_model(family, dtype=dtype), config).to(dtype)


def ia3_over(family: str) -> peft.PeftModel:
    """A model of ``family`` in fp64 with IA3 where peft places it by default."""
    config = peft.IA3Config(task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2")
    return with_adapter(build_model(family, dtype=torch.float64), config).double()


def gpt_oss_with_lora() -> nn.Module:
    """A model in fp64 whose attention has sinks, with LoRA on its queries and values."""
    config = GptOssConfig(
        **ROPE_SHAPE,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
        attn_implementation="eager",
        experts_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = GptOssForCausalLM(config).double()
        with torch.no_grad():
            for name, parameter in base.named_parameters():
                # Sinks and experts begin where nothing depends on them much.
                if "sinks" in name or "experts" in name or "router" in name:
                    parameter.normal_(std=WIDTH)
    lora = peft.LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    return with_adapter(base, lora).double()
