"""Rows of a Parquet rollouts file. pyarrow is imported when a Parquet file is touched, not before."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from entropy_fast.errors import RolloutsFileError
from entropy_fast.rollouts.fields import RowSource, open_regular
from entropy_fast.rollouts.parquet_metadata import check_size
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
    with open_regular(source.path) as file:
        try:
            # ParquetFile, not read_table: the latter would add columns it reads out of folder names (`group_id=3/`).
            stored = parquet.ParquetFile(file, page_checksum_verification=True)
            schema = stored.schema_arrow
            _check_columns(arrow, schema, source)
            check_size(stored.metadata, source)
            # A text of a megabyte in every one of a million rows is a small file: keep its texts once.
            texts = [column.name for column in schema if arrow.types.is_string(column.type)]
            stored = parquet.ParquetFile(file, page_checksum_verification=True, read_dictionary=texts)
            table = stored.read()
            table.validate(full=True)
            columns = [_cells(arrow, column) for column in table.columns]
        except RolloutsFileError:
            raise
        except (arrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
            source.fail_file(
                f"it cannot be read as Parquet ({error}).", fix="write the file anew; was it cut off?", cause=error
            )
    names: list[str] = table.column_names
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
    for key, numbers in table.by_token.items():
        columns[key] = arrow.LargeListArray.from_arrays(table.response_offsets, numbers)
    parquet.write_table(arrow.table(columns), path, write_page_checksum=True)


def _check_columns(arrow: Any, schema: Any, source: RowSource) -> None:
    """Raise where two columns have one name, or one is of a type that no field has."""
    names: list[str] = schema.names
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        source.fail_file(f"several columns are called {', '.join(twice)}.", fix="write every column once.")
    for column in schema:
        if not _is_plain(arrow.types, column.type):
            source.fail_file(
                f"the column `{column.name}` is of type {column.type}; expected numbers, texts, or lists of numbers.",
                fix="cast it (to int64, double or string) before the file is written, or drop it.",
            )


def _is_plain(kinds: Any, kind: Any) -> bool:
    if kinds.is_dictionary(kind) or kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind):
        return _is_plain(kinds, kind.value_type)
    text = kinds.is_string(kind) or kinds.is_large_string(kind)
    return bool(
        text or kinds.is_integer(kind) or kinds.is_floating(kind) or kinds.is_boolean(kind) or kinds.is_null(kind)
    )


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
        elif kinds.is_dictionary(kind):
            entries = chunk.dictionary.to_pylist()  # one object for every text, however often it stands in the column
            cells.extend(None if index is None else entries[index] for index in chunk.indices.to_pylist())
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
