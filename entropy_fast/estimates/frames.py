"""Tables of a result in other libraries' types; pandas and xarray are imported here, when they are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entropy_fast.estimates.held import entropy_units, kernel_of, kernel_shares
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.optional_packages import require_package

if TYPE_CHECKING:
    import pandas
    import pyarrow as pa
    import xarray

__all__ = ["dataframe", "kernel_dataset"]


def dataframe(table: pa.Table, called: str) -> pandas.DataFrame:
    """The table as a pandas DataFrame; its schema's metadata are in ``attrs``.

    Args:
        table: what is null becomes NaN (or None in columns of texts and lists).
        called: what was called, for the message.

    Raises:
        MissingPackageError: pandas is not installed.
    """
    require_package("pandas", called, otherwise="take to_arrow")
    frame: pandas.DataFrame = table.to_pandas()
    frame.attrs.update({key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()})
    return frame


def kernel_dataset(result: DeltaH1Result) -> xarray.Dataset:
    """K and every pair's share of δH₁ over ``entropy_unit`` and ``update_unit``, with the units' group ids and texts.

    Raises:
        MissingPackageError: xarray is not installed.
        ResultError: the result does not hold the kernel.
    """
    require_package("xarray", "to_xarray()", otherwise='take to_arrow("kernel")')
    import xarray

    units, dims = entropy_units(result), ("entropy_unit", "update_unit")
    coordinates: dict[str, object] = {dim: range(len(units)) for dim in dims}
    for dim in dims:
        side = dim.partition("_")[0]
        coordinates[f"{side}_groups"] = (dim, [", ".join(map(str, unit.group_ids)) for unit in units])
        coordinates[f"{side}_prompt"] = (dim, ["" if unit.prompt is None else unit.prompt for unit in units])
    about = {"units": f"{result.unit} per unit of learning rate", "long_name": "influence kernel"}
    shares = {"units": result.unit, "long_name": "share of δH₁; none on the diagonal"}
    return xarray.Dataset(
        {"kernel": (dims, kernel_of(result).numpy(), about), "share": (dims, kernel_shares(result).numpy(), shares)},
        coordinates,
    )
