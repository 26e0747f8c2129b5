"""From command-line options or a run folder to model, optimizer state and rollouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from transformers import PreTrainedModel

from entropy_fast.cli.model_options import model_source
from entropy_fast.config import EstimateOptions, RunOptions
from entropy_fast.errors import ConfigError, MissingTokenizerError, RunFolderError
from entropy_fast.rollouts import Rollouts, read_rollouts
from entropy_fast.run_folder.manifest import ProbeSettings, read_manifest
from entropy_fast.run_folder.model_source import ModelSource, attach_adapter, load_model, load_tokenizer
from entropy_fast.step import AdamState, adam_state_from_file

__all__ = ["Inputs", "load_policy", "resolve"]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Where everything of one probe is. Paths are absolute or relative to the working directory."""

    model: ModelSource
    adapter: Path | None
    optimizer: Path
    rollouts: Path
    entropy_rollouts: Path | None
    settings: ProbeSettings

    def options(self) -> tuple[EstimateOptions, RunOptions]:
        """The probe options.

        Raises:
            ConfigError: one has a value outside what there is, or ``clip_high`` is given without ``clip``.
        """
        s = self.settings
        if s.clip is None and s.clip_high is not None:
            raise ConfigError("clip_high is given without clip.", fix="pass both, or clip alone for the two.")
        estimate = EstimateOptions(
            weighting=cast(Any, s.weighting),
            entropy_estimator=cast(Any, s.entropy_estimator),
            importance_ratio=cast(Any, s.importance_ratio),
            clip_range=None if s.clip is None else (s.clip, s.clip if s.clip_high is None else s.clip_high),
            blocks=s.blocks,
            learning_rate=s.learning_rate,
        )
        run = RunOptions(
            prompts_per_microbatch=s.prompts_per_microbatch,
            full_kernel=s.full_kernel,
            by_sequence=s.by_sequence,
            accumulate_on=cast(Any, s.accumulate_on),
            conditional_variance=cast(Any, s.conditional_variance),
            strict=s.strict,
            max_excluded_share=s.max_excluded_share,
            autocast_dtype="bfloat16" if s.autocast_bfloat16 else None,
        )
        return estimate, run if s.memory_budget is None else dataclasses.replace(run, memory_budget=s.memory_budget)

    def read_rollouts(self) -> tuple[Rollouts, Rollouts | None]:
        """Update batch and, where there is one, entropy batch."""
        update = self.read_batch(self.rollouts, self.model)
        entropy = None if self.entropy_rollouts is None else self.read_batch(self.entropy_rollouts, self.model)
        return update, entropy

    @staticmethod
    def read_batch(path: Path, source: ModelSource) -> Rollouts:
        """One rollouts file; the tokenizer is loaded only when its rows are texts."""
        try:
            return read_rollouts(path)
        except MissingTokenizerError:
            return read_rollouts(path, tokenizer=load_tokenizer(source))

    def load(self) -> tuple[PreTrainedModel | PeftModel, AdamState]:
        """Model (with its adapter) and the optimizer state matched to it."""
        model = load_policy(self.model, self.adapter)
        return model, adam_state_from_file(self.optimizer, model)


def load_policy(source: ModelSource, adapter: Path | None) -> PreTrainedModel | PeftModel:
    """The model with its adapter; without an adapter all floating-point parameters are trainable."""
    base = load_model(source)
    return base if adapter is None else attach_adapter(base, adapter)


def resolve(
    run: Path | None,
    model_options: Mapping[str, Any],
    adapter: Path | None,
    optimizer: Path | None,
    rollouts: Path | None,
    entropy_rollouts: Path | None,
) -> Inputs:
    """A run folder's inputs with single options put over them, or options alone.

    Args:
        run: folder with ``run.json``, or None.
        model_options: fields of `ModelSource` from the command line; None means not given.
        adapter: folder of a LoRA adapter, from the command line.
        optimizer: ``optimizer.pt``, likewise.
        rollouts: update batch, likewise.
        entropy_rollouts: entropy batch, likewise.

    Raises:
        RunFolderError: neither gives a model, an optimizer file and rollouts.
    """
    if run is None:
        model = model_source(None, **model_options)
        missing = [
            name
            for name, value in (("--model", model), ("--optimizer", optimizer), ("--rollouts", rollouts))
            if value is None
        ]
        if model is None or optimizer is None or rollouts is None:
            raise RunFolderError(
                f"no run folder was given, and {', '.join(missing)} is missing.",
                fix="pass a run folder (entropy-fast probe runs/demo), or all of --model, --optimizer, --rollouts and, for "
                "LoRA, --adapter.",
            )
        return Inputs(model, adapter, optimizer, rollouts, entropy_rollouts, ProbeSettings())
    manifest = read_manifest(run)
    chosen = model_source(manifest.model, **model_options)
    assert chosen is not None
    stored_adapter = None if manifest.adapter is None else run / manifest.adapter
    stored_entropy = None if manifest.entropy_rollouts is None else run / manifest.entropy_rollouts
    return Inputs(
        model=chosen,
        adapter=adapter or stored_adapter,
        optimizer=optimizer or run / manifest.optimizer,
        rollouts=rollouts or run / manifest.rollouts,
        entropy_rollouts=entropy_rollouts or stored_entropy,
        settings=manifest.probe,
    )
