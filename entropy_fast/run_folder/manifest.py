"""``run.json``: what a run folder holds and how it was probed. Plain data; nothing in it is executed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from entropy_fast.atomic import atomic_path
from entropy_fast.errors import RunFolderError
from entropy_fast.run_folder.model_source import ModelSource

__all__ = ["MANIFEST_NAME", "SCHEMA", "ProbeSettings", "RunManifest", "read_manifest", "write_manifest"]

MANIFEST_NAME = "run.json"
SCHEMA = "entropy_fast.run/1"


@dataclasses.dataclass(frozen=True)
class ProbeSettings:
    """The options of the probe that a folder was made with (see `ProbeConfig`)."""

    weighting: str = "dr_grpo"
    entropy_estimator: str = "score_function"
    importance_ratio: str = "none"
    clip: float | None = None
    clip_high: float | None = None
    mode: str = "exact"
    blocks: int | None = None
    prompts_per_microbatch: int | None = None
    full_kernel: bool = False
    memory_budget: str | None = None
    by_sequence: bool = False
    autocast_bfloat16: bool = False
    accumulate_on: str = "device"
    conditional_variance: str = "per_prompt"
    strict: bool = False
    max_excluded_share: float = 0.01
    learning_rate: float | None = None


@dataclasses.dataclass(frozen=True)
class RunManifest:
    """Paths are relative to the folder that holds ``run.json``.

    Attributes:
        model: the base model.
        rollouts: the update batch.
        optimizer: ``optimizer.pt``.
        adapter: LoRA adapter folder; None means that the model itself is trained.
        entropy_rollouts: entropy batch of the two-batch estimate.
        probe: options.
    """

    model: ModelSource
    rollouts: str
    optimizer: str
    adapter: str | None = None
    entropy_rollouts: str | None = None
    probe: ProbeSettings = ProbeSettings()


def write_manifest(manifest: RunManifest, folder: Path) -> None:
    """Write ``run.json`` into the folder, atomically."""
    document = {"schema": SCHEMA, **dataclasses.asdict(manifest)}
    with atomic_path(folder / MANIFEST_NAME) as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> RunManifest:
    """Read ``run.json`` and check that every file it names is there.

    Raises:
        RunFolderError: missing, not JSON, another schema, unknown or missing fields, wrong types, or a named file that
            is missing or outside the folder.
    """
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise RunFolderError(f"run folder {folder} does not exist.", fix="check the path.")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunFolderError(
            f"run folder {folder} has no {MANIFEST_NAME}.",
            fix="pass a folder made by `entropy-fast demo`, or give --model, --optimizer, --rollouts and, for LoRA, "
            "--adapter instead.",
        ) from error
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} cannot be read as JSON: {error}", fix="make the folder again.") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise RunFolderError(f"{path} has schema {found!r}, expected {SCHEMA!r}.", fix="use the version that wrote it.")
    fields = {key: value for key, value in document.items() if key != "schema"}
    for key, kind in (("model", ModelSource), ("probe", ProbeSettings)):
        if isinstance(fields.get(key), dict):
            fields[key] = _build(kind, fields[key], f"{path}: {key}")
    manifest: RunManifest = _build(RunManifest, fields, str(path))
    for name in (manifest.rollouts, manifest.optimizer, manifest.adapter, manifest.entropy_rollouts):
        if name is None:
            continue
        target = (folder / name).resolve()
        if not target.is_relative_to(folder.resolve()):
            raise RunFolderError(
                f"{path} names {name}, which lies outside the folder.", fix="keep a run in one folder."
            )
        if not target.exists():
            raise RunFolderError(
                f"{path} names {name}, which is not there.", fix="make the folder again, or restore it."
            )
    return manifest


def _build(kind: type[Any], fields: Mapping[str, Any], where: str) -> Any:
    """A dataclass from JSON fields, each checked against its annotation."""
    hints = get_type_hints(kind)
    known = {f.name: f for f in dataclasses.fields(kind)}
    unknown = [key for key in fields if key not in known]
    required = [
        name
        for name, f in known.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and name not in fields
    ]
    if unknown or required:
        problem = f"unknown fields {unknown}" if unknown else f"missing fields {required}"
        raise RunFolderError(f"{where} has {problem}.", fix=f"the fields are {', '.join(known)}.")
    for name, value in fields.items():
        if not _fits(value, hints[name]):
            raise RunFolderError(
                f"{where}: `{name}` is {value!r}, expected {_name(hints[name])}.", fix="correct the field."
            )
    return kind(**fields)


def _name(hint: Any) -> str:
    return {ModelSource: "an object", ProbeSettings: "an object"}.get(hint, getattr(hint, "__name__", str(hint)))


def _fits(value: Any, hint: Any) -> bool:
    options = getattr(hint, "__args__", None)
    if options is None:
        # JSON has one kind of number, Python two; and a bool is an int only to Python.
        if hint is float:
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    if not all(isinstance(option, type) for option in options):
        return value in options
    return any(_fits(value, option) for option in options)
