"""A kept training step, read: every file is found to be the one that was written before anything of it is used.

A bundle is a run folder with a ``manifest.json`` beside ``run.json``. The manifest is written last, names every file with its
hash, and hashes itself; a folder without it is no bundle.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from entropy_fast.columns import TokenScores
from entropy_fast.digests import sha256_of
from entropy_fast.errors import BundleError
from entropy_fast.rollouts import Rollouts, read_rollouts
from entropy_fast.run_folder.adapter import load_policy
from entropy_fast.run_folder.manifest import MANIFEST_NAME, RunManifest, read_manifest
from entropy_fast.run_folder.model_source import ModelSource
from entropy_fast.run_folder.restoring import put_gradients, take_dtypes
from entropy_fast.run_folder.token_tables import read_token_tables
from entropy_fast.step import AdamState, adam_state_from_file

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

__all__ = [
    "ADAPTER",
    "BUNDLE_NAME",
    "BUNDLE_SCHEMA",
    "MODEL",
    "Bundle",
    "bundle_document",
    "read_bundle",
    "rendered",
]

BUNDLE_NAME = "manifest.json"
BUNDLE_SCHEMA = "entropy_fast.bundle/1"
ADAPTER, MODEL = "adapter", "model"
FIELDS = frozenset({"schema", "version", "step", "facts", "online", "trainable", "dtypes", "files", "sha256"})
LARGEST = 2**26  # bytes of a manifest; it names every parameter
AGAIN = "take another copy of the folder, or keep the step again."


@dataclasses.dataclass(frozen=True)
class Bundle:
    """One training step just before ``optimizer.step()``, as `entropy_fast.run_folder.bundle.write_bundle` kept it.

    Attributes:
        folder: where it is.
        manifest: its ``run.json``: the files, the model and the options of the forecast.
        step: number of the training step.
        facts: what the trainer said about itself.
        online: the forecast that was made online; None where there was none.
        dtypes: of every floating-point parameter and buffer of the model, by name.
        trainable: names of the parameters that were trained.
    """

    folder: Path
    manifest: RunManifest
    step: int
    facts: Mapping[str, object]
    online: Mapping[str, Any] | None
    dtypes: Mapping[str, str]
    trainable: tuple[str, ...]

    def read_rollouts(self) -> Rollouts:
        """The batch the step is made from, padded on the right.

        Raises:
            RolloutsFileError: it cannot be read.
        """
        return read_rollouts(self.folder / self.manifest.rollouts)

    def coefficients(self, rollouts: Rollouts) -> Tensor | tuple[Tensor, Tensor]:
        """-∂L/∂(log-prob) [N, T], and where they were kept -∂L/∂(entropy) [N, T]: ``coefficients`` of `fast_delta_h1`.

        Args:
            rollouts: from `read_rollouts`.

        Raises:
            BundleError: the file cannot be read, or does not fit the rollouts.
        """
        tables = self._tables(rollouts)
        return (tables["of_logprob"], tables["of_entropy"]) if "of_entropy" in tables else tables["of_logprob"]

    def scores(self, rollouts: Rollouts) -> TokenScores | None:
        """Log-probs and entropies [N, T], nats, as they were found online; None where they were not kept.

        Args:
            rollouts: from `read_rollouts`.

        Raises:
            BundleError: the file cannot be read, or does not fit the rollouts.
        """
        tables = self._tables(rollouts)
        return TokenScores(tables["logprobs"], tables["entropies"]) if "logprobs" in tables else None

    def load(self, source: ModelSource | None = None) -> tuple[PreTrainedModel | PeftModel, AdamState]:
        """The model with the gradient in ``.grad``, and the optimizer's state matched to it by name.

        Args:
            source: the model from elsewhere, or loaded otherwise; None for the bundle's. With another dtype or quantisation
                its parameters stay in the dtypes in which they are loaded.

        Raises:
            BundleError: the model has other parameters than the one the step was kept of.
            RunFolderError: the model cannot be found or loaded.
            OptimizerStateError: the optimizer's state does not fit it.
        """
        own = self.manifest.model
        source = own if source is None else source
        adapter = None if self.manifest.adapter is None else self.folder / self.manifest.adapter
        model = load_policy(source, adapter)
        if (source.dtype, source.load_in_4bit) == (own.dtype, own.load_in_4bit):
            take_dtypes(model, self.dtypes)
        gradient = None if self.manifest.gradient is None else self.folder / self.manifest.gradient
        put_gradients(model, self.trainable, gradient)
        return model, adam_state_from_file(self.folder / self.manifest.optimizer, model)

    def _tables(self, rollouts: Rollouts) -> dict[str, Tensor]:
        assert self.manifest.coefficients is not None
        return read_token_tables(self.folder / self.manifest.coefficients, rollouts.loss_mask)


def read_bundle(folder: Path, *, device: str | None = None) -> Bundle:
    """Read a bundle's manifests, and compare every file with its hash.

    Args:
        folder: the bundle.
        device: where the model will go, in place of the device it was on.

    Raises:
        BundleError: there is no ``manifest.json`` or one that is damaged, or a file is missing, changed or unknown to it.
        RunFolderError: ``run.json`` cannot be understood, or the device is not there.
    """
    document = bundle_document(folder)
    files = document["files"]
    for name, digest in files.items():
        _check_file(folder, name, digest)
    for inner in (ADAPTER, MODEL):
        for path in sorted((folder / inner).rglob("*")):
            name = path.relative_to(folder).as_posix()
            if not path.is_dir() and name not in files:
                raise BundleError(f"bundle {folder}: {name} was not in it when it was written.", fix="remove it.")
    manifest = read_manifest(folder, device=device)
    named = (MANIFEST_NAME, manifest.rollouts, manifest.optimizer, manifest.coefficients, manifest.gradient)
    lacking = [name for name in named if name is not None and name not in files]
    if lacking or manifest.coefficients is None:
        raise BundleError(f"bundle {folder}: {BUNDLE_NAME} and {MANIFEST_NAME} are of different steps.", fix=AGAIN)
    return Bundle(
        folder,
        manifest,
        document["step"],
        document["facts"],
        document["online"],
        document["dtypes"],
        tuple(document["trainable"]),
    )


def rendered(document: Mapping[str, Any]) -> str:
    """A manifest as text, with a hash of all else in it."""
    content = {key: value for key, value in document.items() if key != "sha256"}
    digest = hashlib.sha256(_text(content).encode()).hexdigest()
    return _text({**content, "sha256": digest})


def _text(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def bundle_document(folder: Path) -> dict[str, Any]:
    """``manifest.json`` of a bundle, which is found to be whole; the files that it names are not looked at.

    Raises:
        BundleError: there is none, or it is damaged.
    """
    path = folder / BUNDLE_NAME
    if not folder.is_dir():
        raise BundleError(f"bundle {folder} does not exist.", fix="check the path.")
    if not path.is_file() or path.stat().st_size > LARGEST:
        raise BundleError(
            f"bundle {folder} has no {BUNDLE_NAME}, which is written last: it is no whole step.",
            fix="pass a folder that write_bundle has finished, or its files one by one (--model, --optimizer, --rollouts).",
        )
    try:
        text = path.read_text(encoding="utf-8")
        document = json.loads(text)
        whole = isinstance(document, dict) and rendered(document) == text
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read as JSON: {error}", fix=AGAIN) from error
    schema = document.get("schema") if isinstance(document, dict) else type(document).__name__
    if whole and schema != BUNDLE_SCHEMA:
        raise BundleError(
            f"{path} has schema {schema!r}, expected {BUNDLE_SCHEMA!r}.", fix="use the version that wrote it."
        )
    if not whole or set(document) != FIELDS:
        raise BundleError(f"{path} is not what was written: its hash does not fit its content.", fix=AGAIN)
    found: dict[str, Any] = document
    return found


def _check_file(folder: Path, name: str, digest: str) -> None:
    path = folder / name
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or not path.is_file():
        raise BundleError(f"bundle {folder}: {name} is missing.", fix=AGAIN)
    try:
        found = sha256_of(path)
    except OSError as error:
        raise BundleError(f"bundle {folder}: {name} cannot be read ({error.strerror or error}).", fix=AGAIN) from error
    if found != digest:
        raise BundleError(f"bundle {folder}: {name} is not the file it was written with.", fix=AGAIN)
