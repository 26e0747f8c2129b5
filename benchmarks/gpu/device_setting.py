"""Settings of the probe's benchmark on a device: small ones made on the CPU and moved, large ones made where they run."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.probe.padded import Padded
from benchmarks.probe.setting import Setting, adamw, build, random_rollouts, stepped, with_lora
from benchmarks.probe.workloads import Workload


@dataclasses.dataclass
class DeviceSetting(Setting):
    """A setting whose model is on a device. Rollouts stay on the CPU, where samplers leave them.

    Attributes:
        device: ``cuda`` or ``cpu``.
    """

    device: str = "cpu"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.padded = _moved(self.padded, self.device)

    def autocast(self) -> AbstractContextManager[object]:
        """What forwards run under."""
        bfloat16 = self.workload.bfloat16
        return torch.autocast(self.device, torch.bfloat16) if bfloat16 else contextlib.nullcontext()

    @contextlib.contextmanager
    def for_a_while_in_float32(self) -> Iterator[DeviceSetting]:
        """The same numbers with nothing rounded to bfloat16 in the body, for a reference."""
        rounded = [p for p in self.model.parameters() if p.dtype == torch.bfloat16]
        for p in rounded:
            p.data = p.data.float()
        try:
            workload = dataclasses.replace(self.workload, bfloat16=False)
            yield DeviceSetting(workload, self.model, self.optimizer, self.update, self.entropy, self.device)
        finally:
            for p in rounded:
                p.data = p.data.to(torch.bfloat16)


def _moved(padded: Padded, device: str) -> Padded:
    return Padded(**{f.name: getattr(padded, f.name).to(device) for f in dataclasses.fields(padded)})


def small(workload: Workload, device: str) -> DeviceSetting:
    """The setting that the probe's benchmark makes on the CPU, moved: the same numbers on every device."""
    made = build(workload)
    made.model.to(device)
    for state in made.optimizer.state.values():
        # The count of steps stays where AdamW keeps it.
        state.update({name: value.to(device) for name, value in state.items() if name != "step"})
    return DeviceSetting(workload, made.model, made.optimizer, made.update, made.entropy, device)


def llama(workload: Workload, device: str) -> DeviceSetting:
    """A Llama of the workload's sizes with random weights, made on the device; its optimizer has stepped."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=workload.vocabulary,
        hidden_size=workload.hidden,
        intermediate_size=workload.intermediate,
        num_hidden_layers=workload.layers,
        num_attention_heads=workload.heads,
        num_key_value_heads=workload.key_value_heads,
        max_position_embeddings=workload.prompt_length + workload.response_length,
        tie_word_embeddings=True,
    )
    with torch.device(device):
        model: nn.Module = LlamaForCausalLM(config)
        if workload.bfloat16:
            # The parameters alone: rotary frequencies are float32 in a model that was loaded in bfloat16, too.
            for p in model.parameters():
                p.data = p.data.to(torch.bfloat16)
        adapted = with_lora(model, workload.rank)
    update = random_rollouts(workload)
    made = DeviceSetting(workload, adapted, adamw(adapted), update, None, device)
    stepped(made)
    return made
