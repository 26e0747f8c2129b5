"""What the documentation's code takes as given: a policy in the middle of its training, and rollouts of it.

Pages speak of ``model``, ``optimizer``, ``rollouts`` and so on without making them, as a training script has them already. Here
they are, tiny and real, together with the files that the pages' commands name.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peft import LoraConfig, get_peft_model
from small_policy import WORDS, digit_count, policy, saved_run, tasks, tokenizer
from tiny_trl import tiny_trainer
from torch import Tensor

from entropy_fast import Rollouts, fast_delta_h1
from entropy_fast.sampling import SamplingSettings, sample_rollouts

RESPONSES = 4


def stepped_policy(*, lora: bool) -> tuple[Any, torch.optim.Optimizer]:
    """A policy and the AdamW that has trained it for three steps."""
    model: Any = policy()
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):
        ids = torch.randint(3, len(WORDS), (4, 12))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def sampled(model: Any, prompts: int = 8, seed: int = 0) -> Rollouts:
    """Rewarded responses of the policy as it is now, with the log-probs that they were sampled with."""
    settings = SamplingSettings(responses_per_prompt=RESPONSES, max_new_tokens=6, seed=seed)
    return sample_rollouts(model, tokenizer(), tasks(prompts), digit_count, settings)


def policy_loss_of(model: Any, rollouts: Rollouts) -> Tensor:
    """A policy-gradient loss of the whole batch, with its graph."""
    logits = model(input_ids=rollouts.input_ids, attention_mask=rollouts.attention_mask).logits[:, :-1].float()
    logprobs = logits.log_softmax(-1).gather(-1, rollouts.input_ids[:, 1:, None])[..., 0]
    weights = rollouts.advantages[:, None].float() * rollouts.loss_mask[:, 1:]
    return -(logprobs * weights).mean()


def of_other_trainers(rollouts: Rollouts, start: int, folder: Path) -> dict[str, Any]:
    """The same rollouts as verl and prime-rl hold them, and a table of completions as TRL writes it."""
    prompts, responses = rollouts.input_ids[:, :start], rollouts.input_ids[:, start:]
    weights = rollouts.advantages[:, None] * rollouts.loss_mask
    verl = {
        "prompts": prompts, "responses": responses, "input_ids": rollouts.input_ids,
        "attention_mask": rollouts.attention_mask, "response_mask": rollouts.loss_mask[:, start:],
        "advantages": weights[:, start:],
    }  # fmt: skip
    packed: dict[str, Any] = {
        name: [] for name in ("input_ids", "loss_mask", "advantages", "position_ids", "sequence_lengths")
    }
    for row in (0, 1, 2, 4, 5, 6):  # three responses to each of two prompts
        real = rollouts.attention_mask[row].bool()
        packed["input_ids"] += rollouts.input_ids[row, real].tolist()
        packed["loss_mask"] += rollouts.loss_mask[row, real].bool().tolist()
        packed["advantages"] += weights[row, real].tolist()
        packed["position_ids"] += range(int(real.sum()))
        packed["sequence_lengths"].append(int(real.sum()))
    tokens = len(packed["input_ids"])
    packed |= {"inference_logprobs": [-1.0] * tokens, "temperatures": [1.0] * tokens}
    completions = folder / "output" / "completions"
    completions.mkdir(parents=True)
    rows = [
        {"step": 5, "prompt": f"{n // 2} plus", "completion": f"{n} is", "reward": float(n), "advantage": n - 1.5}
        for n in range(4)
    ]
    pq.write_table(pa.Table.from_pylist(rows), completions / "completions_00005.parquet")
    uid = np.array([f"prompt {group}" for group in rollouts.group_ids.tolist()], dtype=object)
    return {
        "data_proto": SimpleNamespace(batch=verl, non_tensor_batch={"uid": uid}, meta_info={"temperature": 1.0}),
        "micro_batches": [SimpleNamespace(**packed)],
    }  # fmt: skip


def of_trl(model: Any, rollouts: Rollouts, start: int, folder: Path) -> dict[str, Any]:
    """What a script has before it makes a GRPOTrainer, one that was made, and a batch of its."""
    trainer = tiny_trainer(folder / "trainer", per_device_train_batch_size=32, gradient_accumulation_steps=1)
    trainer.current_gradient_accumulation_steps = 1
    prompt, mask = rollouts.input_ids[:, :start], rollouts.attention_mask[:, :start]
    inputs = {
        "prompt_ids": prompt, "prompt_mask": mask, "completion_ids": rollouts.input_ids[:, start:],
        "completion_mask": rollouts.loss_mask[:, start:], "advantages": rollouts.advantages.float(),
        "num_items_in_batch": rollouts.loss_mask.sum(),
    }  # fmt: skip
    return {
        "trainer": trainer, "inputs": inputs, "policy": trainer.model, "reward_function": trainer.reward_funcs[0],
        "arguments": trainer.args, "dataset": trainer.train_dataset,
    }  # fmt: skip


def given(folder: Path) -> dict[str, Any]:
    """The names that pages use without making them; in ``folder`` the files that they name.

    ``folder`` becomes what relative paths are relative to, which is the caller's to arrange.
    """
    run = saved_run(folder / "FOLDER")
    shutil.copytree(run / "base", folder / "BASE")
    shutil.copytree(run, folder / "run")
    (folder / "run" / "run.json").unlink()
    for step in (5, 20):
        shutil.copytree(run, folder / "policies" / "small" / f"step-{step}")
    shutil.copytree(run / "adapter", folder / "ADAPTER")
    shutil.copy(run / "rollouts.jsonl", folder / "rollouts.jsonl")
    torch.manual_seed(0)
    model, optimizer = stepped_policy(lora=True)
    (folder / "checkpoint-500").mkdir()
    for name in ("checkpoint-500/optimizer.pt", "optimizer.pt", "optimizer_0"):
        torch.save(optimizer.state_dict(), folder / name)
    rollouts, other = sampled(model), sampled(model, seed=1)
    start = int(rollouts.loss_mask.argmax(-1).min())
    coefficients = rollouts.advantages.double()[:, None] * rollouts.loss_mask / len(rollouts.loss_mask)
    by_token = rollouts.advantages[:, None].float() * rollouts.loss_mask
    return {
        "model": model, "optimizer": optimizer, "rollouts": rollouts, "other_responses": other, "update_batch": rollouts,
        "other_batch": other, "large_batch": sampled(model, 10, seed=2), "rewards": rollouts.rewards, "tokenizer": tokenizer(),
        "ids": rollouts.input_ids, "attention_mask": rollouts.attention_mask, "response_mask": rollouts.loss_mask,
        "groups": rollouts.group_ids, "advantages": rollouts.advantages, "prompt_width": start,
        "n_prompts": 8, "n_responses": RESPONSES, "training_step": 1,
        "policy_loss": policy_loss_of(model, rollouts), "loss": policy_loss_of(model, rollouts),
        "your_loss": lambda logprobs, entropies: -(logprobs * by_token[:, start:]).mean(),
        "other_loss": lambda logprobs, entropies: -(logprobs.exp() * by_token).mean(),
        "a": coefficients, "e": None, "result": fast_delta_h1(model, optimizer, rollouts),
        **of_trl(model, rollouts, start, folder), **of_other_trainers(rollouts, start, folder),
    }  # fmt: skip
