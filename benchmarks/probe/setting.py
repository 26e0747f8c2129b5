"""A workload made real: model, stepped optimizer, rollouts. The same seed gives the same setting in every process."""

from __future__ import annotations

import contextlib
import dataclasses
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.probe.padded import Padded, padded_of
from benchmarks.probe.plain_step import plain_step
from benchmarks.probe.workloads import LORA_TARGETS, Workload
from entropy_fast import Rollouts

STEPS = 3  # of AdamW, so that second moments are real
LORA_B_STD = 0.02  # B is away from 0, or the factors A would have no gradient


@dataclasses.dataclass
class Setting:
    """What every contender gets.

    Attributes:
        workload: what it was made from.
        model: in train mode, without dropout.
        optimizer: AdamW that has stepped on all trained parameters.
        update: the batch the update is made from.
        entropy: the other batch of the two-batch estimate; None with one batch.
    """

    workload: Workload
    model: nn.Module
    optimizer: torch.optim.Optimizer
    update: Rollouts
    entropy: Rollouts | None

    def __post_init__(self) -> None:
        self.padded: Padded = padded_of(self.update)
        self.padded_entropy: Padded | None = None if self.entropy is None else padded_of(self.entropy)

    def autocast(self) -> AbstractContextManager[object]:
        """What forwards run under."""
        return torch.autocast("cpu", torch.bfloat16) if self.workload.bfloat16 else contextlib.nullcontext()

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return torch.bfloat16 if self.workload.bfloat16 else None

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name, each once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def in_float32(self) -> Setting:
        """The same numbers with nothing rounded to bfloat16 any more, for a reference. Parameters are converted in place."""
        self.model.float()
        return Setting(
            dataclasses.replace(self.workload, bfloat16=False), self.model, self.optimizer, self.update, self.entropy
        )


def build(workload: Workload, rollouts_file: Path | None = None) -> Setting:
    """Make the setting.

    Args:
        workload: what to make.
        rollouts_file: where sampled text is kept, written if it is not there; for pretrained models alone.
    """
    torch.manual_seed(0)
    if workload.pretrained is not None:
        # What samples text needs the packages of the demo.
        from benchmarks.probe.text_rollouts import pretrained_model, text_rollouts

        model: nn.Module = pretrained_model(workload.pretrained, workload.bfloat16)
        adapted = with_lora(model, workload.rank)
        assert rollouts_file is not None and workload.batches == 1
        batches = [text_rollouts(adapted, workload, rollouts_file)]
    else:
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=workload.vocabulary,
                hidden_size=workload.hidden,
                intermediate_size=workload.intermediate,
                num_hidden_layers=workload.layers,
                num_attention_heads=workload.heads,
                num_key_value_heads=workload.key_value_heads,
                tie_word_embeddings=True,
            )
        )
        if workload.bfloat16:
            model.to(torch.bfloat16)
        adapted = with_lora(model, workload.rank)
        batches = [random_rollouts(workload) for _ in range(workload.batches)]
    return stepped(Setting(workload, adapted, adamw(adapted), batches[0], batches[1] if len(batches) > 1 else None))


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """Of the trained parameters."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def stepped(setting: Setting) -> Setting:
    """The same setting, in train mode and with an optimizer that has stepped."""
    setting.model.train()
    for step in range(STEPS):
        # Other advantages each time: gradients that differ, over rollouts of the same shape.
        part = setting.padded.part(step % 2, step % 2 + 2)
        noise = torch.randn(part.advantages.shape).to(part.advantages.device)
        plain_step(setting.model, dataclasses.replace(part, advantages=noise), setting.autocast())
        setting.optimizer.step()
    setting.optimizer.zero_grad(set_to_none=True)
    return setting


def with_lora(model: nn.Module, rank: int | None) -> nn.Module:
    """LoRA on every linear map of a layer, away from its start at zero; the model as it is where ``rank`` is None."""
    if rank is None:
        return model
    adapted = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(LORA_TARGETS), task_type="CAUSAL_LM")
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=LORA_B_STD)
    return adapted


def random_rollouts(workload: Workload) -> Rollouts:
    """Rollouts of random tokens, prompts padded on the left, group-centred advantages."""
    B, G, P, R = workload.prompts, workload.responses, workload.prompt_length, workload.response_length
    prompt_lengths = torch.randint(P // 2 if workload.ragged else P, P + 1, (B, 1, 1))
    response_lengths = torch.randint(R // 4 if workload.ragged else R, R + 1, (B, G, 1))
    ids = torch.randint(3, workload.vocabulary, (B, G, P + R))
    ids[:, :, :P] = ids[:, :1, :P]
    column = torch.arange(P + R)
    attention = ((column >= P - prompt_lengths) & (column < P + response_lengths)).long()
    advantages = torch.randn(B, G)
    return Rollouts.from_dict(
        {
            "sequences": ids * attention,
            "attention_masks": attention,
            "prompt_lens": torch.full((B,), P),
            "advantages": advantages - advantages.mean(1, keepdim=True),
            "max_lengths": torch.full((B,), R),
            "temperature": 1.0,
            "top_p": 1.0,
        }
    )
