"""What a checkpoint's ``checkpoint.json`` says: whose it is, and how far every sweep has come. Plain data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from entropy_fast.errors import ResumeError

__all__ = ["SCHEMA", "CheckpointRecord", "KeptFile", "SweepRecord", "damaged", "record_from_json", "record_to_json"]

SCHEMA = "entropy_fast.checkpoint/1"
FILE_NAME = re.compile(r"sweep-\d{3}-(sums|units)-\d{6}\.safetensors")
HEXADECIMAL = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class KeptFile:
    """One safetensors file of a checkpoint.

    Attributes:
        name: in the checkpoint's folder.
        sha256: of its content.
        units: first and one after the last of the units whose own tensors it holds; None for sums.
    """

    name: str
    sha256: str
    units: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class SweepRecord:
    """How far one sweep had come.

    Attributes:
        what: which sweep: its stage, and a fingerprint of what it goes through and of what for.
        position: steps that are done: units, prompts or microbatches, as the sweep counts.
        finished: whether that is all of them.
        details: what else the sweep needs to go on, as JSON has it.
        files: with its sums and, in order, its units.
    """

    what: str
    position: int
    finished: bool
    details: Mapping[str, Any]
    files: tuple[KeptFile, ...]


@dataclasses.dataclass(frozen=True)
class CheckpointRecord:
    """A checkpoint of one rank.

    Attributes:
        identity: what the probe is, in words or fingerprints, by what each is of.
        written: when, ISO 8601 in UTC.
        sweeps: in the order in which they were begun; only the last may be unfinished.
    """

    identity: Mapping[str, str]
    written: str
    sweeps: tuple[SweepRecord, ...]


def damaged(where: str, reason: str) -> ResumeError:
    """A checkpoint that cannot be taken for one."""
    return ResumeError(
        f"the checkpoint {where} is damaged: {reason}.",
        fix="delete its folder to begin the probe anew, or put back the files that it was written with.",
    )


def record_to_json(record: CheckpointRecord) -> str:
    """As text, with its own hash."""
    plain = json.loads(json.dumps(dataclasses.asdict(record), allow_nan=False))
    return json.dumps({"schema": SCHEMA, "sha256": _sha256(plain), "checkpoint": plain}) + "\n"


def record_from_json(text: str, where: str) -> CheckpointRecord:
    """From text.

    Args:
        text: what `record_to_json` wrote.
        where: it is from, for messages.

    Raises:
        ResumeError: it is not what that writes.
    """
    try:
        document = json.loads(text)
        if document["schema"] != SCHEMA:
            raise ResumeError(
                f"the checkpoint {where} has schema {document['schema']!r}, expected {SCHEMA!r}.",
                fix="go on with the version that wrote it, or delete its folder to begin the probe anew.",
            )
        plain = document["checkpoint"]
        if document["sha256"] != _sha256(plain):
            raise ValueError("its hash is another")
        identity = {_text(key): _text(value) for key, value in plain["identity"].items()}
        found = CheckpointRecord(identity, _text(plain["written"]), tuple(map(_sweep, plain["sweeps"])))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, ResumeError):
            raise
        raise damaged(where, f"{type(error).__name__} where it says how far it came ({error})") from error
    if any(not sweep.finished for sweep in found.sweeps[:-1]):
        raise damaged(where, "a sweep is unfinished and another one follows")
    return found


def _sha256(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _sweep(value: Any) -> SweepRecord:
    files = tuple(map(_file, value["files"]))
    sums_and_units = [file.units for file in files if file.units is not None]
    reached = 0
    for start, stop in sums_and_units:
        if start != reached or stop < start:
            raise ValueError(f"units {start} to {stop} after {reached}")
        reached = stop
    position = value["position"]
    if isinstance(position, bool) or not isinstance(position, int) or position < 0:
        raise ValueError(f"position {position!r}")
    if sums_and_units and reached != position:
        raise ValueError(f"{reached} units where {position} are done")
    if not isinstance(value["finished"], bool) or not isinstance(value["details"], dict):
        raise TypeError("what is known of a sweep")
    return SweepRecord(_text(value["what"]), position, value["finished"], value["details"], files)


def _file(value: Any) -> KeptFile:
    name, digest, units = value["name"], value["sha256"], value["units"]
    if not FILE_NAME.fullmatch(_text(name)) or not HEXADECIMAL.fullmatch(_text(digest)):
        raise ValueError(f"file {name!r}")
    if units is None:
        return KeptFile(name, digest)
    start, stop = units
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in (start, stop)):
        raise TypeError(f"units {units!r}")
    return KeptFile(name, digest, (start, stop))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
