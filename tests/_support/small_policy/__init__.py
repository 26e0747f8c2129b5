"""A tiny policy with a tokenizer, in memory and on disk, for tests of sampling and of the command line."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from entropy_fast.atomic import atomic_path
from entropy_fast.rollouts import write_rollouts
from entropy_fast.run_folder.manifest import RunManifest, write_manifest
from entropy_fast.run_folder.model_source import ModelSource
from entropy_fast.sampling import PromptTask, SamplingSettings, sample_rollouts

# transformers finds out how a tokenizer joins words by tokenising "abcdef".
WORDS = ["<eos>", "<pad>", "<unk>", *map(str, range(10)), "plus", "times", "is", "[red]", "stop", "abcdef"]


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def policy(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        eos_token_id=0,
        pad_token_id=1,
        bos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def tasks(count: int = 4) -> list[PromptTask]:
    return [PromptTask(f"{n} plus {n + 1} is", str(2 * n + 1)) for n in range(count)]


def digit_count(response: str, task: PromptTask) -> float:
    """A reward that differs between responses of an untrained policy."""
    return float(sum(word.isdigit() for word in response.split()))


def saved_model(folder: Path) -> Path:
    policy().save_pretrained(str(folder))
    tokenizer().save_pretrained(str(folder))
    return folder


def saved_run(folder: Path) -> Path:
    """A run folder with a LoRA that has been stepped, its optimizer state, and rollouts from it."""
    torch.manual_seed(1)
    base = saved_model(folder / "base")
    model = get_peft_model(policy(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert isinstance(model, PeftModel)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3)
    for _ in range(3):
        ids = torch.randint(3, len(WORDS), (4, 12))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    settings = SamplingSettings(responses_per_prompt=3, max_new_tokens=6)
    rollouts = sample_rollouts(model, tokenizer(), tasks(), digit_count, settings)
    model.save_pretrained(str(folder / "adapter"))
    with atomic_path(folder / "optimizer.pt") as temporary:
        torch.save(optimizer.state_dict(), temporary)
    write_rollouts(rollouts, folder / "rollouts.jsonl")
    write_manifest(RunManifest(ModelSource(str(base)), "rollouts.jsonl", "optimizer.pt", "adapter"), folder)
    return folder
