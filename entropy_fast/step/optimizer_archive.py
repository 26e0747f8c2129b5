"""A file of ``torch.save``, read whole or not at all: checksums first, then plain tensors and containers.

torch's reader does not look at the archive's checksums, so a flipped byte would pass for another second moment. They are
compared here before anything is unpickled, and nothing in the file is executed (``weights_only=True``).
"""

from __future__ import annotations

import os
import zipfile
from typing import IO

import torch

from entropy_fast.errors import OptimizerStateError

__all__ = ["SHARDS", "check_archive", "read_archive", "sharded_state"]

ARCHIVE_START = b"PK\x03\x04"
PIECE = 1 << 20  # bytes read at a time
FOLDER = 0x10  # among a record's attributes in the archive's table
SHARDS = ("DTensor", "ShardedTensor")  # classes of torch that hold one rank's piece of a tensor


def read_archive(where: str) -> object:
    """What ``torch.save`` put into a file, on the CPU.

    Args:
        where: the path of a file that is there.

    Raises:
        OptimizerStateError: it is damaged, in torch's format of before 1.6 (which has no checksums), holds anything but
            tensors and plain containers, or one rank's pieces of tensors.
    """
    try:
        with open(where, "rb") as file:
            check_archive(where, file)
            file.seek(0)
            needed = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            if any(name.rpartition(".")[2] in SHARDS for name in needed):
                raise sharded_state(where)
            file.seek(0)
            saved: object = torch.load(file, map_location="cpu", weights_only=True)
            return saved
    except OptimizerStateError:
        raise
    except Exception as error:  # a damaged file can fail anywhere in the unpickler (IndexError, AssertionError, ...)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = "".join(c if c.isprintable() else " " for c in lines[0])
        raise OptimizerStateError(
            f"optimizer file {where} cannot be read as plain tensors: {reason}",
            fix="save it with torch.save(optimizer.state_dict(), path); files that need to run code are refused.",
        ) from error


def sharded_state(where: str) -> OptimizerStateError:
    """The error about a file that holds one rank's pieces of tensors: read alone, they would pass for the whole."""
    return OptimizerStateError(
        f"optimizer file {where} holds DTensors or ShardedTensors: one rank's pieces of a state that is sharded (FSDP).",
        fix="save get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True)), or the whole of "
        "it with torch.distributed.checkpoint.save, and pass that folder.",
    )


def check_archive(where: str, file: IO[bytes]) -> None:
    """Compare every record of an archive with its checksum, and let nothing pass that two readers could read differently.

    Args:
        where: what it is called in a message.
        file: open at its beginning.

    Raises:
        OptimizerStateError: it is no archive of torch.save, or a checksum does not fit.
        zipfile.BadZipFile: it is no archive at all, or one that torch.save does not write.
    """
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
        compressed = any(r.compress_type != zipfile.ZIP_STORED or r.file_size != r.compress_size for r in records)
        if compressed or sum(record.file_size for record in records) > size:
            raise zipfile.BadZipFile("records are compressed or overlap, which torch.save does not write")
        # torch's reader takes nothing from a record that calls itself a folder, and leaves the tensor as memory was.
        if any(record.is_dir() or record.external_attr & FOLDER for record in records):
            raise zipfile.BadZipFile("a record calls itself a folder, which torch.save does not write")
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
