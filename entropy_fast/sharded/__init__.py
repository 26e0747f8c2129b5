"""Models that FSDP2 shards, and their optimizers, for the length of a probe."""

from entropy_fast.sharded.parted import PartedSums
from entropy_fast.sharded.whole import WholeModel, as_whole

__all__ = ["PartedSums", "WholeModel", "as_whole"]
