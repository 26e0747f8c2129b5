"""Coefficients: which sequence or token weighs how much, on the functional side and on the update side."""

from __future__ import annotations

from entropy_fast.columns.coefficients import Backward, Coefficients
from entropy_fast.columns.column import Column, Columns, ScoredTokens, Side
from entropy_fast.columns.entropy import DirectEntropy, RaoBlackwellEntropy, ScoreFunctionEntropy
from entropy_fast.columns.functional import Functionals, functionals_of
from entropy_fast.columns.table import SequenceTable
from entropy_fast.columns.update import PolicyGradient
from entropy_fast.config import EstimateOptions

__all__ = [
    "Backward",
    "Coefficients",
    "Column",
    "Columns",
    "Functionals",
    "ScoredTokens",
    "SequenceTable",
    "Side",
    "columns_of",
    "functionals_of",
]


def columns_of(options: EstimateOptions) -> Columns:
    """The columns that the options ask for: an entropy, what is to be known apart from it, and an update.

    The first functional column is the one whose change is forecast.
    """
    rao_blackwell = options.entropy_estimator == "rao_blackwell"
    entropy = (RaoBlackwellEntropy if rao_blackwell else ScoreFunctionEntropy)(options.weighting)
    apart = (DirectEntropy(options.weighting),) if options.split else ()
    return Columns((entropy, *apart, PolicyGradient(options.weighting, options.importance_ratio, options.clip_range)))
