"""A result as Arrow tables. What is not known is null, never 0.

| kind | a row is | columns |
|---|---|---|
| parts | a known part of δH₁ | part, and those of a forecast |
| prompts | a unit | index, those of `PromptContribution`, direct, visitation |
| step_parts | a part of the step and what it changes | part, of, and those of a forecast |
| updates | an update and what it changes | update ("planned" first), of, and those of a forecast |
| functionals | another number's expectation | functional, and those of a forecast |
| layers, parameters | a layer, a parameter | layer or parameter, share, direct, visitation |
| sequences | a row of the rollouts | role, row, those of `SequenceContributions`, prompt_index, group_id, sequence_logprob |
| tokens | a response token | row, prompt_index, group_id, position, column, token_id, share, direct, visitation |
| kernel | a pair of units | entropy_unit, update_unit, kernel (K_nm), share |
| errors | a standard error of δH₁ | method, value, covers |

A forecast has value, std_error, low and high (ends of the 95 % interval for this very update), population_std_error and unit
(null for functionals, which have their own). Changes are in the unit that the schema's metadata give.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from entropy_fast.columns import SequenceTable, Side
from entropy_fast.errors import ConfigError
from entropy_fast.estimates.attribution import Role, SequenceContributions
from entropy_fast.estimates.forecast import Forecast
from entropy_fast.estimates.held import (
    by_sequence_of,
    by_token_of,
    entropy_units,
    functionals_of,
    kernel_of,
    kernel_shares,
    layers_of,
    parameters_of,
    parts_of,
    step_parts_of,
    updates_of,
)
from entropy_fast.estimates.response_rows import ResponseRows
from entropy_fast.estimates.result import DeltaH1Result, Kind, PromptContribution
from entropy_fast.estimates.split import UpdateForecasts

__all__ = ["arrow_table"]

INTEGERS = ("n_responses",)
TEXTS = ("role", "prompt")


def arrow_table(result: DeltaH1Result, kind: Kind) -> pa.Table:
    """See the table above.

    Raises:
        ConfigError: there is no such kind.
        ResultError: the result does not hold it; the message says which option asks for it.
    """
    if kind not in _MAKERS:
        raise ConfigError(f"there is no table {kind!r}.", fix=f"use one of {', '.join(_MAKERS)}.")
    return _MAKERS[kind](result).replace_schema_metadata({"unit": result.unit})


def _numbers(values: Iterable[float | None] | Tensor) -> pa.Array:
    """NaN and None are null."""
    listed = values.tolist() if isinstance(values, Tensor) else list(values)
    return pa.array(listed, pa.float64(), from_pandas=True)


def _integers(values: Iterable[int | None] | Tensor) -> pa.Array:
    return pa.array(values.tolist() if isinstance(values, Tensor) else list(values), pa.int64())


def _texts(values: Iterable[str | None]) -> pa.Array:
    return pa.array(list(values), pa.string())


def _forecasts(found: Iterable[tuple[Forecast, str | None]]) -> dict[str, pa.Array]:
    """Columns of forecasts, each with its unit."""
    listed = list(found)
    ends = [forecast.interval() for forecast, _ in listed]
    return {
        "value": _numbers(forecast.value for forecast, _ in listed),
        "std_error": _numbers(forecast.std_error for forecast, _ in listed),
        "low": _numbers(low for low, _ in ends),
        "high": _numbers(high for _, high in ends),
        "population_std_error": _numbers(forecast.population_std_error for forecast, _ in listed),
        "unit": _texts(unit for _, unit in listed),
    }


def _parts(result: DeltaH1Result) -> pa.Table:
    known = parts_of(result)
    return pa.table({"part": _texts(known), **_forecasts((part, result.unit) for part in known.values())})


def _prompts(result: DeltaH1Result) -> pa.Table:
    units = result.per_prompt
    columns = {
        "index": _integers([*range(len(entropy_units(result))), *range(len(units) - len(entropy_units(result)))])
    }
    for field in dataclasses.fields(PromptContribution):
        values = [getattr(unit, field.name) for unit in units]
        if field.name == "group_ids":
            columns[field.name] = pa.array([list(ids) for ids in values], pa.list_(pa.int64()))
        else:
            make = _integers if field.name in INTEGERS else _texts if field.name in TEXTS else _numbers
            columns[field.name] = make(values)
    known, others = parts_of(result), len(units) - len(entropy_units(result))
    for part in ("direct", "visitation"):
        shares = known[part].by_unit.tolist() if part in known else [None] * len(entropy_units(result))
        columns[part] = _numbers([*shares, *[None] * others])
    return pa.table(columns)


def _functionals(result: DeltaH1Result) -> pa.Table:
    found = functionals_of(result)
    return pa.table({"functional": _texts(found), **_forecasts((forecast, None) for forecast in found.values())})


def _compared(result: DeltaH1Result, found: Mapping[str, UpdateForecasts], what: str) -> pa.Table:
    """A row for each of ``found`` and each number that it changes."""
    rows: list[tuple[str, str, Forecast, str | None]] = []
    for name, own in found.items():
        rows += [(name, part, forecast, result.unit) for part, forecast in parts_of(result, own).items()]
        rows += [(name, functional, forecast, None) for functional, forecast in own.functionals.items()]
    return pa.table(
        {
            what: _texts(row[0] for row in rows),
            "of": _texts(row[1] for row in rows),
            **_forecasts((row[2], row[3]) for row in rows),
        }
    )


def _by_name(
    result: DeltaH1Result, what: str, shares_of: Callable[[DeltaH1Result], dict[str, float]], attribute: str
) -> pa.Table:
    shares, known = shares_of(result), parts_of(result)
    columns = {what: _texts(shares), "share": _numbers(shares.values())}
    for part in ("direct", "visitation"):
        of_part = getattr(known[part], attribute) if part in known else None
        columns[part] = _numbers([None] * len(shares) if of_part is None else of_part.values())
    return pa.table(columns)


def _sequences(result: DeltaH1Result) -> pa.Table:
    return pa.concat_tables(
        _of_batch(role, shares, result.response_rows[role], result.sequences[_side(role)])
        for role, shares in by_sequence_of(result).items()
    )


def _side(role: Role) -> str:
    return str((Side.UPDATE if role == "update" else Side.FUNCTIONAL).value)


def _of_batch(role: Role, shares: SequenceContributions, rows: ResponseRows, table: SequenceTable) -> pa.Table:
    count = len(shares.counted)

    def spread(values: Tensor, make: Callable[[Any], pa.Array]) -> pa.Array:
        found: list[Any] = [None] * count
        for row, value in zip(rows.row.tolist(), values.tolist(), strict=True):
            found[row] = value
        return make(found)

    columns: dict[str, pa.Array] = {
        "role": _texts([role] * count),
        "row": _integers(range(count)),
        "counted": pa.array(shares.counted.tolist(), pa.bool_()),
    }
    for name in ("delta_h1", "as_entropy", "as_update"):
        values: Tensor | None = getattr(shares, name)
        columns[name] = _numbers([None] * count if values is None else values)
    columns["prompt_index"] = spread(rows.prompt, _integers)
    columns["group_id"] = spread(rows.group_id, _integers)
    columns["sequence_logprob"] = spread(table.sequence_logprobs, _numbers)
    return pa.table(columns)


def _tokens(result: DeltaH1Result) -> pa.Table:
    by_token_of(result)
    rows = next(rows for role, rows in result.response_rows.items() if role != "update")
    mask, ids = rows.response_mask, rows.input_ids
    assert mask is not None and ids is not None
    sequence, column = mask.nonzero(as_tuple=True)
    row = rows.row[sequence]
    columns = {
        "row": _integers(row),
        "prompt_index": _integers(rows.prompt[sequence]),
        "group_id": _integers(rows.group_id[sequence]),
        "position": _integers((mask.long().cumsum(1) - 1)[sequence, column]),
        "column": _integers(column),
        "token_id": _integers(ids[sequence, column]),
        "share": _numbers(by_token_of(result)[row, column]),
    }
    known = parts_of(result)
    for part in ("direct", "visitation"):
        shares = known[part].by_token if part in known else None
        columns[part] = _numbers([None] * len(row) if shares is None else shares[row, column])
    return pa.table(columns)


def _kernel(result: DeltaH1Result) -> pa.Table:
    kernel, shares = kernel_of(result), kernel_shares(result)
    entropy, update = torch.meshgrid(*(torch.arange(len(kernel)),) * 2, indexing="ij")
    return pa.table(
        {
            "entropy_unit": _integers(entropy.flatten()),
            "update_unit": _integers(update.flatten()),
            "kernel": _numbers(kernel.flatten()),
            "share": _numbers(shares.flatten()),
        }
    )


def _errors(result: DeltaH1Result) -> pa.Table:
    errors = result.diagnostics.standard_errors
    return pa.table(
        {
            "method": _texts(error.name for error in errors),
            "value": _numbers(error.value for error in errors),
            "covers": _texts(error.covers for error in errors),
        }
    )


_MAKERS: dict[str, Callable[[DeltaH1Result], pa.Table]] = {
    "parts": _parts,
    "prompts": _prompts,
    "step_parts": lambda result: _compared(result, step_parts_of(result), "part"),
    "updates": lambda result: _compared(result, updates_of(result), "update"),
    "functionals": _functionals,
    "layers": lambda result: _by_name(result, "layer", layers_of, "by_layer"),
    "parameters": lambda result: _by_name(result, "parameter", parameters_of, "by_parameter"),
    "sequences": _sequences,
    "tokens": _tokens,
    "kernel": _kernel,
    "errors": _errors,
}
