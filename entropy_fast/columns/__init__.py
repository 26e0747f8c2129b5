"""Coefficients: which sequence or token weighs how much, on the functional side and on the update side."""

from __future__ import annotations

from entropy_fast.columns.coefficients import Backward, Coefficients
from entropy_fast.columns.column import Column, Columns, ScoredTokens, Side
from entropy_fast.columns.functional import Functionals
from entropy_fast.columns.scores import ResolvedColumn, TokenScores
from entropy_fast.columns.table import SequenceTable
from entropy_fast.columns.wanted import Wanted, columns_of

__all__ = [
    "Backward",
    "Coefficients",
    "Column",
    "Columns",
    "Functionals",
    "ResolvedColumn",
    "ScoredTokens",
    "SequenceTable",
    "Side",
    "TokenScores",
    "Wanted",
    "columns_of",
]
