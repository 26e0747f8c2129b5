"""A pretrained model and text that it sampled."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from benchmarks.probe.workloads import Workload
from entropy_fast import Rollouts
from entropy_fast.demo.arithmetic import arithmetic_tasks
from entropy_fast.rollouts import read_rollouts, write_rollouts
from entropy_fast.run_folder.model_source import ModelSource, load_model, load_tokenizer
from entropy_fast.sampling import VERIFIERS, SamplingSettings, sample_rollouts


def pretrained_model(name: str, bfloat16: bool) -> nn.Module:
    """The model `ModelSource` finds under ``name``."""
    return load_model(ModelSource(name, dtype="bfloat16" if bfloat16 else "float32"))


def text_rollouts(model: nn.Module, workload: Workload, file: Path) -> Rollouts:
    """Responses to one-digit products, rewarded by the verifier, from ``file``; sampled and written if it is not there."""
    assert workload.pretrained is not None
    if not file.exists():
        tokenizer = load_tokenizer(ModelSource(workload.pretrained))
        sampling = SamplingSettings(
            responses_per_prompt=workload.responses, max_new_tokens=workload.response_length, seed=0
        )
        tasks = arithmetic_tasks(workload.prompts, seed=0)
        sampled = sample_rollouts(model, tokenizer, tasks, VERIFIERS["last-number"], sampling)
        # A group whose rewards are all alike has no update; noise gives every prompt its part in the measurement.
        file.parent.mkdir(parents=True, exist_ok=True)
        write_rollouts(_with_update(sampled), file)
    return read_rollouts(file)


def _with_update(rollouts: Rollouts) -> Rollouts:
    """The same text, rewards plus a little noise, so that no advantage is 0 whatever was sampled."""
    assert rollouts.rewards is not None
    noise = torch.randn(rollouts.n_sequences, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Rollouts(
        input_ids=rollouts.input_ids,
        attention_mask=rollouts.attention_mask,
        loss_mask=rollouts.loss_mask,
        group_ids=rollouts.group_ids,
        rewards=rollouts.rewards + 0.1 * noise,
        max_lengths=rollouts.max_lengths,
        temperature=rollouts.temperature,
        top_p=rollouts.top_p,
        top_k=rollouts.top_k,
        min_p=rollouts.min_p,
    )
