"""`ProbeComponents`, the two-pass engine, under the name by which older scripts import it."""

from entropy_fast.engines.two_pass.engine import ProbeComponents

__all__ = ["ProbeComponents"]
