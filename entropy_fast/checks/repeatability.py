"""Two forwards of the same sequences must say the same."""

from __future__ import annotations

from torch import Tensor

from entropy_fast.errors import ModelStateError

__all__ = ["check_repeatable"]

# Relative; far above what non-deterministic kernels do to a sum of log-probs, far below what dropout does.
REPEATABILITY = 1e-2


def check_repeatable(first: Tensor, second: Tensor, rows: Tensor) -> None:
    """Raise when two forwards of the same sequences gave different log-probs.

    Args:
        first: [n] S_i, nats.
        second: [n] S_i of the other forward.
        rows: [n] row indices, for the message.

    Raises:
        ModelStateError: they differ by more than kernels that are not deterministic explain.
    """
    difference = (first - second).abs()
    worst = int((difference / first.abs().clamp_min(1.0)).argmax())
    if float(difference[worst]) > REPEATABILITY * max(1.0, float(first[worst].abs())):
        raise ModelStateError(
            f"two forwards of sequence {int(rows[worst])} gave log-probs {float(first[worst]):.6g} and "
            f"{float(second[worst]):.6g} nats: something in the model is random although dropout modules are off.",
            fix="remove dropout or noise from hooks and custom forwards (a functional dropout that ignores training).",
        )
