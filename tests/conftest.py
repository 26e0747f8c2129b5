"""Settings for all tests."""

from __future__ import annotations

import os

from hypothesis import settings

# Times on shared machines say nothing about correctness. In continuous integration the same examples are tried every time,
# so that a run is not decided by luck; elsewhere every run looks at new ones.
settings.register_profile("entropy_fast", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("entropy_fast")
