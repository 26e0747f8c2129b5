"""Settings for all tests."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from hypothesis import settings

# Times on shared machines say nothing about correctness. In continuous integration the same examples are tried every time,
# so that a run is not decided by luck; elsewhere every run looks at new ones.
settings.register_profile("entropy_fast", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("entropy_fast")

# A shell that starts something in the background without job control has it ignore Ctrl-C, and so do the processes that it
# starts; what tests interrupt is to react whichever way they were started.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Seconds after which a test hangs, whatever else the machine does meanwhile: hundreds of cases may be one of them.
LONG = 3600


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests have a longer limit than that of pyproject.toml, unless they have their own."""
    for item in items:
        if item.get_closest_marker("exhaustive") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(LONG))


@pytest.fixture(autouse=True)
def own_random_state() -> None:
    """Every test draws the same numbers, whatever ran before it in the same process."""
    torch.manual_seed(0)
