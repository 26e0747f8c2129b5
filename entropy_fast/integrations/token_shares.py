"""Which tokens' entropy a step changes, worked out only where somebody asks: it takes another forecast."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from entropy_fast.errors import ConfigError
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.rollouts import Rollouts

__all__ = ["TokenShares"]

SHOWN = 30  # characters of a token


class TokenShares:
    """Shares of the direct part by token: how the step changes the distributions that these tokens were drawn from.

    They are there before the step is taken, while hooks on the forecast are called, and worked out when they are asked for.

    Args:
        forecast: makes a forecast of the direct part, with the share of every response token.
        rollouts: of the step.
        decode: the text of a token id; None where that is not known.
    """

    def __init__(
        self, forecast: Callable[[], DeltaH1Result], rollouts: Rollouts, decode: Callable[[int], str] | None
    ) -> None:
        self._forecast: Callable[[], DeltaH1Result] | None = forecast
        self._rollouts: Rollouts | None = rollouts
        self._decode = decode
        self._by_id: dict[int, float] | None = None

    def by_id(self) -> dict[int, float]:
        """By token id the sum of the shares of its occurrences in the sampled prompts' responses.

        They add up to the direct part.

        Raises:
            ConfigError: the step has been taken.
            Whatever `fast_delta_h1` raises.
        """
        if self._by_id is None:
            if self._forecast is None or self._rollouts is None:
                raise ConfigError(
                    "the step has been taken, and its tokens were not asked for before.",
                    fix="ask for them in a function of on_forecast.",
                )
            result = self._forecast()
            assert result.split is not None and result.split.direct.by_token is not None
            self._by_id = _by_id(result.split.direct.by_token, self._rollouts)
        return self._by_id

    def lowering_most(self, count: int) -> tuple[tuple[str, float], ...]:
        """Tokens whose shares are the most negative, as escaped text or number, with their shares; fewer where few are.

        Raises:
            ConfigError: see `by_id`.
        """
        ranked = sorted((share, token) for token, share in self.by_id().items() if share < 0)
        return tuple((self._named(token), share) for share, token in ranked[:count])

    def close(self) -> None:
        """Let go of the step's batch."""
        self._forecast = self._rollouts = self._decode = None

    def _named(self, token: int) -> str:
        return f"token {token}" if self._decode is None else repr(str(self._decode(token))[:SHOWN])


def _by_id(shares: Tensor, rollouts: Rollouts) -> dict[int, float]:
    places = (rollouts.loss_mask.cpu() == 1) & ~shares.isnan()
    ids, positions = torch.unique(rollouts.input_ids.cpu()[places], return_inverse=True)
    sums = torch.zeros(len(ids), dtype=torch.float64).index_add_(0, positions, shares[places].double())
    return dict(zip(ids.tolist(), sums.tolist(), strict=True))
