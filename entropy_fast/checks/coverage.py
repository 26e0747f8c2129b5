"""What a backward pass reached: counted after every X and Y pass, because an empty pass looks like a zero."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence

from torch import Tensor

from entropy_fast.errors import EntropyFastWarning, GradientCoverageError

__all__ = ["PassCoverage", "coverage_difference", "require_gradients", "warn_if_coverage_differs"]


@dataclasses.dataclass(frozen=True)
class PassCoverage:
    """What one side's gradient reached.

    Attributes:
        side: ``entropy`` (X) or ``update`` (Y).
        n_trainable: trainable parameters.
        n_with_gradient: those that received a gradient in at least one microbatch.
        numel_share: share of the trainable elements in them.
        norm: Euclidean norm of the accumulated raw gradient; None where the gradient was not formed.
        untouched: names of parameters that received none.
        mean_response_length: tokens, averaged over the sequences of the pass.
        one_prompt: whether the parameters were counted in a backward of one prompt that stands for all of them.
    """

    side: str
    n_trainable: int
    n_with_gradient: int
    numel_share: float
    norm: float | None
    untouched: tuple[str, ...]
    mean_response_length: float
    one_prompt: bool = False

    @classmethod
    def of(
        cls,
        side: str,
        tensors: Sequence[Tensor],
        touched: Sequence[bool],
        names: Sequence[str],
        mean_response_length: float,
    ) -> PassCoverage:
        """Counted from accumulated gradients, one a trainable parameter, and whether anything ever arrived at each."""
        hit = [tensor for tensor, found in zip(tensors, touched, strict=True) if found]
        squares = sum(float(t.reshape(-1).double() @ t.reshape(-1).double()) for t in hit)
        return cls(
            side=side,
            n_trainable=len(touched),
            n_with_gradient=len(hit),
            numel_share=sum(t.numel() for t in hit) / sum(t.numel() for t in tensors),
            norm=math.sqrt(squares),
            untouched=tuple(name for name, found in zip(names, touched, strict=True) if not found),
            mean_response_length=mean_response_length,
        )


def require_gradients(coverage: PassCoverage, *, strict: bool, cause: str) -> None:
    """Raise when a pass reached nothing (or, with ``strict``, not everything).

    Args:
        coverage: the pass.
        strict: whether one untouched parameter is already an error.
        cause: the likely cause, worked out by the caller from the model's settings.

    Raises:
        GradientCoverageError: no parameter received a gradient, or strict and one did not.
    """
    if coverage.n_with_gradient == 0:
        raise GradientCoverageError(
            f"{coverage.side} pass: none of the {coverage.n_trainable} trainable parameters received a gradient. "
            f"The likely cause: {cause}",
            fix="remove the cause; `entropy-fast doctor` checks the model step by step.",
        )
    if strict and coverage.untouched:
        raise GradientCoverageError(
            f"{coverage.side} pass (strict): {len(coverage.untouched)} of {coverage.n_trainable} trainable parameters "
            f"received no gradient, the first being '{coverage.untouched[0]}'.",
            fix="freeze what is not in the forward (requires_grad_(False)), or run with strict=False to have it counted.",
        )


def coverage_difference(x: PassCoverage, y: PassCoverage) -> str | None:
    """A sentence when the two passes reached different parameters, None when they agree or one saw a single prompt."""
    if x.one_prompt or y.one_prompt:
        return None
    if x.n_with_gradient == y.n_with_gradient and x.untouched == y.untouched:
        return None
    return (
        f"the entropy pass reached {x.n_with_gradient} and the update pass {y.n_with_gradient} of {x.n_trainable} trainable "
        "parameters; parameters reached by one alone contribute nothing to the inner product."
    )


def warn_if_coverage_differs(x: PassCoverage, y: PassCoverage) -> None:
    """Warn when the two passes reached different parameters."""
    message = coverage_difference(x, y)
    if message is not None:
        warnings.warn(message, EntropyFastWarning, stacklevel=3)
