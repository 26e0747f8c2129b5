"""Dataclasses come back from JSON as they were, and what does not fit is named."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from entropy_fast.config import EstimateOptions
from entropy_fast.errors import ResultError
from entropy_fast.run_folder.json_reading import from_json


@dataclasses.dataclass(frozen=True)
class Inner:
    name: str
    number: float
    size: int | None = None


@dataclasses.dataclass(frozen=True)
class Outer:
    one: Inner
    many: tuple[Inner, ...]
    pair: tuple[float | None, bool]
    by_name: Mapping[str, Inner]
    word: Literal["a", "b"]
    options: EstimateOptions


inner = st.builds(Inner, st.text(max_size=5), st.floats(allow_infinity=False), st.none() | st.integers(-(2**53), 2**53))
outer = st.builds(
    Outer,
    inner,
    st.lists(inner, max_size=3).map(tuple),
    st.tuples(st.none() | st.floats(allow_nan=False, allow_infinity=False), st.booleans()),
    st.dictionaries(st.text(max_size=3), inner, max_size=3),
    st.sampled_from(["a", "b"]),
    st.builds(EstimateOptions, st.sampled_from(["dr_grpo", "pooled"]), parts=st.sampled_from([None, ("direct",)])),
)


def unknown_as_null(value):
    if isinstance(value, dict):
        return {key: unknown_as_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [unknown_as_null(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


@given(outer)
def test_what_was_written_comes_back(given_object):
    text = json.dumps(unknown_as_null(dataclasses.asdict(given_object)), allow_nan=False)
    found = from_json(Outer, json.loads(text), "here")
    assert repr(found) == repr(given_object)  # NaN is not equal to itself


@dataclasses.dataclass(frozen=True)
class Table:
    values: torch.Tensor
    other: torch.Tensor | None = None


def test_tensors_are_double_or_truth_values_and_null_is_nan():
    found = from_json(Table, {"values": [[1, None], [0.1, 2]], "other": [True, False]}, "here")
    expected = torch.tensor([[1, math.nan], [0.1, 2]], dtype=torch.float64)
    torch.testing.assert_close(found.values, expected, rtol=0, atol=0, equal_nan=True)
    assert found.other.dtype == torch.bool
    assert from_json(Table, {"values": []}, "here").values.shape == (0,)


GOOD = {
    "one": {"name": "x", "number": 1},
    "many": [],
    "pair": [None, True],
    "by_name": {},
    "word": "a",
    "options": {"weighting": "pooled"},
}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("one", 3, "here.one is '3', expected an object"),
        ("one", {"name": "x"}, "here.one: `number` is missing"),
        ("one", {"name": 1, "number": 1}, "here.one.name is '1', expected a str"),
        ("one", {"name": "x", "number": "1"}, "here.one.number is '1', expected a float"),
        ("one", {"name": "x", "number": True}, "here.one.number"),
        ("one", {"name": "x", "number": 1, "size": 1.5}, "here.one.size is '1.5', expected a int"),
        ("many", {}, "here.many is '{}', expected a list"),
        ("many", [1], "expected an object"),
        ("pair", [1.0], "expected a list of 2"),
        ("pair", [1.0, 1], "expected a bool"),
        ("by_name", [], "here.by_name"),
        ("by_name", {"k": 1}, r"here.by_name.k"),
        ("word", "c", "expected one of a, b"),
        ("options", {"weighting": "none"}, "`weighting` is 'none'"),
        ("options", [], "here.options"),
    ],
)
def test_what_does_not_fit_is_named(field, value, message):
    from_json(Outer, GOOD, "here")
    with pytest.raises(ResultError, match=message):
        from_json(Outer, {**GOOD, field: value}, "here")
    with pytest.raises(ResultError, match=f"`{field}` is missing"):
        from_json(Outer, {key: item for key, item in GOOD.items() if key != field}, "here")


@pytest.mark.parametrize("values", [3, "x", [[1], [1, 2]], ["x"], [{}]])
def test_a_table_that_is_none_is_named(values):
    with pytest.raises(ResultError, match=r"here\.values .* expected a list of numbers"):
        from_json(Table, {"values": values}, "here")
