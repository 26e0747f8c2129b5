"""How the sequences of a microbatch run forward, and backward into a recorder; each way says why it cannot be taken."""

from entropy_fast.ways.choice import Choice, choose_way, register_way, way_kinds
from entropy_fast.ways.trial import Trial
from entropy_fast.ways.way import Microbatch, Passed, Way, WayKind

__all__ = ["Choice", "Microbatch", "Passed", "Trial", "Way", "WayKind", "choose_way", "register_way", "way_kinds"]
