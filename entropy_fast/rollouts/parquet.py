"""Rows of a Parquet rollouts file. pyarrow is imported when a Parquet file is touched, not before."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from entropy_fast.errors import RolloutsFileError
from entropy_fast.rollouts.fields import RowSource
from entropy_fast.rollouts.rows import RolloutsTable

__all__ = ["iterate_parquet", "write_parquet"]


def iterate_parquet(source: RowSource) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 0, values by column) of every row; cells with lists of numbers come as arrays.

    Raises:
        RolloutsFileError: the file is not Parquet, is damaged, or has two columns of one name; pyarrow is missing.
        OSError: the file cannot be opened.
    """
    arrow = _import_arrow("pyarrow", source.path)
    parquet = _import_arrow("pyarrow.parquet", source.path)
    _import_arrow("pyarrow.compute", source.path)
    with source.path.open("rb") as file:
        try:
            # ParquetFile, not read_table: the latter would add columns it reads out of folder names (`group_id=3/`).
            table = parquet.ParquetFile(file).read()
            table.validate(full=True)
        except (arrow.ArrowException, OSError, ValueError) as error:
            source.fail_file(
                f"it cannot be read as Parquet ({error}).", fix="write the file anew; was it cut off?", cause=error
            )
    names: list[str] = table.column_names
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        source.fail_file(f"several columns are called {', '.join(twice)}.", fix="write every column once.")
    columns = [_cells(arrow, column) for column in table.columns]
    for row in range(table.num_rows):
        yield row, {name: column[row] for name, column in zip(names, columns, strict=True)}


def write_parquet(table: RolloutsTable, path: Path) -> None:
    """Write one row per response: token lists (int64, int8), floats as double, integers as int64, texts as strings."""
    arrow = _import_arrow("pyarrow", path)
    parquet = _import_arrow("pyarrow.parquet", path)
    columns = {key: arrow.array(values) for key, values in table.scalars.items()}
    # 64-bit offsets: a batch may hold more than 2^31 tokens.
    columns["input_ids"] = arrow.LargeListArray.from_arrays(table.offsets, table.input_ids)
    columns["loss_mask"] = arrow.LargeListArray.from_arrays(table.offsets, table.loss_mask.astype("int8"))
    if table.old_logprobs is not None:
        columns["old_logprobs"] = arrow.LargeListArray.from_arrays(table.response_offsets, table.old_logprobs)
    parquet.write_table(arrow.table(columns), path)


def _cells(arrow: Any, column: Any) -> Sequence[Any]:
    """The cells of a column: arrays for lists of numbers without nulls, plain Python values otherwise."""
    cells: list[Any] = []
    for chunk in column.chunks:
        kind, kinds = chunk.type, arrow.types
        is_list = kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind)
        numbers = is_list and (kinds.is_integer(kind.value_type) or kinds.is_floating(kind.value_type))
        # Through Python objects, lists would take minutes at 10^8 tokens.
        if numbers and not (chunk.null_count or chunk.flatten().null_count):
            values = chunk.flatten().to_numpy(zero_copy_only=False)
            ends = arrow.compute.cumulative_sum(arrow.compute.list_value_length(chunk).cast("int64")).to_pylist()
            cells.extend(values[start:end] for start, end in zip([0, *ends], ends, strict=False))
        else:
            cells.extend(chunk.to_pylist())
    return cells


def _import_arrow(name: str, path: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RolloutsFileError(
            f"{path}: Parquet files need pyarrow, which cannot be imported ({error}).",
            fix="install it (pip install pyarrow), or use the .jsonl format, which needs nothing.",
        ) from error
