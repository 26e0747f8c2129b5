"""Ways that a probe is kept from, so that it takes the next one."""

from __future__ import annotations

import pytest

from entropy_fast.ways import WayKind


def refuse(patch: pytest.MonkeyPatch, *kinds: WayKind) -> None:
    """These find a reason against every model from now on."""
    for kind in kinds:
        patch.setattr(kind, "why_not", lambda self, trial: "not wanted here")
