"""``result.json``, ``per_prompt.parquet`` and what goes with them: one result on disk, in full precision.

``result.json`` is put in place last and holds the names and hashes of the other files. Files without a ``result.json`` that
names them, as a writer that was killed leaves them, are no result.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from entropy_fast._version import __version__
from entropy_fast.digests import sha256_of
from entropy_fast.errors import ResultError
from entropy_fast.estimates.forecast import Forecast
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.run_folder.placing import put_in_place
from entropy_fast.run_folder.provenance import Provenance

__all__ = ["RESULT_SCHEMA", "read_result_document", "read_result_table", "result_document", "write_result"]

RESULT_SCHEMA = "entropy_fast.result/2"
DOCUMENT, PROMPTS, SEQUENCES, RESPONSES, PICTURE = RESULT_FILES = (
    "result.json",
    "per_prompt.parquet",
    "per_sequence.parquet",
    "responses.parquet",
    "contributions.png",
)
OF_ROWS = ("by_sequence", "by_token", "kernel")
# Where a number may be not known: of a sequence by a pass that did not need it, and errors that a batch is too small for.
MAY_BE_UNKNOWN = (
    "sequences",
    "functionals",
    "updates",
    "compared",
    "step_parts",
    "std_error",
    "forecast.std_error",
    "forecast.population_std_error",
    "forecast.largest_share",
    "diagnostics.live_gradient",
    "diagnostics.standard_errors",
    "diagnostics.unbiased_variance",
    "verdict",
    *(
        f"split.{part}.{error}"
        for part in ("total", "direct", "visitation")
        for error in ("value", "std_error", "population_std_error", "by_unit", "largest_share")
    ),
)


def write_result(
    result: DeltaH1Result,
    folder: Path,
    *,
    provenance: Provenance | None = None,
    responses: pa.Table | None = None,
    draw: Callable[[DeltaH1Result, Path], object] | None = None,
) -> list[Path]:
    """Put all files of a result into the folder together, in place of those of an earlier one.

    An earlier result's ``per_sequence.parquet``, ``responses.parquet`` or picture is removed where this one has none. The
    folder is made where it is missing; on any exception it holds what it held before.

    Args:
        result: what to write.
        folder: where to.
        provenance: how it came to be, for whoever reads it later; None leaves that unknown.
        responses: what `entropy_fast.run_folder.response_table.response_table` made; None for no ``responses.parquet``.
        draw: draws ``contributions.png`` to the path it is given; None for no picture.

    Returns:
        Paths of the files, ``result.json`` first.

    Raises:
        ResultError: a number of the result is not finite; nothing is written.
        RunFolderError, OutputFileError: the folder cannot be made or written to.
    """
    document = result_document(result)
    if provenance is not None:
        document["provenance"] = dataclasses.asdict(provenance)
    tables = {PROMPTS: result.to_arrow("prompts")}
    if result.by_sequence is not None:
        tables[SEQUENCES] = result.to_arrow("sequences")
    if responses is not None:
        tables[RESPONSES] = responses

    def fill(temporary: Path) -> None:
        for name, table in tables.items():
            pq.write_table(table, temporary / name, write_page_checksum=True)
        if draw is not None:
            draw(result, temporary / PICTURE)
        files = {path.name: sha256_of(path) for path in sorted(temporary.iterdir())}
        text = json.dumps({**document, "files": files}, indent=2, allow_nan=False) + "\n"
        (temporary / DOCUMENT).write_text(text, encoding="utf-8")

    return [folder / name for name in put_in_place(folder, RESULT_FILES, fill)]


def read_result_document(folder: Path) -> dict[str, Any]:
    """``result.json`` of a folder, once every file that belongs to it is found to be the one it was written with.

    Raises:
        ResultError: there is none, it cannot be read, or the files beside it are missing, changed, or another result's.
    """
    path = folder / DOCUMENT
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ResultError(f"{path} cannot be read: {error}", fix="run the probe again.") from error
    schema = document.get("schema") if isinstance(document, dict) else type(document).__name__
    if schema != RESULT_SCHEMA:
        raise ResultError(f"{path} has schema {schema!r}, expected {RESULT_SCHEMA!r}.", fix="run the probe again.")
    files = document.get("files")
    known = set(RESULT_FILES) - {DOCUMENT}
    if not isinstance(files, Mapping) or not known.issuperset(files):
        raise ResultError(f"{path}: `files` names none of a result's files.", fix="run the probe again.")
    for name in sorted(known):
        there = (folder / name).is_file()
        if there != (name in files) or (there and sha256_of(folder / name) != files[name]):
            problem = "is not the file it was written with" if there else "is missing"
            raise ResultError(f"{path}: {name} beside it {problem}.", fix="run the probe again.")
    found: dict[str, Any] = document
    return found


def read_result_table(folder: Path, name: str) -> pa.Table:
    """``per_prompt.parquet`` or another table of a result, verified like `read_result_document`.

    Raises:
        ResultError: likewise, or the result has no such table.
    """
    if name not in read_result_document(folder)["files"] or not name.endswith(".parquet"):
        raise ResultError(f"the result in {folder} has no table {name}.", fix=f"read {PROMPTS}, or use --by-sequence.")
    return pq.read_table(folder / name, page_checksum_verification=True)


def result_document(result: DeltaH1Result) -> dict[str, Any]:
    """The result as JSON-ready data: schema name, package version, every field of `DeltaH1Result`, what follows from them.

    What is of single rows and tokens of a forecast, which would be most of the file, is left out (sequences have a table of
    their own). A number that is not known is null where that may be.

    Raises:
        ResultError: a number is not finite where it has to be known.
    """
    names = [f.name for f in dataclasses.fields(result) if f.name != "response_rows"]
    left_out = {"derivatives"}
    if result.estimate_options.wanted_parts == ("direct",):
        left_out |= {"delta_h1"}  # nobody asked for the whole
    if result.geometry == "next_step" and result.diagonal is None and math.isnan(result.x_dot_y):
        left_out |= {"x_dot_y", "row_sums"}  # of no part of the step
    fields = {name: None if name in left_out else _plain(getattr(result, name), name) for name in names}
    if result.derivatives is not None:
        of_sequences = {
            "sequences": result.derivatives.sequences,
            "sequence_shares": result.derivatives.sequence_shares,
        }
        fields["derivatives"] = _plain(of_sequences, "derivatives")
    return {
        "schema": RESULT_SCHEMA,
        "version": __version__,
        **fields,
        "verdict": _plain(result.verdict, "verdict"),
        "explanation": result.explain(),
        "plan": str(result.plan),
        "by_parameter": _plain(result.by_parameter, "by_parameter"),
        "by_layer": _plain(result.by_layer, "by_layer"),
        "by_sequence": _plain(result.by_sequence, "by_sequence"),
        "interval_95": None if math.isnan(result.std_error) else list(result.interval(0.95)),
        "sign_established": result.sign_established,
    }


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, torch.Tensor):
        return _plain(value.tolist(), where)
    if isinstance(value, torch.dtype):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        left_out = OF_ROWS if isinstance(value, Forecast) else ()
        names = [f.name for f in dataclasses.fields(value) if f.name not in left_out]
        return {name: _plain(getattr(value, name), f"{where}.{name}") for name in names}
    if isinstance(value, Mapping):
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        # JSON has no NaN.
        if math.isnan(value) and where.startswith(MAY_BE_UNKNOWN):
            return None
        raise ResultError(
            f"the result's `{where}` is {value}, so the forecast is not a number anyone measured; nothing was written.",
            fix="look for overflow or NaN in the model, the rollouts and the optimizer (`entropy-fast doctor`).",
        )
    return value
