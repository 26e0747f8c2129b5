"""What really happens when a step is taken, found by taking it and putting it back. What estimates never looks at it."""

from entropy_fast.truth.importance import Reweighted, reweighted
from entropy_fast.truth.ledger import Calibration, EntropyLedger, LedgerEntry
from entropy_fast.truth.measuring import RealisedChange, RealisedChanges, Symmetric, measure_delta_h
from entropy_fast.truth.policy_scores import Scored, scored
from entropy_fast.truth.validation import Validation, validation_of

__all__ = [
    "Calibration",
    "EntropyLedger",
    "LedgerEntry",
    "RealisedChange",
    "RealisedChanges",
    "Reweighted",
    "Scored",
    "Symmetric",
    "Validation",
    "measure_delta_h",
    "reweighted",
    "scored",
    "validation_of",
]
