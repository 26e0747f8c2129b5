"""A checkpoint on disk: safetensors files, and ``checkpoint.json``, written last, which names them with their hashes.

``FOLDER/rank-0-of-1/`` holds the part of a rank. Data files have new names each time; those that are no longer named are
removed after the ``checkpoint.json`` that no longer names them is in place. So a process killed at any moment leaves the
checkpoint before, or the new one, and files that nobody names, which the next writer removes. Everything is flushed to the disk
before it is named.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from entropy_fast.atomic import atomic_path
from entropy_fast.digests import sha256_of
from entropy_fast.distributed.team import Team
from entropy_fast.errors import EntropyFastError, OutputFileError, ResumeError
from entropy_fast.resuming.held import UnitRows
from entropy_fast.resuming.record import (
    FILE_NAME,
    CheckpointRecord,
    KeptFile,
    damaged,
    record_from_json,
    record_to_json,
)

__all__ = ["CheckpointFolder", "discard_checkpoint"]

NAME = "checkpoint.json"
LARGEST_NAME = 1 << 26  # bytes of it; far above what millions of units take
# Bytes of one data file, where a single tensor or unit is not larger: as much is held a second time while it is written.
SHARD = 1 << 28
# File systems without locks: there, two probes at once could write to one folder.
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)


class CheckpointFolder:
    """One rank's part of a checkpoint, for as long as this process holds it.

    Args:
        path: of the part; it is there.

    Attributes:
        path: the same.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        numbers = [int(own.name[-18:-12]) for own in path.iterdir() if FILE_NAME.fullmatch(own.name)]
        self._serial = max(numbers, default=-1) + 1

    @classmethod
    @contextlib.contextmanager
    def held(cls, folder: str, team: Team) -> Iterator[CheckpointFolder]:
        """The part of this rank, made where it is missing; no other process may hold it.

        Args:
            folder: of the whole checkpoint.
            team: the ranks.

        Raises:
            ResumeError: another process holds it, or it is of another number of ranks.
            OutputFileError: it cannot be made.
        """
        path, made = _part(folder, team), not Path(folder).exists()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for other in sorted(Path(folder).glob("rank-*-of-*")):
                if not other.name.endswith(f"-of-{team.size}") and (other / NAME).exists():
                    raise ResumeError(
                        f"the checkpoint in {folder} was written by {other.name.rpartition('-')[2]} rank(s), and here are "
                        f"{team.size}: their units were dealt in another way.",
                        fix="start as many processes, pass another folder, or delete this one to begin the probe anew.",
                    )
        try:
            path.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise OutputFileError(
                f"checkpoints cannot be written to {folder}: {error.strerror or error}.", fix="pass another folder."
            ) from error
        try:
            _lock(handle, folder)
            yield cls(path)
        finally:
            os.close(handle)
            for place in (path, *([Path(folder)] if made else [])):
                with contextlib.suppress(OSError):
                    place.rmdir()  # only if it is empty: the probe was refused before it had anything to keep

    def read(self) -> CheckpointRecord | None:
        """What is there, every file compared with its hash; None where no checkpoint was completed.

        Raises:
            ResumeError: something of it is missing or is not what was written.
        """
        path = self.path / NAME
        try:
            if path.stat().st_size > LARGEST_NAME:
                raise damaged(str(path), "it is larger than what is written")
            record = record_from_json(path.read_text(encoding="utf-8"), str(path))
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise damaged(str(path), str(error)) from error
        for file in (file for sweep in record.sweeps for file in sweep.files):
            own = self.path / file.name
            try:
                if sha256_of(own) != file.sha256:
                    raise damaged(str(path), f"{file.name} is not the file that was written")
            except OSError as error:
                raise damaged(str(path), f"{file.name} cannot be read ({error.strerror or error})") from error
        return record

    def load(self, file: KeptFile) -> dict[str, Tensor]:
        """One data file, on the CPU.

        Raises:
            ResumeError: it cannot be read.
        """
        try:
            return load_file(self.path / file.name)
        except (OSError, SafetensorError) as error:
            raise damaged(str(self.path / NAME), f"{file.name} cannot be read ({error})") from error

    def write_sums(self, sweep: int, tensors: Mapping[str, Tensor]) -> list[KeptFile]:
        """Write the sums of a sweep.

        Args:
            sweep: its number.
            tensors: by name; none shares memory with another.

        Raises:
            OutputFileError: they cannot be written.
        """
        files, waiting, held = [], dict[str, Tensor](), 0
        for name, tensor in tensors.items():
            size = tensor.numel() * tensor.element_size()
            if waiting and held + size > SHARD:
                files.append(self._write(sweep, "sums", waiting))
                waiting, held = {}, 0
            waiting[name] = tensor
            held += size
        return [*files, self._write(sweep, "sums", waiting)]

    def write_units(self, sweep: int, units: UnitRows, start: int, stop: int) -> list[KeptFile]:
        """Write what a sweep keeps of units ``start`` to ``stop``; arguments and errors as of `write_sums`."""
        files = []
        while start < stop:
            one = sum(t.numel() * t.element_size() for t in units.rows(start, start + 1).values())
            end = min(stop, start + max(1, SHARD // max(1, one)))
            files.append(self._write(sweep, "units", units.rows(start, end), (start, end)))
            start = end
        return files

    def name(self, record: CheckpointRecord) -> None:
        """Make what was written the checkpoint, and remove what is no longer part of it.

        Raises:
            OutputFileError: it cannot be written.
        """
        with atomic_path(self.path / NAME) as temporary:
            temporary.write_text(record_to_json(record), encoding="utf-8")
            _flush(temporary)
        _flush(self.path)
        named = {file.name for sweep in record.sweeps for file in sweep.files}
        for path in self.path.iterdir():
            if FILE_NAME.fullmatch(path.name) and path.name not in named:
                with contextlib.suppress(OSError):
                    path.unlink()

    def forget(self, files: Sequence[KeptFile]) -> None:
        """Remove files that were written and will not be named."""
        for file in files:
            with contextlib.suppress(OSError):
                (self.path / file.name).unlink()

    def _write(
        self, sweep: int, kind: str, tensors: Mapping[str, Tensor], units: tuple[int, int] | None = None
    ) -> KeptFile:
        path = self.path / f"sweep-{sweep:03d}-{kind}-{self._serial:06d}.safetensors"
        self._serial += 1
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with atomic_path(path) as temporary:
            try:
                save_file(plain, str(temporary))
            except SafetensorError as error:
                raise OutputFileError(
                    f"{path}: the checkpoint cannot be written ({error}).",
                    fix="free space there; the checkpoint before is whole, and the same call goes on from it.",
                ) from error
            _flush(temporary)
            digest = sha256_of(temporary)
        return KeptFile(path.name, digest, units)


def discard_checkpoint(folder: str, team: Team) -> None:
    """Remove the part of this rank, and the folder where nothing else is in it; what others put there stays.

    Args:
        folder: of the whole checkpoint.
        team: the ranks.

    Raises:
        OutputFileError: it cannot be removed.
    """
    path = _part(folder, team)
    try:
        (path / NAME).unlink(missing_ok=True)  # first: without it the others are no checkpoint
        for own in list(path.iterdir()) if path.is_dir() else []:
            if FILE_NAME.fullmatch(own.name) or own.name.startswith(".tmp-"):
                own.unlink(missing_ok=True)
    except OSError as error:
        raise OutputFileError(
            f"the checkpoint in {folder} cannot be removed: {error.strerror or error}.",
            fix="delete the folder; the probe has finished.",
        ) from error
    for place in (path, Path(folder)):
        with contextlib.suppress(OSError):
            place.rmdir()


def _part(folder: str, team: Team) -> Path:
    return Path(folder) / f"rank-{team.rank}-of-{team.size}"


def _lock(handle: int, folder: str) -> None:
    import fcntl  # which not every system has on which nothing is kept

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ResumeError(
            f"another process is writing its checkpoints to {folder}.",
            fix="wait for its end, or pass another folder.",
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise EntropyFastError(f"{folder} cannot be locked: {error}.", fix="pass another folder.") from error


def _flush(path: Path) -> None:
    """Onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
