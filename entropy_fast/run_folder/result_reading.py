"""A result's folder back as one object, once all its files are found to be the ones it was written with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from entropy_fast.errors import ResultError
from entropy_fast.estimates.attribution import Role, SequenceContributions
from entropy_fast.estimates.measured import Plan
from entropy_fast.estimates.response_rows import ResponseRows
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.run_folder.json_reading import from_json
from entropy_fast.run_folder.provenance import Provenance
from entropy_fast.run_folder.response_table import SavedResponse, responses_of
from entropy_fast.run_folder.result_files import DOCUMENT, RESPONSES, read_result_document

__all__ = ["SavedPlan", "SavedResult", "read_result"]

AGAIN = "run the probe again."


@dataclasses.dataclass(frozen=True)
class SavedPlan(Plan):
    """A plan of whatever engine.

    Attributes:
        text: what the engine's own plan said of itself.
    """

    text: str = ""

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True, eq=False)
class SavedResult:
    """What was written of a probe.

    Attributes:
        folder: it is from.
        version: of the package that wrote it.
        result: the same numbers. Without what `write_result` leaves out: derivatives, token shares (which ``responses`` have),
            and kernels of single parts.
        provenance: how it came to be; None where it was not said.
        responses: of its batches; None where they were not written.
    """

    folder: Path
    version: str
    result: DeltaH1Result
    provenance: Provenance | None
    responses: tuple[SavedResponse, ...] | None


def read_result(folder: Path) -> SavedResult:
    """What `write_result` wrote.

    Args:
        folder: with ``result.json``.

    Raises:
        ResultError: there is none, a file is not the one it was written with, or a field is missing or of another type.
    """
    document = read_result_document(folder)
    where = str(folder / DOCUMENT)
    responses = None
    if RESPONSES in document["files"]:
        try:
            responses = responses_of(pq.read_table(folder / RESPONSES, page_checksum_verification=True))
        except (OSError, pa.ArrowException) as error:
            raise ResultError(f"{folder / RESPONSES} cannot be read: {error}", fix=AGAIN) from error
    kept = document.get("provenance")
    result = _result(document, where)
    if responses is not None:
        result = dataclasses.replace(result, response_rows=_rows(responses))
    return SavedResult(
        folder,
        str(document.get("version", "unknown")),
        result,
        None if kept is None else from_json(Provenance, kept, f"{where}: provenance"),
        responses,
    )


def _result(document: dict[str, Any], where: str) -> DeltaH1Result:
    """The result with what stands apart in the document back in its place."""
    missing: dict[str, Any] = {"derivatives": None}
    forecast = document.get("forecast")
    if document.get("row_sums") is None and isinstance(forecast, dict):
        units = forecast.get("n_units")
        missing["row_sums"] = [None] * units if isinstance(units, int) else None  # of no part of the step
    found = from_json(DeltaH1Result, {**document, **missing}, where)
    by_sequence = document.get("by_sequence")
    shares = None
    if by_sequence is not None:
        shares = from_json(_BySequence, {"by_role": by_sequence}, where).by_role
    plan = found.diagnostics.plan
    text = document.get("plan")
    saved = SavedPlan(plan.way, plan.not_taken, plan.reasons, text if isinstance(text, str) else str(plan))
    return dataclasses.replace(
        found,
        forecast=dataclasses.replace(found.forecast, by_sequence=shares, kernel=found.kernel),
        diagnostics=dataclasses.replace(found.diagnostics, plan=saved),
    )


def _rows(responses: Sequence[SavedResponse]) -> dict[Role, ResponseRows]:
    """Where sequences stand in their rollouts; of tokens the responses themselves say more."""
    found: dict[Role, ResponseRows] = {}
    for role in dict.fromkeys(response.role for response in responses):
        counted = [response for response in responses if response.role == role and response.token_ids]
        order = list(dict.fromkeys(response.group_id for response in counted))
        columns = zip(*((r.row, order.index(r.group_id), r.group_id) for r in counted), strict=True)
        found[role] = ResponseRows(*(torch.tensor(column, dtype=torch.int64) for column in columns))
    return found


@dataclasses.dataclass(frozen=True)
class _BySequence:
    by_role: dict[Role, SequenceContributions]
