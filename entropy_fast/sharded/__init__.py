"""Models that FSDP2 shards, as plain ones for the length of a probe."""

from entropy_fast.sharded.whole import WholeModel, as_whole

__all__ = ["WholeModel", "as_whole"]
