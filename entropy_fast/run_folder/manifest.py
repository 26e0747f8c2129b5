"""``run.json``: what a run folder holds and how it was probed. Plain data; nothing in it is executed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from entropy_fast.atomic import atomic_path
from entropy_fast.config import EstimateOptions, RunOptions, default_of
from entropy_fast.errors import ConfigError, RunFolderError
from entropy_fast.run_folder.model_source import ModelSource

__all__ = ["IN_FOLDER", "MANIFEST_NAME", "SCHEMA", "SCHEMA_OF_STEPS", "RunManifest", "read_manifest", "write_manifest"]

MANIFEST_NAME = "run.json"
SCHEMA = "entropy_fast.run/2"
# Of one that names what a single step's update is; the fields are absent in the other.
SCHEMA_OF_STEPS = "entropy_fast.run/3"
OF_STEPS = ("gradient", "coefficients")
OF_ONE_PROBE = ("checkpoint", "checkpoint_seconds")
IN_FOLDER = "folder:"  # in front of a model's name: a folder in the run folder
LARGEST = 2**20  # bytes; far above what the fields below can take

Built = TypeVar("Built")


@dataclasses.dataclass(frozen=True)
class RunManifest:
    """Paths are relative to the folder that holds ``run.json``.

    Attributes:
        model: the base model.
        rollouts: the update batch.
        optimizer: ``optimizer.pt``, or a checkpoint folder.
        adapter: LoRA adapter folder; None means that the model itself is trained.
        entropy_rollouts: entropy batch of the two-batch estimate.
        estimate: what the probe estimates.
        run: how it is run.
        gradient: safetensors file of the gradient that stood in ``.grad``; None where none was kept.
        coefficients: Parquet file of the update's coefficients by response token; None where options describe the update.
    """

    model: ModelSource
    rollouts: str
    optimizer: str
    adapter: str | None = None
    entropy_rollouts: str | None = None
    estimate: EstimateOptions = dataclasses.field(default_factory=EstimateOptions)
    run: RunOptions = dataclasses.field(default_factory=RunOptions)
    gradient: str | None = None
    coefficients: str | None = None


def write_manifest(manifest: RunManifest, folder: Path) -> None:
    """Write ``run.json`` into the folder, atomically."""
    fields = {field.name: getattr(manifest, field.name) for field in dataclasses.fields(manifest)}
    # Where a probe kept what it went on from is none of those that come after it.
    plain = dataclasses.replace(fields.pop("run"), **{name: default_of(RunOptions, name) for name in OF_ONE_PROBE})
    probe = {"estimate": fields.pop("estimate").to_dict(), "run": plain.to_dict()}
    of_step = {name: found for name in OF_STEPS if (found := fields.pop(name)) is not None}
    schema = SCHEMA_OF_STEPS if of_step else SCHEMA
    document = {"schema": schema, **fields, **of_step, "model": dataclasses.asdict(manifest.model), "probe": probe}
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    with atomic_path(folder / MANIFEST_NAME) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_manifest(folder: Path, *, device: str | None = None) -> RunManifest:
    """Read ``run.json`` and check that every file it names is there.

    Args:
        folder: the run folder.
        device: where the model goes, in place of the device in the file, which this machine may lack.

    Returns:
        The manifest; the name of a model in the folder is its path.

    Raises:
        RunFolderError: missing, not JSON, another schema, unknown or missing fields, wrong types, or a named file that
            is missing or outside the folder.
    """
    path = folder / MANIFEST_NAME
    document = _document(folder, path)
    if document.get("schema") not in (SCHEMA, SCHEMA_OF_STEPS):
        raise RunFolderError(
            f"{path} has schema {document.get('schema')!r}, expected {SCHEMA!r} or {SCHEMA_OF_STEPS!r}.",
            fix="use the version that wrote it, or pass its files one by one (--model, --optimizer, --rollouts).",
        )
    fields = {key: value for key, value in document.items() if key != "schema"}
    probe = _object(fields.pop("probe", {}), f"{path}: probe")
    if unknown := set(probe) - {"estimate", "run"}:
        raise RunFolderError(
            f"{path}: probe has unknown fields {sorted(unknown)}.", fix="the fields are estimate, run."
        )
    if device is not None and isinstance(fields.get("model"), dict):
        fields["model"] = {**fields["model"], "device": device}
    fields["model"] = _build(ModelSource, fields.get("model"), f"{path}: model")
    fields["estimate"] = _build(EstimateOptions, probe.get("estimate", {}), f"{path}: probe.estimate")
    fields["run"] = _build(RunOptions, probe.get("run", {}), f"{path}: probe.run")
    if fields["run"].checkpoint is not None:
        # Of a folder that somebody passed on, it would say where to write on this machine.
        raise RunFolderError(
            f"{path}: probe.run names a checkpoint, {fields['run'].checkpoint!r}, which is of a single call.",
            fix="take it out, and pass --checkpoint FOLDER.",
        )
    manifest = _build(RunManifest, fields, str(path))
    _check_named(folder, path, manifest.optimizer, is_folder=None)
    files = (manifest.rollouts, manifest.entropy_rollouts, manifest.gradient, manifest.coefficients)
    for name in files:
        if name is not None:
            _check_named(folder, path, name, is_folder=False)
    if manifest.adapter is not None:
        _check_named(folder, path, manifest.adapter, is_folder=True)
    model = manifest.model
    if model.name.startswith(IN_FOLDER):
        inside = model.name[len(IN_FOLDER) :]
        _check_named(folder, path, inside, is_folder=True)
        manifest = dataclasses.replace(manifest, model=dataclasses.replace(model, name=str(folder.absolute() / inside)))
    return manifest


def _document(folder: Path, path: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise RunFolderError(f"run folder {folder} does not exist.", fix="check the path.")
    if not path.exists():
        raise RunFolderError(
            f"run folder {folder} has no {MANIFEST_NAME}.",
            fix="pass a folder made by `entropy-fast demo`, or give --model, --optimizer, --rollouts and, for LoRA, "
            "--adapter instead.",
        )
    if not path.is_file() or path.stat().st_size > LARGEST:
        raise RunFolderError(f"{path} is not a file of at most {LARGEST} bytes.", fix="make the folder again.")
    try:
        document = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=_each_key_once, parse_constant=_no_constant
        )
    except (OSError, ValueError, RecursionError) as error:
        raise RunFolderError(f"{path} cannot be read as JSON: {error}", fix="make the folder again.") from error
    return _object(document, str(path))


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return found


def _no_constant(word: str) -> float:
    raise ValueError(f"{word} is no JSON")


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RunFolderError(f"{where} is a {type(value).__name__}, expected an object.", fix="correct the field.")
    return value


def _check_named(folder: Path, path: Path, name: str, *, is_folder: bool | None) -> None:
    """What a manifest names has to be there, and inside of its folder: a folder, a file, or (None) either."""
    try:
        target = (folder / name).resolve()
        inside = target.is_relative_to(folder.resolve())
        there = (is_folder is not False and target.is_dir()) or (is_folder is not True and target.is_file())
    except (ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RunFolderError(f"{path} names {name[:200]!r}: {reason}.", fix="correct the field.") from error
    if not inside:
        raise RunFolderError(f"{path} names {name}, which lies outside the folder.", fix="keep a run in one folder.")
    if not there:
        kind = "folder" if is_folder else "file"
        raise RunFolderError(
            f"{path} names {name}, and no such {kind} is there.", fix="make the folder again, or restore it."
        )


def _build(kind: type[Built], value: Any, where: str) -> Built:
    """A dataclass from JSON fields; options check themselves, paths and the model's fields are checked by annotation."""
    if value is None:
        raise RunFolderError(f"{where} is missing.", fix="make the folder again.")
    fields: Mapping[str, Any] = _object(value, where)
    known = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = [key for key in fields if key not in known]
    required = [name for name, f in known.items() if _no_default(f) and name not in fields]
    if unknown or required:
        problem = f"unknown fields {unknown}" if unknown else f"missing fields {required}"
        raise RunFolderError(f"{where} has {problem}.", fix=f"the fields are {', '.join(known)}.")
    try:
        if kind not in (EstimateOptions, RunOptions):
            _check_types(kind, fields, where)
        return kind(**fields)
    except ConfigError as error:
        raise RunFolderError(f"{where}: {error.problem}", fix=error.fix) from error


def _no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _check_types(kind: type[Any], fields: Mapping[str, Any], where: str) -> None:
    hints = get_type_hints(kind)
    for name, value in fields.items():
        if not _fits(value, hints[name]):
            expected = getattr(hints[name], "__name__", str(hints[name]))
            raise RunFolderError(f"{where}: `{name}` is {value!r}, expected {expected}.", fix="correct the field.")


def _fits(value: Any, hint: Any) -> bool:
    options = getattr(hint, "__args__", None)
    if options is None:
        return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    if not all(isinstance(option, type) for option in options):
        return value in options
    return any(_fits(value, option) for option in options)
