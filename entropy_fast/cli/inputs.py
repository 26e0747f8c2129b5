"""From command-line options or a run folder to model, optimizer state and rollouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entropy_fast.cli.model_options import model_source
from entropy_fast.cli.probe_options import changed_options
from entropy_fast.columns import TokenScores
from entropy_fast.config import EstimateOptions, RunOptions
from entropy_fast.errors import ConfigError, MissingTokenizerError, RunFolderError
from entropy_fast.rollouts import Rollouts, read_rollouts
from entropy_fast.run_folder.adapter import load_policy
from entropy_fast.run_folder.bundle_reading import BUNDLE_NAME, Bundle, read_bundle
from entropy_fast.run_folder.manifest import read_manifest
from entropy_fast.run_folder.model_source import ModelSource, load_tokenizer
from entropy_fast.step import OptimizerAtHand, optimizer_from_file

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
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
    bundle: Bundle | None = None

    def read_rollouts(self) -> tuple[Rollouts, Rollouts | None]:
        """Update batch and, where there is one, entropy batch."""
        entropy = None if self.entropy_rollouts is None else read_batch(self.entropy_rollouts, self.model)
        return read_batch(self.rollouts, self.model), entropy

    @property
    def files(self) -> dict[str, Path | None]:
        """What is read, by what it is."""
        return {
            "adapter": self.adapter,
            "optimizer": self.optimizer,
            "rollouts": self.rollouts,
            "entropy rollouts": self.entropy_rollouts,
        }

    def coefficients(self, update: Rollouts) -> Tensor | tuple[Tensor, Tensor] | None:
        """The update by token, of a bundle; None where options describe it."""
        return None if self.bundle is None else self.bundle.coefficients(update)

    def scores(self, update: Rollouts) -> TokenScores | None:
        """What the policy said of every token when a bundle was kept; None where that is not known."""
        return None if self.bundle is None else self.bundle.scores(update)

    def updates(self, candidates: Mapping[str, Any], update: Rollouts) -> dict[str, Any]:
        """Other updates to compare, by name; beside a bundle's gradient as coefficients that are clipped as it is.

        Raises:
            ConfigError: the bundle does not say what clipping did, or there are no scores to work them out from.
        """
        if self.bundle is None or not candidates:
            return dict(candidates)
        clip, scores = self.bundle.facts.get("clip"), self.bundle.scores(update)
        if isinstance(clip, bool) or not isinstance(clip, (int, float)) or not clip > 0 or scores is None:
            lacks = "what clipping multiplied its gradient by (facts: clip)" if scores is not None else "scores"
            raise ConfigError(f"--candidate beside a kept step, which has not {lacks}.", fix="leave it out.")
        from entropy_fast.columns.candidate_tables import candidate_tables

        given = self.bundle.coefficients(update)
        return dict(candidate_tables(candidates, given, scores, update, self.estimate, float(clip)))

    def load(self) -> tuple[PreTrainedModel | PeftModel, OptimizerAtHand]:
        """Model (with its adapter, and the gradient of a bundle) and the optimizer matched to it."""
        if self.bundle is not None:
            model, state = self.bundle.load(self.model)
            return model, OptimizerAtHand(state)
        policy = load_policy(self.model, self.adapter)
        return policy, optimizer_from_file(self.optimizer, policy)


def read_batch(path: Path, source: ModelSource) -> Rollouts:
    """One rollouts file; the tokenizer is loaded only when its rows are texts."""
    try:
        return read_rollouts(path)
    except MissingTokenizerError:
        return read_rollouts(path, tokenizer=load_tokenizer(source))


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
        optimizer: file or checkpoint folder, likewise.
        rollouts: update batch, likewise.
        entropy_rollouts: entropy batch, likewise.
        options: of the probe, likewise.

    Raises:
        ConfigError: neither gives a model, an optimizer file and rollouts, an option has a value outside what there is, or a
            kept step is given files of another.
        RunFolderError: a file is none.
        BundleError: the folder is a kept step that is not whole.
    """
    if folder is None:
        model = model_source(None, **model_options)
        missing = [
            name
            for name, value in (("--model", model), ("--optimizer", optimizer), ("--rollouts", rollouts))
            if value is None
        ]
        if model is None or optimizer is None or rollouts is None:
            raise ConfigError(
                f"no run folder was given, and {', '.join(missing)} is missing.",
                fix="pass a run folder (entropy-fast probe runs/demo), or all of --model, --optimizer, --rollouts and, for "
                "LoRA, --adapter.",
            )
        estimate, run = changed_options(EstimateOptions(), RunOptions(), options)
        found = Inputs(model, adapter, optimizer, rollouts, entropy_rollouts, estimate, run)
    else:
        device = model_options.get("device")
        model_source(
            None, name=str(folder), device=device
        )  # one that is not there is the command line's, not the folder's
        bundle = read_bundle(folder, device=device) if (folder / BUNDLE_NAME).exists() else None
        if bundle is not None:
            refuse_others(adapter, optimizer, rollouts)
        manifest = read_manifest(folder, device=device) if bundle is None else bundle.manifest
        if bundle is None and (manifest.gradient is not None or manifest.coefficients is not None):
            bundle = read_bundle(folder)  # says what is missing
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
            bundle=bundle,
        )
    require_no_pipe(found.optimizer, or_folder=True)
    for path in (found.rollouts, found.entropy_rollouts):
        require_no_pipe(path)
    return found


def refuse_others(adapter: Path | None, optimizer: Path | None, rollouts: Path | None) -> None:
    """Raise where a bundle is to be probed with files of another step.

    Raises:
        ConfigError: one of them is given.
    """
    for name, path in (("--adapter", adapter), ("--optimizer", optimizer), ("--rollouts", rollouts)):
        if path is not None:
            raise ConfigError(
                f"{name} {path} beside a kept step, whose gradient and coefficients belong to its own files.",
                fix="leave it out, or pass all files one by one without the folder.",
            )


def require_no_pipe(path: Path | None, *, or_folder: bool = False) -> None:
    """Raise where reading could wait for ever: on a pipe that nobody writes to, or a device. A missing file is not looked at.

    Args:
        path: what is to be read; None for nothing.
        or_folder: whether it may be a folder.

    Raises:
        RunFolderError: it is something other than a file.
    """
    if path is not None and path.exists() and not path.is_file() and not (or_folder and path.is_dir()):
        raise RunFolderError(f"{path} is not a file.", fix="check the path.")
