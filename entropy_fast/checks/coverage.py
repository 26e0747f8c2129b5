"""What a backward pass reached: counted after every X and Y pass, because an empty pass looks like a zero."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from entropy_fast.errors import EntropyFastWarning, GradientCoverageError

__all__ = ["PassCoverage", "coverage_difference", "reached_by", "require_gradients", "warn_if_coverage_differs"]


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
    def of(cls, side: str, reached: Tensor, names: Sequence[str], mean_response_length: float) -> PassCoverage:
        """Counted from what every trainable parameter received: `reached_by`."""
        elements, touched, squares = reached.unbind(1)
        hit = touched > 0
        return cls(
            side=side,
            n_trainable=len(reached),
            n_with_gradient=int(hit.sum()),
            numel_share=float(elements[hit].sum() / elements.sum()),
            norm=math.sqrt(float(squares[hit].sum())),
            untouched=tuple(name for name, found in zip(names, hit.tolist(), strict=True) if not found),
            mean_response_length=mean_response_length,
        )


def reached_by(tensors: Sequence[Tensor], touched: Sequence[bool]) -> Tensor:
    """``[parameters, 3]`` elements, whether anything ever arrived, and the square of the norm, of accumulated gradients."""
    return torch.tensor(
        [
            (t.numel(), float(hit), float(t.reshape(-1).double() @ t.reshape(-1).double()) if hit else 0.0)
            for t, hit in zip(tensors, touched, strict=True)
        ],
        dtype=torch.float64,
    ).view(-1, 3)


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
