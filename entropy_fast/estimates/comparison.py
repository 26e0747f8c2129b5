"""What another update would do beyond the planned one.

Both are forecast from the same prompts, so that what they have in common is in neither the difference nor its error: a
difference may be known well where both are not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from entropy_fast.estimates.forecast import Forecast
from entropy_fast.estimates.kernel_sums import KernelSums
from entropy_fast.estimates.measured import UpdateSums
from entropy_fast.estimates.split import Scale, Split, UpdateForecasts
from entropy_fast.estimates.terms import errors_of, terms_of

__all__ = ["beyond"]

DIRECT = "direct"


def beyond(
    planned: UpdateSums, other: UpdateSums, scale: Scale, found: UpdateForecasts, base: UpdateForecasts
) -> UpdateForecasts:
    """The other update's forecasts less the planned one's, everything in the units of both.

    Args:
        planned: sums of the planned update.
        other: of the other one.
        scale: of both.
        found: forecasts of the other one.
        base: of the planned one.
    """
    functionals = {
        name: _difference(
            other.apart[name], planned.apart[name], scale, found.functionals[name], base.functionals[name]
        )
        for name in base.functionals
    }
    whole = _difference(other.sums, planned.sums, scale, found.forecast, base.forecast)
    return UpdateForecasts(whole, _split(planned, other, scale, found, base, whole), functionals)


def _split(
    planned: UpdateSums, other: UpdateSums, scale: Scale, found: UpdateForecasts, base: UpdateForecasts, whole: Forecast
) -> Split | None:
    if found.split is None or base.split is None:
        return None
    on_batch = found.split.on_batch - base.split.on_batch
    if scale.parts == (DIRECT,):
        return Split(found.split.total, whole, found.split.visitation, on_batch)
    pairs = other.apart[DIRECT], planned.apart[DIRECT]
    direct = _difference(*pairs, scale, found.split.direct, base.split.direct)
    rest = other.sums.less(pairs[0]), planned.sums.less(pairs[1])
    visitation = _difference(*rest, scale, found.split.visitation, base.split.visitation)
    return Split(whole, direct, visitation, on_batch)


def _difference(other: KernelSums, planned: KernelSums, scale: Scale, found: Forecast, base: Forecast) -> Forecast:
    """Of one functional; values and shares are those of the two forecasts, errors those of the difference of their terms."""
    theirs, mine = (terms_of(sums, scale.learning_rate, scale.n_update) for sums in (other, planned))
    terms = [*theirs.values(), *(term.negative() for term in mine.values())]
    errors = errors_of(terms, one_batch=planned.diagonal is not None)
    return Forecast(
        found.value - base.value,
        errors.std_error,
        errors.population_std_error if scale.population_known else math.nan,
        found.n_units,
        found.by_unit - base.by_unit,
        _by_parameter(found.by_parameter, base.by_parameter),
        degrees=errors.degrees,
        population_degrees=errors.population_degrees,
        largest_share=errors.largest_share,
    )


def _by_parameter(found: Mapping[str, float] | None, base: Mapping[str, float] | None) -> dict[str, float] | None:
    return None if found is None or base is None else {name: share - base[name] for name, share in found.items()}
