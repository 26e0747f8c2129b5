"""Numbers as a reader wants them: few digits, a true minus sign, powers of ten where they are needed."""

from __future__ import annotations

import math

__all__ = ["UNKNOWN", "interval_text", "percent", "plain", "short", "signed", "with_error"]

UNKNOWN = "unknown"
MINUS = "\u2212"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
SMALLEST, LARGEST = 1e-4, 1e5  # outside of these a power of ten is shorter


def plain(value: float, digits: int = 3) -> str:
    """A number to so many significant digits, ``unknown`` for NaN."""
    if math.isnan(value):
        return UNKNOWN
    if math.isinf(value):
        return f"{MINUS if value < 0 else ''}∞"
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    power = int(exponent)
    if SMALLEST <= abs(value) < LARGEST:
        return f"{value:.{max(0, digits - 1 - power)}f}".replace("-", MINUS)
    return f"{mantissa}×10{str(power).translate(SUPERSCRIPTS)}".replace("-", MINUS)


def signed(value: float, digits: int = 3) -> str:
    """The same with the sign of what is above 0 too."""
    shown = plain(value, digits)
    return f"+{shown}" if value > 0 else shown


def short(value: float) -> str:
    """A signed number in two digits and as few characters as can be, for what stands on a page ten thousand times."""
    if value == 0:
        return "0"
    return f"{value:+.1e}".replace("e-0", "e-").replace("e+00", "").replace("e+0", "e").replace("e+", "e")


def with_error(value: float, error: float, digits: int = 2) -> str:
    """``−0.0105 ± 0.0009``: the error to so many digits, and the value to the place of its last one."""
    if math.isnan(error) or error == 0:
        return signed(value)
    if math.isnan(value):
        return UNKNOWN
    place = digits - 1 - math.floor(math.log10(error))
    if place > 6 or place < 0:
        return f"{signed(value)} ± {plain(error, digits)}"
    number = f"{value:+.{place}f}".replace("-", MINUS)
    return f"{number} ± {error:.{place}f}"


def interval_text(low: float, high: float) -> str:
    """``−0.0127 to −0.0083``."""
    return UNKNOWN if math.isnan(low) or math.isnan(high) else f"{signed(low)} to {signed(high)}"


def percent(value: float, level: float) -> str:
    """A change in percent of a level; empty where there is no such level."""
    if math.isnan(value) or not level > 0:
        return ""
    return f"{signed(100 * value / level, 2)} %"
