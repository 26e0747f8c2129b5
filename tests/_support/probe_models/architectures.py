"""Small causal language models of several families, with and without LoRA, quantised or not.

Weights are drawn ten times wider than usual, so that attention and positions matter and a mistake in either shows.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable

import bitsandbytes
import peft
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 61
HIDDEN = 32
WINDOW = 4  # tokens; shorter than every sequence of the test batches
WIDTH = 0.2  # standard deviation of initial weights

ROPE_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": WIDTH,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def _qwen2(attention: str, dropout: float) -> PreTrainedModel:
    config = Qwen2Config(**ROPE_SHAPE, attention_dropout=dropout, attn_implementation=attention)
    return Qwen2ForCausalLM(config)


def _llama(attention: str, dropout: float) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**ROPE_SHAPE, attention_dropout=dropout, attn_implementation=attention))


def _mistral(attention: str, dropout: float) -> PreTrainedModel:
    config = MistralConfig(
        **ROPE_SHAPE, sliding_window=WINDOW, attention_dropout=dropout, attn_implementation=attention
    )
    return MistralForCausalLM(config)


def _gemma2(attention: str, dropout: float) -> PreTrainedModel:
    del attention  # soft-capped scores: transformers offers the eager path only
    config = Gemma2Config(
        **ROPE_SHAPE,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=WINDOW,
        attention_dropout=dropout,
        attn_implementation="eager",
    )
    return Gemma2ForCausalLM(config)


def _qwen3(attention: str, dropout: float) -> PreTrainedModel:
    config = Qwen3Config(**ROPE_SHAPE, head_dim=8, attention_dropout=dropout, attn_implementation=attention)
    return Qwen3ForCausalLM(config)


def _gemma3(attention: str, dropout: float) -> PreTrainedModel:
    config = Gemma3TextConfig(
        **ROPE_SHAPE,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],  # their rotary embeddings differ too
        attention_dropout=dropout,
        attn_implementation=attention,
    )
    return Gemma3ForCausalLM(config)


def _phi3(attention: str, dropout: float) -> PreTrainedModel:
    config = Phi3Config(
        **ROPE_SHAPE,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attention_dropout=dropout,
        attn_implementation=attention,
    )
    return Phi3ForCausalLM(config)


def _gpt2(attention: str, dropout: float) -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=HIDDEN,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=WIDTH,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        attn_implementation=attention,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config)


def _opt(attention: str, dropout: float) -> PreTrainedModel:
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        init_std=WIDTH,
        dropout=dropout,
        attention_dropout=dropout,
        layerdrop=dropout,
        attn_implementation=attention,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return OPTForCausalLM(config)


BUILDERS: dict[str, Callable[[str, float], PreTrainedModel]] = {
    "qwen2": _qwen2,
    "llama": _llama,
    "gpt2": _gpt2,
    "opt": _opt,
    "mistral": _mistral,
    "gemma2": _gemma2,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "phi3": _phi3,
}


def build_model(
    family: str = "qwen2",
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    dropout: float = 0.0,
    seed: int = 0,
    tied: bool | None = None,
) -> PreTrainedModel:
    """A two-layer model of a family, every parameter trainable, in ``train()``.

    The same seed gives the same weights whatever ``dropout`` is. ``tied`` makes the output layer's weight that of the
    embeddings; None leaves it as the family has it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BUILDERS[family](attention, dropout)
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return model.to(dtype).train()


def add_lora(
    model: nn.Module,
    *,
    dropout: float = 0.0,
    seed: int = 1,
    adapter: str = "default",
    targets: str | list[str] = "all-linear",
) -> peft.PeftModel:
    """LoRA on the targets (every linear map but the head), B matrices away from zero (at zero, A has no gradient at all)."""
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        fan_in_fan_out=isinstance(model, GPT2LMHeadModel),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model, config, adapter_name=adapter)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=WIDTH)
    return adapted.train()


def quantize_nf4(model: PreTrainedModel, *, compute_dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Replace every linear map but the head by a 4-bit one of bitsandbytes, in place."""
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or path == "lm_head":
            continue
        quantized = bitsandbytes.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            compute_dtype=compute_dtype,
            quant_type="nf4",
        )
        quantized.weight = bitsandbytes.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
        quantized.bias = module.bias
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, quantized.to("cpu"))  # moving it is what quantises it
    model.requires_grad_(False)
    model.is_loaded_in_4bit = True  # peft picks its 4-bit LoRA layer by this mark
    return model


def enable_checkpointing(model: nn.Module, *, reentrant: bool) -> None:
    """Gradient checkpointing as a training script switches it on, with inputs that require grad."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # renamed in recent transformers; the old name works in all
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()


def disable_checkpointing(model: nn.Module) -> None:
    with warnings.catch_warnings(), contextlib.suppress(AttributeError):
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_disable()


def stepped_adamw(model: nn.Module, *, learning_rate: float = 1e-4, steps: int = 2, seed: int = 2) -> torch.optim.AdamW:
    """AdamW over the trainable parameters after a few steps on made-up gradients, so that no second moment is zero."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in parameters:
            size = 0.05 + torch.rand(parameter.shape, generator=generator)
            parameter.grad = size.to(parameter.dtype)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer
