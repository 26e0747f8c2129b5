"""Two-sided intervals of an estimate, from the values whose mean it is: by theory of the normal, and by bootstrap.

Legend: M units of one size, K_nm = X_n · Y_m their kernel (`estimates.u_statistic`), U the estimate, ρ_n the *rows*, M values
whose mean is U and whose standard error s/√M is U's, s² = Σ(ρ_n - U)²/(M - 1). There are two kinds of rows:

    this update             ρ_n = Σ_{m≠n} K_nm / (M - 1) = X_n · Ȳ_{-n}          `update_rows`
    such updates            ρ_n = M U - (M - 1) U_(-n) = U + 2 (M - 1)/(M - 2) (r_n - U)          `population_rows`

The second are the jackknife's pseudo-values, so that s/√M is its standard error; r_n = Σ_{m≠n} (K_nm + K_mn) / (2(M - 1)).
Intervals at level 1 - α, q a quantile:

    normal                  U ± z_{1-α/2} s/√M
    Student                 U ± t_{1-α/2}(M - 1) s/√M
    Satterthwaite           U ± t_{1-α/2}(ν) s/√M,   ν = 2 k₂² / (k₄/M + 2 k₂²/(M - 1)), M - 1 at most
    studentised bootstrap   [U - q_{1-α/2}(t*) s/√M,  U - q_{α/2}(t*) s/√M],   t* = (U* - U) / (standard error of U*)
    BCa bootstrap           [q_{p₁}(U*), q_{p₂}(U*)],   p_i = Φ(z₀ + (z₀ ± z) / (1 - a (z₀ ± z))),   z = z_{1-α/2},
                            z₀ = Φ⁻¹(share of U* < U),   a = Σ(ρ_n - U)³ / (6 (Σ(ρ_n - U)²)^{3/2})

ν is Satterthwaite's 2 (E s²)² / Var s² with k-statistics for what is not known: Var s² = κ₄/M + 2 κ₂²/(M - 1), k₂ = s² and
k₄ the unbiased estimate of κ₄. Long tails make s² uncertain, and ν small, down to 2 (M - 1)/(M + 1) where one unit has it all;
short ones are not believed to make it exceed M - 1.

All are vectorised over leading dimensions, in fp64 on the CPU; resamples come from a generator of their own with a fixed seed.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

import torch
from scipy.stats import t as student_t
from torch import Tensor

from entropy_fast.errors import ConfigError

__all__ = [
    "LEVEL",
    "Interval",
    "degrees_of_freedom",
    "interval",
    "largest_share",
    "population_rows",
    "resampled_rows",
    "resampled_units",
    "share_by_chance",
    "update_rows",
]

Method = Literal["normal", "student", "satterthwaite", "studentised", "bca"]
METHODS: tuple[Method, ...] = get_args(Method)
LEVEL = 0.95  # of intervals, where none is asked for
RESAMPLES = 1999  # (RESAMPLES + 1) α/2 is a whole number for the usual levels
SEED = 20
DISTINCT = 3  # units that a resample's standard error needs, as any jackknife of U does
AT_ONCE = 1 << 18  # numbers of a table of resamples by unit: what fits into a core's cache


@dataclasses.dataclass(frozen=True, eq=False)
class Interval:
    """Ends [...] of intervals; NaN where there are too few units, infinite where the data set no bound."""

    low: Tensor
    high: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Resampled:
    """Estimates U* [..., R] of R resamples, and the standard error of each by the formula that U's own has."""

    values: Tensor
    errors: Tensor


def update_rows(kernel: Tensor) -> Tensor:
    """[..., M] rows for the change by this very update, from K [..., M, M]; `UEstimate.as_entropy` times M."""
    return _off_diagonal(kernel).sum(-1) / (kernel.shape[-1] - 1)


def population_rows(kernel: Tensor) -> Tensor:
    """[..., M] rows for the change by such updates on average, from K [..., M, M] with M >= 3."""
    units, off = kernel.shape[-1], _off_diagonal(kernel)
    r = (off.sum(-1) + off.sum(-2)) / (2 * (units - 1))
    value = r.mean(-1, keepdim=True)
    return value + 2 * (units - 1) / (units - 2) * (r - value)


def largest_share(rows: Tensor) -> Tensor:
    """[...] the share of the variance that is in one unit, max (ρ_n - U)² / Σ (ρ_n - U)²; 1/M to 1, NaN for equal rows."""
    squares = (rows - rows.mean(-1, keepdim=True)).square()
    return squares.amax(-1) / squares.sum(-1)


def share_by_chance(units: int, chance: float = 0.01) -> float:
    """What `largest_share` of M >= 3 independent normal rows exceeds with this probability, at most: Grubbs' bound."""
    t2 = float(student_t.ppf(1 - chance / (2 * units), units - 2)) ** 2
    return (units - 1) / units * t2 / (units - 2 + t2)


def resampled_rows(rows: Tensor, resamples: int = RESAMPLES) -> Resampled:
    """The mean of M rows [..., M] drawn from them with replacement, and its standard error s*/√M; NaN for M < 4."""
    units = rows.shape[-1]
    centre = rows.to(torch.float64).mean(-1, keepdim=True)
    off = rows.to(torch.float64) - centre
    share = _counts(units, resamples).T / units
    mean, square = off @ share, off.square() @ share
    variance = square - mean.square()
    variance = torch.where(variance > 1e-14 * square, variance, 0.0)  # what equal rows leave by rounding is no spread
    return Resampled(centre + mean, (variance / (units - 1)).sqrt())


def resampled_units(kernel: Tensor, resamples: int = RESAMPLES) -> Resampled:
    """U of M units drawn from the kernel's [..., M, M] with replacement, and its jackknife standard error; NaN for M < 4.

    With w_n copies of unit n, h the symmetrised kernel and Q = M² - Σ w_n²,

        U* = Σ_{n≠m} w_n w_m h_nm / Q,      U*_(-n) - U* = 2 (U* (M - w_n) - Σ_{m≠n} w_m h_nm) / (Q - 2 (M - w_n))

    the second being without one of the copies. A pair of a unit and its own copy is left out: it would be K_nn, whose X and Y
    share their responses, which is what U leaves the diagonal out for. A resample is one of unequal blocks, and Q its pairs.
    """
    units = kernel.shape[-1]
    off = _off_diagonal(kernel.to(torch.float64)).reshape(-1, units, units)
    off = (off + off.transpose(1, 2)) / 2
    w = _counts(units, resamples)
    pairs = units**2 - w.square().sum(1)
    others = units - w
    # Where a unit is not drawn it has no copy to leave out, and its weight is 0.
    of_deleted = torch.where(w > 0, 2 / (pairs[:, None] - 2 * others).clamp_min(1.0), 0.0)
    weight = (units - 1) / units * w
    values = off.new_empty(len(off), resamples)
    errors = torch.empty_like(values)
    step = max(1, AT_ONCE // (resamples * units))
    for begin in range(0, len(off), step):
        some = slice(begin, begin + step)
        met = w @ off[some]  # [some, R, M] Σ_m w_m h_nm
        found = values[some] = (met * w).sum(-1) / pairs
        change = (found[..., None] * others - met).mul_(of_deleted)
        mean = (change * w).sum(-1, keepdim=True) / units
        errors[some] = ((change - mean).square_() * weight).sum(-1).sqrt()
    shape = (*kernel.shape[:-2], resamples)
    return Resampled(values.view(shape), errors.view(shape))


def interval(
    rows: Tensor, method: Method = "student", level: float = LEVEL, resampled: Resampled | None = None
) -> Interval:
    """Of the estimate that is the mean of rows [..., M].

    Args:
        rows: from `update_rows` or `population_rows`.
        method: one of `METHODS`.
        level: share of cases in which it is to cover the truth.
        resampled: for the bootstraps: `resampled_units` of the kernel for population rows. None resamples the rows themselves.

    Raises:
        ConfigError: ``level`` is not between 0 and 1, or no method has that name.
    """
    if not 0 < level < 1:
        raise ConfigError(f"interval: level is {level}.", fix="use a number between 0 and 1, such as 0.95.")
    if method not in METHODS:
        raise ConfigError(f"interval: method is {method!r}.", fix=f"use one of {', '.join(METHODS)}.")
    rows = rows.to(torch.float64)
    value, units, upper = rows.mean(-1), rows.shape[-1], (1 + level) / 2
    if units < 2:
        return Interval(value * math.nan, value * math.nan)
    error = rows.std(-1) / math.sqrt(units)
    if method in ("studentised", "bca"):
        found = resampled_rows(rows) if resampled is None else resampled
        return (_studentised if method == "studentised" else _bca)(rows, error, found, upper)
    if method == "normal":
        quantile = torch.special.ndtri(torch.full_like(value, upper))
    else:
        degrees = torch.full_like(value, units - 1) if method == "student" else degrees_of_freedom(rows)
        quantile = torch.as_tensor(student_t.ppf(upper, degrees.numpy())).reshape(value.shape)
    return Interval(value - quantile * error, value + quantile * error)


def degrees_of_freedom(rows: Tensor) -> Tensor:
    """[...] Satterthwaite's ν of rows [..., M]; M - 1 below 4 rows, which have no k₄, and for equal ones."""
    units = rows.shape[-1]
    most = torch.full_like(rows[..., 0], units - 1)
    if units < 4:
        return most
    off = rows - rows.mean(-1, keepdim=True)
    two, four = off.square().sum(-1), off.pow(4).sum(-1)
    k2 = two / (units - 1)
    k4 = (units * (units + 1) * four - 3 * (units - 1) * two.square()) / ((units - 1) * (units - 2) * (units - 3))
    found = 2 * k2.square() / (k4 / units + 2 * k2.square() / (units - 1))
    # Where Var s² would be negative, k₄ is, and there are no long tails.
    return torch.where(found > 0, found, most).minimum(most)


def _studentised(rows: Tensor, error: Tensor, resampled: Resampled, upper: float) -> Interval:
    value = rows.mean(-1)
    t = _deviations(value, error, resampled) / resampled.errors
    # Without spread and off by nothing is no deviation; off by something, an infinite one.
    t = torch.where(t.isnan() & ~resampled.values.isnan(), 0.0, t).sort(-1).values
    low, high = (_quantile(t, torch.full_like(value, q)) * error for q in (1 - upper, upper))
    return Interval(*(torch.where(error > 0, value - end, value) for end in (high, low)))


def _bca(rows: Tensor, error: Tensor, resampled: Resampled, upper: float) -> Interval:
    value = rows.mean(-1)
    off = rows - value[..., None]
    a = off.pow(3).sum(-1) / (6 * off.square().sum(-1).pow(1.5))
    found = _deviations(value, error, resampled)
    below = (found < 0).double().mean(-1) + (found == 0).double().mean(-1) / 2
    least = 1 / (2 * found.shape[-1])
    z0 = torch.special.ndtri(below.clamp(least, 1 - least))
    ordered = resampled.values.sort(-1).values
    z = float(torch.special.ndtri(torch.tensor(upper, dtype=torch.float64)))
    ends = []
    for side in (-z, z):
        scale = (1 - a * (z0 + side)).clamp_min(1e-6)
        end = _quantile(ordered, torch.special.ndtr(z0 + (z0 + side) / scale))
        ends.append(torch.where(a.isnan() & ~end.isnan(), value, end))
    return Interval(*ends)


def _deviations(value: Tensor, error: Tensor, resampled: Resampled) -> Tensor:
    """[..., R] U* - U; 0 where they differ by rounding, as where every unit was drawn once."""
    off = resampled.values - value[..., None]
    return torch.where(off.abs() <= 1e-12 * (value.abs() + error)[..., None], 0.0, off)


def _quantile(ordered: Tensor, q: Tensor) -> Tensor:
    """[...] of sorted values [..., R]: the (R + 1) q-th, in between on a line, and no further than the first and the last."""
    count = ordered.shape[-1]
    place = (q.nan_to_num(0.5) * (count + 1) - 1).clamp(0, count - 1)
    low, high = (ordered.gather(-1, at.long()[..., None])[..., 0] for at in (place.floor(), place.ceil()))
    # Between two infinities of one sign there is no line.
    return torch.where(low == high, low, low * (1 - place.frac()) + high * place.frac())


def _counts(units: int, resamples: int) -> Tensor:
    """[R, M] how often each unit is in a resample: one of fewer than 3 has no jackknife and is drawn again. NaN for M < 4."""
    if units <= DISTINCT:
        return torch.full((resamples, units), math.nan, dtype=torch.float64)
    generator = torch.Generator().manual_seed(SEED)
    kept = torch.zeros(0, units, dtype=torch.float64)
    while len(kept) < resamples:
        drawn = torch.randint(units, (resamples, units), generator=generator)
        counts = torch.zeros(drawn.shape, dtype=torch.float64)
        counts.scatter_add_(1, drawn, torch.ones_like(counts))
        kept = torch.cat([kept, counts[(counts > 0).sum(1) >= DISTINCT]])
    return kept[:resamples]


def _off_diagonal(kernel: Tensor) -> Tensor:
    return kernel - torch.diag_embed(kernel.diagonal(dim1=-2, dim2=-1))
