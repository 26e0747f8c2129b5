"""A forecast as a training loop sees it: numbers under fixed names, NaN where one is not known, and why."""

from __future__ import annotations

import dataclasses
import math

from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.integrations.looking_back import Realised
from entropy_fast.integrations.token_shares import TokenShares
from entropy_fast.truth import Calibration

__all__ = ["StepForecast"]


@dataclasses.dataclass(frozen=True, eq=False)
class StepForecast:
    """Of one optimizer step, made just before it.

    Attributes:
        step: how many steps were taken before it.
        result: the whole result; None where there is no forecast.
        reason: why there is none; None where there is one.
        failed: whether that is an exception, rather than a step that was passed over.
        realised: what the step before this one did; None where that was not measured, and ``realised_reason`` says why.
        seconds: that forecast and measurement took.
        used: share of the training time that forecasts have taken so far.
        calibration: of the direct part over the last steps, once realised changes are known; None until then.
        candidates: names of the updates that are compared.
        tokens: which tokens' entropy the step changes, for hooks on the forecast, while they are called; None where there is no
            forecast, and where FSDP2 shards the model: they are asked for by a rank, and would take all of them.
    """

    step: int
    result: DeltaH1Result | None
    reason: str | None = None
    failed: bool = False
    realised: Realised | None = None
    realised_reason: str | None = None
    seconds: float = math.nan
    used: float = math.nan
    calibration: Calibration | None = None
    candidates: tuple[str, ...] = ()
    tokens: TokenShares | None = None

    def metrics(self) -> dict[str, float]:
        """By name, NaN where not known; never None.

        ``total``, ``direct`` and ``visitation`` with ``_error`` each, in the result's unit; ``level``, the entropy now;
        ``momentum_share``, how much of the direct part is momentum and decay rather than this batch; ``forecast/NAME`` of
        every functional with its error; ``candidate/NAME``, what another update would do to the entropy beyond the one that is
        taken, with its error, and ``candidate/NAME_direct`` likewise of the direct part; ``realised`` and ``realised_direct``
        of the step before with their errors; ``slope``
        and ``coverage``; ``seconds``, ``share_of_training`` and ``prompts``.
        """
        found = dict.fromkeys(
            (f"{part}{what}" for part in ("total", "direct", "visitation") for what in ("", "_error")), math.nan
        )
        found |= dict.fromkeys(("level", "momentum_share", "prompts"), math.nan)
        for name in self.candidates:
            shown = (f"candidate/{name}{part}{what}" for part in ("", "_direct") for what in ("", "_error"))
            found |= dict.fromkeys(shown, math.nan)
        if self.result is not None:
            found |= _of_result(self.result)
        done = self.realised
        found |= {
            "realised": math.nan if done is None else done.total,
            "realised_error": math.nan if done is None else done.total_error,
            "realised_direct": math.nan if done is None else done.direct,
            "realised_direct_error": math.nan if done is None else done.direct_error,
            "slope": math.nan if self.calibration is None else self.calibration.slope,
            "coverage": math.nan if self.calibration is None else self.calibration.coverage,
            "seconds": self.seconds,
            "share_of_training": self.used,
        }
        return found


def _of_result(result: DeltaH1Result) -> dict[str, float]:
    found = {"total": result.delta_h1, "total_error": result.std_error, "level": result.entropy_level}
    found["prompts"] = float(result.forecast.n_units)
    if result.split is not None:
        for part in ("direct", "visitation"):
            own = getattr(result.split, part)
            found |= {part: own.value, f"{part}_error": own.std_error}
        whole = result.split.direct.value
        splits = [result.step_parts[name].split for name in ("momentum", "decay") if name in result.step_parts]
        if splits and whole:
            found["momentum_share"] = sum(math.nan if own is None else own.direct.value for own in splits) / whole
    for name, forecast in result.functionals.items():
        found |= {f"forecast/{name}": forecast.value, f"forecast/{name}_error": forecast.std_error}
    for name, other in result.compared.items():
        total = other.forecast if other.split is None else other.split.total
        found |= {f"candidate/{name}": total.value, f"candidate/{name}_error": total.std_error}
        if other.split is not None:
            direct = other.split.direct
            found |= {f"candidate/{name}_direct": direct.value, f"candidate/{name}_direct_error": direct.std_error}
    return found
