"""Numbers by response token in a Parquet file: one row a response, one list a column, in double precision.

A row's numbers stand in the order of its response tokens, so they do not depend on where a batch has its padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from entropy_fast.errors import BundleError

__all__ = ["read_token_tables", "write_token_tables"]


def write_token_tables(tables: Mapping[str, Tensor], loss_mask: Tensor, path: Path) -> None:
    """Write tables of one batch.

    Args:
        tables: by name [N, T], in the columns of the batch; read at response tokens alone.
        loss_mask: [N, T] 1 at response tokens.
        path: of the file.

    Raises:
        BundleError: a table has another shape than the batch.
    """
    mask = loss_mask.cpu() == 1
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(-1).cumsum(0)]).numpy()
    columns = {}
    for name, table in tables.items():
        if table.shape != mask.shape:
            raise BundleError(
                f"{name} has shape {list(table.shape)}, expected {list(mask.shape)}.",
                fix="pass one number per token of the rollouts, in the token's own column.",
            )
        values = table.detach().to(device="cpu", dtype=torch.float64)[mask]
        columns[name] = pa.LargeListArray.from_arrays(ends, values.numpy())
    pq.write_table(pa.table(columns), path, write_page_checksum=True)


def read_token_tables(path: Path, loss_mask: Tensor) -> dict[str, Tensor]:
    """Read what `write_token_tables` wrote.

    Args:
        path: of the file.
        loss_mask: [N, T] of the batch the numbers are of, whatever its padding.

    Returns:
        By name [N, T] in the columns of the batch, fp64 on the CPU; 0 where no response token stands.

    Raises:
        BundleError: the file cannot be read, or is of a batch of other lengths.
    """
    mask = loss_mask.cpu() == 1
    lengths = mask.sum(-1).tolist()
    try:
        stored = pq.read_table(path, page_checksum_verification=True)
        found = {}
        for name in stored.column_names:
            column = stored.column(name).combine_chunks()
            if column.null_count or [len(values) for values in column] != lengths:
                raise BundleError(
                    f"{path}: the lists of `{name}` are not as long as the responses of the rollouts beside it.",
                    fix="keep the files of one step together.",
                )
            values = torch.from_numpy(column.flatten().to_numpy(zero_copy_only=False).astype("float64"))
            found[name] = torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, values)
    except (OSError, ValueError, AttributeError, pa.ArrowException) as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"{path} cannot be read: {error}", fix="take another copy of the folder.") from error
    return found
