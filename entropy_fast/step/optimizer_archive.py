"""An ``optimizer.pt`` read whole or not at all: checksums first, then plain tensors and containers, then their structure.

torch's reader does not look at the archive's checksums, so a flipped byte would pass for another second moment. They are
compared here before anything is unpickled, and nothing in the file is executed (``weights_only=True``).
"""

from __future__ import annotations

import dataclasses
import os
import zipfile
from collections.abc import Mapping, Sequence
from typing import IO, Any

import torch

from entropy_fast.errors import OptimizerStateError
from entropy_fast.step.scalars import shown, shown_keys

__all__ = ["SavedOptimizer", "load_optimizer_file"]

ARCHIVE_START = b"PK\x03\x04"
PIECE = 1 << 20  # bytes read at a time


@dataclasses.dataclass(frozen=True)
class SavedOptimizer:
    """The content of an optimizer file, of sound structure; numbers in it are not checked yet.

    Attributes:
        path: where it was read.
        groups: hyperparameters of every group.
        keys: for every group, the keys of its parameters in ``state``: all numbers or all names, no key twice.
        names: for every group, its parameters' names; None where the file has none.
        state: key -> entry, for parameters that were stepped.
    """

    path: str
    groups: Sequence[Mapping[str, Any]]
    keys: list[list[int | str]]
    names: list[list[str]] | None
    state: Mapping[int | str, Mapping[str, Any]]


def load_optimizer_file(path: str | os.PathLike[str]) -> SavedOptimizer:
    """Read a file that ``torch.save(optimizer.state_dict(), path)`` wrote, on the CPU.

    Args:
        path: the file.

    Raises:
        OptimizerStateError: it is missing, damaged, in torch's format of before 1.6 (which has no checksums), holds anything
            but tensors and plain containers, or is no optimizer's.
    """
    where = os.fspath(path)
    if not os.path.exists(where):
        raise OptimizerStateError(f"optimizer file {where} does not exist.", fix="check the path.")
    if not os.path.isfile(where):
        raise OptimizerStateError(
            f"optimizer file {where} cannot be read: it is a folder, a pipe or a device.",
            fix="pass the path of a file.",
        )
    try:
        with open(where, "rb") as file:
            _check_archive(where, file)
            file.seek(0)
            saved = torch.load(file, map_location="cpu", weights_only=True)
    except OptimizerStateError:
        raise
    except Exception as error:  # a damaged file can fail anywhere in the unpickler (IndexError, AssertionError, ...)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = "".join(c if c.isprintable() else " " for c in lines[0])
        raise OptimizerStateError(
            f"optimizer file {where} cannot be read as plain tensors: {reason}",
            fix="save it with torch.save(optimizer.state_dict(), path); files that need to run code are refused.",
        ) from error
    return _structure(where, saved)


def _check_archive(where: str, file: IO[bytes]) -> None:
    """Compare every record of the archive with its checksum, and let nothing pass that two readers could read differently."""
    if file.read(len(ARCHIVE_START)) != ARCHIVE_START:
        raise OptimizerStateError(
            f"optimizer file {where} cannot be read as plain tensors: it does not begin as an archive of torch.save. torch's "
            "format of before 1.6 has no checksums: damage in it would pass for another second moment, so it is not read.",
            fix="take another copy of the file; a sound one in the old format is rewritten by "
            "torch.save(torch.load(path, weights_only=True), path).",
        )
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        unusual = next(
            (r for r in records if r.compress_type != zipfile.ZIP_STORED or r.file_size != r.compress_size), None
        )
        if unusual is not None or sum(record.file_size for record in records) > size:
            raise zipfile.BadZipFile("records are compressed or overlap, which torch.save does not write")
        if len({record.filename.lower() for record in records}) < len(records):
            raise zipfile.BadZipFile("two records have one name")
        for record in records:
            with archive.open(record) as content:
                try:
                    while content.read(PIECE):
                        pass
                except zipfile.BadZipFile as error:
                    raise OptimizerStateError(
                        f"optimizer file {where} cannot be read: the checksum of record {record.filename!r} does not fit its "
                        "content. The file is damaged, or was written without checksums "
                        "(torch.serialization.set_crc32_options(False)).",
                        fix="take another copy of the file, or save it again with checksums.",
                    ) from error


def _structure(where: str, saved: object) -> SavedOptimizer:
    if not isinstance(saved, dict) or not {"state", "param_groups"} <= saved.keys():
        raise _something_else(where, saved)
    groups, state = saved["param_groups"], saved["state"]
    keys = []
    for index, group in enumerate(groups if isinstance(groups, list) else ()):
        listed = group.get("params") if isinstance(group, dict) else None
        if not isinstance(listed, list) or not all(type(key) in (int, str) for key in listed):
            raise _broken(where, f"parameter group {index} lists no numbers or names as 'params'")
        if not all(isinstance(key, str) for key in group):
            raise _broken(where, f"parameter group {index} has keys that are no texts")
        keys.append(listed)
    if not keys:
        raise _broken(where, f"'param_groups' is {shown(groups)}, expected a list with at least one group")
    every = [key for listed in keys for key in listed]
    if len({type(key) for key in every}) > 1:
        raise _broken(where, "some parameters are listed by number and others by name")
    if len(set(every)) < len(every):
        twice = next(key for key in every if every.count(key) > 1)
        raise _broken(where, f"parameter {shown(twice)} is listed twice in 'params'")
    if not isinstance(state, dict) or not all(isinstance(entry, dict) for entry in state.values()):
        raise _broken(where, "'state' is not a table of entries")
    known = set(every)
    strange = [key for key in state if type(key) not in (int, str) or key not in known]
    if strange:
        raise _broken(where, f"'state' has an entry for {shown(strange[0])}, which no parameter group lists")
    return SavedOptimizer(where, groups, keys, _names(where, groups, keys), state)


def _names(where: str, groups: list[dict[str, Any]], keys: list[list[int | str]]) -> list[list[str]] | None:
    """The parameters' names: what they are listed by, or ``param_names`` beside the numbers."""
    if all(isinstance(key, str) for listed in keys for key in listed):
        return [[str(key) for key in listed] for listed in keys] if any(keys) else None
    if not any("param_names" in group for group in groups):
        return None
    names = []
    for index, (group, listed) in enumerate(zip(groups, keys, strict=True)):
        found = group.get("param_names")
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found) or len(found) != len(listed):
            raise _broken(
                where,
                f"parameter group {index} has {len(listed)} parameters and as 'param_names' {shown(found)}, no name each",
            )
        names.append(found)
    return names


def _something_else(where: str, saved: object) -> OptimizerStateError:
    found = f"keys {shown_keys(saved)}" if isinstance(saved, dict) else shown(saved)
    fix = "pass the file written by optimizer.state_dict() (Trainer's optimizer.pt)."
    if isinstance(saved, dict) and "last_epoch" in saved:
        found += ", the state of a learning-rate scheduler"
        fix = "pass the optimizer's file (optimizer.pt beside scheduler.pt)."
    elif isinstance(saved, dict) and any(isinstance(key, str) and key.startswith("state.") for key in saved):
        found += ", an optimizer's state in flattened form"
        fix = "save get_optimizer_state_dict(model, optimizer) without flatten_optimizer_state_dict."
    return OptimizerStateError(f"optimizer file {where} holds {found}; expected 'state' and 'param_groups'.", fix=fix)


def _broken(where: str, problem: str) -> OptimizerStateError:
    return OptimizerStateError(
        f"optimizer file {where}: {problem}.", fix="save it again with torch.save(optimizer.state_dict(), path)."
    )
