"""What an optimizer's next step is made from, in one object: the batch, how its loss weighs every token, and what came along.

Legend: L the loss, s_t log-prob and H_t entropy of response token t of a row, a_t = -∂L/∂s_t, e_t = -∂L/∂H_t.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from entropy_fast.columns import TokenScores
from entropy_fast.rollouts import Rollouts

__all__ = ["StepWindow", "with_baselines"]


@dataclasses.dataclass(frozen=True, eq=False)
class StepWindow:
    """All rows whose gradient stands in ``.grad`` just before ``optimizer.step()``.

    Attributes:
        rollouts: N rows.
        of_logprob: [N, T] a_t in the token's own column, of the gradient as it stands, clipping included.
        of_entropy: [N, T] e_t likewise; None where the loss has no gradient by entropies.
        scores: what the training forward said of the rows; None where dropout or rounding makes it another policy's.
        functionals: by name one number per row, [N], whose expectation is forecast too.
        on_policy: [N] whether a row was sampled from the policy as it is now; None where that is not known.
        skipped: why the optimizer will not take the step; None where it will.
        clip: what clipping multiplied the gradient by, coefficients included.
        decode: the text of a token id; None where that is not known.
    """

    rollouts: Rollouts
    of_logprob: Tensor
    of_entropy: Tensor | None = None
    scores: TokenScores | None = None
    functionals: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    on_policy: Tensor | None = None
    skipped: str | None = None
    clip: float = 1.0
    decode: Callable[[int], str] | None = None

    @property
    def coefficients(self) -> tuple[Tensor, Tensor] | Tensor:
        """As `fast_delta_h1` takes them."""
        return self.of_logprob if self.of_entropy is None else (self.of_logprob, self.of_entropy)


def with_baselines(window: StepWindow) -> StepWindow:
    """Without functionals, where some prompt has a single response in the step: others of the prompt are their baseline."""
    rollouts = window.rollouts
    sizes = torch.bincount(rollouts.prompt_index[rollouts.response_lengths > 0], minlength=1)
    return dataclasses.replace(window, functionals={}) if bool((sizes == 1).any()) else window
