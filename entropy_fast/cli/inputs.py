"""From command-line options or a run folder to model, optimizer state and rollouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entropy_fast.cli.model_options import model_source
from entropy_fast.cli.probe_options import changed_options
from entropy_fast.config import EstimateOptions, RunOptions
from entropy_fast.errors import MissingTokenizerError, RunFolderError
from entropy_fast.rollouts import Rollouts, read_rollouts
from entropy_fast.run_folder.adapter import attach_adapter
from entropy_fast.run_folder.manifest import read_manifest
from entropy_fast.run_folder.model_source import ModelSource, load_model, load_tokenizer
from entropy_fast.step import AdamState, adam_state_from_file

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["Inputs", "load_policy", "read_batch", "require_no_pipe", "resolve"]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Where everything of one probe is, and how it is done. Paths are absolute or relative to the working directory."""

    model: ModelSource
    adapter: Path | None
    optimizer: Path
    rollouts: Path
    entropy_rollouts: Path | None
    estimate: EstimateOptions
    run: RunOptions

    def read_rollouts(self) -> tuple[Rollouts, Rollouts | None]:
        """Update batch and, where there is one, entropy batch."""
        entropy = None if self.entropy_rollouts is None else read_batch(self.entropy_rollouts, self.model)
        return read_batch(self.rollouts, self.model), entropy

    def load(self) -> tuple[PreTrainedModel | PeftModel, AdamState]:
        """Model (with its adapter) and the optimizer state matched to it."""
        model = load_policy(self.model, self.adapter)
        return model, adam_state_from_file(self.optimizer, model)


def read_batch(path: Path, source: ModelSource) -> Rollouts:
    """One rollouts file; the tokenizer is loaded only when its rows are texts."""
    try:
        return read_rollouts(path)
    except MissingTokenizerError:
        return read_rollouts(path, tokenizer=load_tokenizer(source))


def load_policy(source: ModelSource, adapter: Path | None) -> PreTrainedModel | PeftModel:
    """The model with its adapter; without an adapter all floating-point parameters are trainable."""
    base = load_model(source)
    return base if adapter is None else attach_adapter(base, adapter)


def resolve(
    folder: Path | None,
    model_options: Mapping[str, Any],
    adapter: Path | None,
    optimizer: Path | None,
    rollouts: Path | None,
    entropy_rollouts: Path | None,
    options: Mapping[str, Any],
) -> Inputs:
    """A run folder's inputs with single options put over them, or options alone.

    Args:
        folder: folder with ``run.json``, or None.
        model_options: fields of `ModelSource` from the command line; None means not given.
        adapter: folder of a LoRA adapter, from the command line.
        optimizer: ``optimizer.pt``, likewise.
        rollouts: update batch, likewise.
        entropy_rollouts: entropy batch, likewise.
        options: of the probe, likewise.

    Raises:
        RunFolderError: neither gives a model, an optimizer file and rollouts, or one of them is no file.
        ConfigError: an option of the probe has a value outside what there is.
    """
    if folder is None:
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
        estimate, run = changed_options(EstimateOptions(), RunOptions(), options)
        found = Inputs(model, adapter, optimizer, rollouts, entropy_rollouts, estimate, run)
    else:
        manifest = read_manifest(folder)
        chosen = model_source(manifest.model, **model_options)
        assert chosen is not None
        stored_adapter = None if manifest.adapter is None else folder / manifest.adapter
        stored_entropy = None if manifest.entropy_rollouts is None else folder / manifest.entropy_rollouts
        estimate, run = changed_options(manifest.estimate, manifest.run, options)
        found = Inputs(
            model=chosen,
            adapter=adapter or stored_adapter,
            optimizer=optimizer or folder / manifest.optimizer,
            rollouts=rollouts or folder / manifest.rollouts,
            entropy_rollouts=entropy_rollouts or stored_entropy,
            estimate=estimate,
            run=run,
        )
    for path in (found.optimizer, found.rollouts, found.entropy_rollouts):
        require_no_pipe(path)
    return found


def require_no_pipe(path: Path | None) -> None:
    """Raise where reading could wait for ever: on a pipe that nobody writes to, or a device. A missing file is not looked at.

    Raises:
        RunFolderError: it is something other than a file.
    """
    if path is not None and path.exists() and not path.is_file():
        raise RunFolderError(f"{path} is not a file.", fix="check the path.")
