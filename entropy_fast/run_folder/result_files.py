"""``result.json``, ``per_prompt.parquet`` and ``per_sequence.parquet``: a result on disk, in full precision.

Every file is written whole or not at all; the last one where the result has shares of sequences.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from entropy_fast._version import __version__
from entropy_fast.atomic import atomic_path
from entropy_fast.errors import RunFolderError
from entropy_fast.estimates.result import DeltaH1Result

__all__ = ["RESULT_SCHEMA", "prepare_folder", "result_document", "write_result"]

RESULT_SCHEMA = "entropy_fast.result/1"


def prepare_folder(folder: Path) -> None:
    """Make the folder now, so that a wrong path is found before the work and not after it.

    Raises:
        RunFolderError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError as error:
        raise RunFolderError(
            f"results cannot be written to {folder}: {error.strerror or error}.", fix="pass --out with another folder."
        ) from error
    if not writable:
        raise RunFolderError(f"folder {folder} is not writable.", fix="pass --out with another folder.")


def write_result(result: DeltaH1Result, folder: Path) -> list[Path]:
    """Write all files into the folder (see `prepare_folder`); returns their paths.

    A ``per_sequence.parquet`` of an earlier result is removed when this one has none: it would belong to other numbers.
    """
    prepare_folder(folder)
    paths = [folder / "result.json", folder / "per_prompt.parquet"]
    text = json.dumps(result_document(result), indent=2, allow_nan=False) + "\n"
    table = pa.Table.from_pylist([_plain(dataclasses.asdict(p)) for p in result.per_prompt])
    with atomic_path(paths[0]) as temporary:
        temporary.write_text(text, encoding="utf-8")
    with atomic_path(paths[1]) as temporary:
        pq.write_table(table, temporary)
    last = folder / "per_sequence.parquet"
    if result.by_sequence is None:
        last.unlink(missing_ok=True)
        return paths
    with atomic_path(last) as temporary:
        pq.write_table(_sequence_table(result), temporary)
    return [*paths, last]


def _sequence_table(result: DeltaH1Result) -> pa.Table:
    """One row a sequence: its batch's role, its row in the rollouts, whether it was counted, and its shares."""
    assert result.by_sequence is not None
    parts = []
    for role, shares in result.by_sequence.items():
        count = len(shares.delta_h1)
        columns: dict[str, pa.Array] = {
            "role": pa.array([role] * count, pa.string()),
            "row": pa.array(range(count), pa.int64()),
            "counted": pa.array(shares.counted.tolist(), pa.bool_()),
        }
        for name in ("delta_h1", "as_entropy", "as_update"):
            values: torch.Tensor | None = getattr(shares, name)
            columns[name] = pa.array([None] * count if values is None else values.tolist(), pa.float64())
        parts.append(pa.table(columns))
    return pa.concat_tables(parts)


def result_document(result: DeltaH1Result) -> dict[str, Any]:
    """The result as JSON-ready data: schema name, package version, every field of `DeltaH1Result`, the interval.

    Derivatives of single tokens, which would be most of the file, are left out.
    """
    names = [f.name for f in dataclasses.fields(result)]
    fields = {name: None if name == "derivatives" else _plain(getattr(result, name)) for name in names}
    if result.derivatives is not None:
        of_sequences = {
            "sequences": result.derivatives.sequences,
            "sequence_shares": result.derivatives.sequence_shares,
        }
        fields["derivatives"] = _plain(of_sequences)
    interval = result.interval(0.95)
    return {
        "schema": RESULT_SCHEMA,
        "version": __version__,
        **fields,
        "interval_95": None if interval is None else list(interval),
        "sign_established": result.sign_established,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        # JSON has no NaN; a value that is not known (c_i in the update batch, say) is null.
        return _without_nan(value.tolist())
    if isinstance(value, torch.dtype):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _without_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if value != value else value
