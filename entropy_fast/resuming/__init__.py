"""What a long probe keeps on disk of what it has added up so far, and how a later process goes on from there."""

from entropy_fast.resuming.folder import discard_checkpoint
from entropy_fast.resuming.held import Accumulator, Held, Tables, UnitRows
from entropy_fast.resuming.keeper import FolderKeeper, Keeper, KeptSweep

__all__ = [
    "Accumulator",
    "FolderKeeper",
    "Held",
    "Keeper",
    "KeptSweep",
    "Tables",
    "UnitRows",
    "discard_checkpoint",
]
