"""A GRPO trainer of TRL's on a tiny random model, in seconds on a CPU; offline."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 8, "num_generations": 4, "gradient_accumulation_steps": 2, "max_completion_length": 6,
    "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-3, "report_to": "none", "save_strategy": "no",
    "use_cpu": True, "bf16": False, "seed": 7, "disable_tqdm": True, "gradient_checkpointing": False,
}  # fmt: skip
WORDS = ["<pad>", "<eos>", "<unk>", *(str(n) for n in range(30)), "plus", "is"]


def tiny_tokenizer(words: Sequence[str] = WORDS, *, kind: Any = None, **special: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return (kind or PreTrainedTokenizerFast)(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left", **special
    )


def tiny_model(*, dropout: float = 0.0, spread: float = 0.3, family: str = "qwen2", tied: bool = False) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    if family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=len(WORDS), n_embd=24, n_layer=2, n_head=2, n_positions=64, eos_token_id=1, pad_token_id=0,
                       initializer_range=spread, attn_pdrop=dropout, resid_pdrop=dropout, embd_pdrop=dropout)
        )  # fmt: skip
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(WORDS), hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, eos_token_id=1, pad_token_id=0, initializer_range=spread, attention_dropout=dropout,
            tie_word_embeddings=tied,
        )
    )  # fmt: skip


def even_numbers(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(w.isdigit() and int(w) % 2 == 0 for w in c.split())) + 0.1 * len(c.split()) for c in completions]


def tiny_trainer(
    folder: Path, *, model: Any = None, lora: bool = False, kind: Any = None, extra: dict[str, Any] | None = None,
    reward: Any = even_numbers, rows: list[dict[str, Any]] | None = None, tokenizer: Any = None, **options: Any,
) -> Any:  # fmt: skip
    """A trainer of 16 responses a step unless the options say otherwise; two prompt lengths, so that rows are padded."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    rows = rows or [
        {"prompt": f"{a} plus {b} is" if (a + b) % 2 else f"{a} plus {b} plus {b} is"}
        for a in range(5)
        for b in range(5)
    ]
    return (kind or GRPOTrainer)(
        model=tiny_model() if model is None else model,
        reward_funcs=reward,
        args=GRPOConfig(output_dir=str(folder), **{**SETTINGS, **options}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer or tiny_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if lora else None,
        **(extra or {}),
    )
