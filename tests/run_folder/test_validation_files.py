"""Validations come back from their file as they were."""

from __future__ import annotations

import json
import math

import pytest
from report_pages import validation

from entropy_fast.errors import ResultError
from entropy_fast.run_folder.validation_files import VALIDATION_SCHEMA, read_validation, write_validation


def test_what_was_written_is_read(tmp_path):
    found = {"runs/a": validation(), "runs/b": validation(ten_percent_off=math.nan, slope=math.nan)}
    path = write_validation(found, tmp_path / "new")
    assert path == tmp_path / "new" / "validation.json"
    assert repr(read_validation(path)) == repr(found)
    assert "NaN" not in path.read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "schema 'list'"),
        ('{"schema": "entropy_fast.validation/0"}', "validation/0"),
        (json.dumps({"schema": VALIDATION_SCHEMA, "runs": []}), "no object"),
        (json.dumps({"schema": VALIDATION_SCHEMA, "runs": {"a": {}}}), "`forecast` is missing"),
        (json.dumps({"schema": VALIDATION_SCHEMA, "runs": {"a": 1}}), "expected an object"),
    ],
)
def test_what_is_none_is_a_sentence(tmp_path, text, message):
    (tmp_path / "validation.json").write_text(text)
    with pytest.raises(ResultError, match=message):
        read_validation(tmp_path / "validation.json")
