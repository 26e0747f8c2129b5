"""What really happens when a step is taken, found by taking it and putting it back. What estimates never looks at it."""

from entropy_fast.truth.ledger import Calibration, EntropyLedger, LedgerEntry
from entropy_fast.truth.rescoring import Rescored, rescored_entropy

__all__ = ["Calibration", "EntropyLedger", "LedgerEntry", "Rescored", "rescored_entropy"]
