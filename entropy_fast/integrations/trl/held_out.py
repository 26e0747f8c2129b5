"""Responses that have no part in a step, sampled by the policy before it, for prompts of the trainer's data set.

A step does more to the prompts that it was made from than to others. A forecast leaves a prompt's effect on itself out, being
about prompts outside of the batch; so it is held against what the step does to those. Half of the window's prompts, kept out
of the forecast, would be no evidence either: their responses are in the step.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel

from entropy_fast.checks.parameter_registry import unwrap_model
from entropy_fast.errors import ConfigError, RolloutsError
from entropy_fast.integrations.step_window import StepWindow
from entropy_fast.rollouts import Rollouts
from entropy_fast.sampling.generating import generated

__all__ = ["HeldOutResponses"]

TRIES = 4  # draws for every prompt that is wanted, some of which may be in the step
INSTEAD = "pass held_out, a function that returns such responses; or verify='previous'."


class HeldOutResponses:
    """Samples them when called; nothing of the trainer changes, random states included.

    Args:
        trainer: a ``trl.GRPOTrainer``.

    Raises:
        ConfigError: its responses are not made by the model alone, or its data set cannot be drawn from.
    """

    def __init__(self, trainer: Any) -> None:
        for name, what in (
            ("tools", "tools"), ("environment_factories", "an environment"), ("rollout_func", "a function of its own"),
        ):  # fmt: skip
            if getattr(trainer, name, None):
                raise ConfigError(f"verify='held_out': this trainer's responses are made with {what}.", fix=INSTEAD)
        if getattr(trainer, "_is_vlm", False) or not callable(getattr(trainer, "_tokenize_prompts", None)):
            raise ConfigError("verify='held_out': this trainer's prompts are not of text alone.", fix=INSTEAD)
        dataset = trainer.train_dataset
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise ConfigError(
                f"verify='held_out': a {type(dataset).__name__} cannot be drawn from without going through it.",
                fix=INSTEAD,
            )
        self._trainer = trainer

    def __call__(self, window: StepWindow, prompts: int) -> Rollouts:
        """Responses to other prompts than the step's.

        Args:
            window: of the step.
            prompts: how many are wanted; fewer come where the data set has few others.

        Raises:
            RolloutsError: it has not two others.
        """
        found = self.share(window, prompts, 0, 1)
        assert found is not None
        return found

    def share(self, window: StepWindow, prompts: int, rank: int, ranks: int) -> Rollouts | None:
        """Those of every prompt whose number is a rank's; see `SharedHeldOut`.

        Raises:
            RolloutsError: the data set has not two others; on all ranks.
        """
        trainer = self._trainer
        step = int(trainer.state.global_step)
        chosen = dict(list(enumerate(self._others(window, prompts, step)))[rank::ranks])
        if not chosen:
            return None
        responses = generated(
            cast(PreTrainedModel, unwrap_model(trainer.model)),
            list(chosen.values()),
            self._generation(),
            seed=step * ranks + rank,
            prompts_per_batch=max(1, len(window.rollouts.group_ids) // ranks // trainer.num_generations),
        )
        return self._as_rollouts(chosen, [self._cut(response) for response in responses])

    def _others(self, window: StepWindow, prompts: int, step: int) -> list[list[int]]:
        """Token ids of prompts that are drawn from the data set and not in the window."""
        dataset, taken = self._trainer.train_dataset, _prompts_of(window.rollouts)
        generator = torch.Generator().manual_seed(step)
        numbers = torch.randint(len(dataset), (TRIES * prompts,), generator=generator).tolist()
        rows = [copy.deepcopy(dataset[number]["prompt"]) for number in dict.fromkeys(numbers)]
        tokens = self._trainer._tokenize_prompts(rows)[0]
        others = dict.fromkeys(own for ids in tokens if (own := tuple(map(int, ids))) not in taken)
        if len(others) < 2:
            raise RolloutsError(
                f"of {len(rows)} prompts that were drawn from the data set {len(others)} are not in the step.",
                fix="use verify='previous', or a data set with more prompts than a step takes.",
            )
        return [list(own) for own in others][:prompts]

    def _generation(self) -> GenerationConfig:
        """How the trainer samples, for every prompt as often as it does."""
        trainer = self._trainer
        own = getattr(trainer, "generation_config", None)
        if own is None:  # where another engine samples
            own = GenerationConfig(
                do_sample=True,
                max_new_tokens=trainer.max_completion_length,
                pad_token_id=trainer.processing_class.pad_token_id,
                eos_token_id=trainer.eos_token_ids,
                temperature=trainer.temperature,
                top_p=trainer.top_p,
                top_k=trainer.top_k,
                min_p=trainer.min_p,
                repetition_penalty=trainer.repetition_penalty,
            )
        found = copy.deepcopy(own)
        found.num_return_sequences = trainer.num_generations
        return found

    def _cut(self, response: list[int]) -> list[int]:
        """Up to its end; nothing of one without an end where the trainer leaves those out."""
        ends = [place for place, token in enumerate(response) if token in self._trainer.eos_token_ids]
        if not ends:
            return [] if self._trainer.mask_truncated_completions else response
        return response[: ends[0] + 1]

    def _as_rollouts(self, prompts: Mapping[int, list[int]], responses: list[list[int]]) -> Rollouts:
        """Of prompts by their numbers."""
        trainer, times = self._trainer, len(responses) // len(prompts)
        repeated = [prompt for prompt in prompts.values() for _ in range(times)]
        rows = list(zip(repeated, responses, strict=True))
        width = max(len(prompt) + len(response) for prompt, response in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        attention, loss = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, (prompt, response) in enumerate(rows):
            end = len(prompt) + len(response)
            ids[row, :end] = torch.tensor(prompt + response)
            attention[row, :end] = 1
            loss[row, len(prompt) : end] = 1
        return Rollouts(
            input_ids=ids,
            attention_mask=attention,
            loss_mask=loss,
            group_ids=torch.tensor(list(prompts)).repeat_interleave(times),
            advantages=torch.zeros(len(rows), dtype=torch.float64),
            max_lengths=trainer.max_completion_length,
            temperature=float(trainer.temperature),
            top_p=float(trainer.top_p),
            top_k=trainer.top_k,
            min_p=trainer.min_p,
        )


def _prompts_of(rollouts: Rollouts) -> set[tuple[int, ...]]:
    """Token ids of every prompt of a batch."""
    found = set()
    for prompt in range(rollouts.n_prompts):
        for row in rollouts.rows_of_prompt(prompt).tolist():
            attended, counted = rollouts.attention_mask[row].cpu() == 1, rollouts.loss_mask[row].cpu() == 1
            if bool(counted.any()):
                before = torch.arange(len(counted)) < int(counted.int().argmax())
                found.add(tuple(rollouts.input_ids[row].cpu()[attended & before].tolist()))
                break
    return found
