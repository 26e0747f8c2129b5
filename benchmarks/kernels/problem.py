"""What a spec becomes: inputs, what is expected of them, who computes it, and what that costs on paper."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

from torch import Tensor

Results = dict[str, Tensor | list[Tensor]]
Kind = Literal["backend", "rival", "limit"]
BACKENDS = {"cpu": ("native",), "cuda": ("cuda", "triton")}


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to compute the results, or a limit: something simpler that no way can beat.

    Attributes:
        name: what tables call it.
        kind: ``backend``: the op of this package; ``rival``: something else; ``limit``: not held to any result.
        run: one call.
        note: one line about what it does.
    """

    name: str
    kind: Kind
    run: Callable[[], Results]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Problem:
    """Inputs of one spec, with their contenders.

    Attributes:
        contenders: in the order of the tables; backends first.
        expected: computes the results in float64.
        reset: puts inputs that calls change back to what they were.
        moved_bytes: what has to be read and written at least.
        operations: arithmetic operations, an exponential or a square root counted as one.
        limited_by: the name of the limit that percentages refer to.
        missing: name and reason of contenders that cannot run here.
    """

    contenders: list[Contender]
    expected: Callable[[], Results]
    reset: Callable[[], None]
    moved_bytes: int
    operations: int
    limited_by: str
    missing: dict[str, str] = dataclasses.field(default_factory=dict)
