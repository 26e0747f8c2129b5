"""``--candidate NAME[=VALUE[,VALUE]]``: updates that a probe compares with the planned one."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from entropy_fast.config import EstimateOptions
from entropy_fast.errors import ConfigError

if TYPE_CHECKING:
    from entropy_fast.candidates import Candidate

__all__ = ["CANDIDATES", "CandidateOption", "candidate_updates"]

# By name here, so that help does not import what makes them.
CANDIDATES = ("clip_cov", "clip_higher", "entropy_bonus", "kl_cov", "reweighted")

CandidateOption = Annotated[
    list[str] | None,
    typer.Option(
        "--candidate",
        metavar="NAME[=VALUE[,VALUE]]",
        help=f"Another update to compare with the planned one: {', '.join(CANDIDATES)}; may be repeated. Values are its "
        "numbers in the order of entropy_fast.candidates: entropy_bonus=0.01.",
        autocompletion=lambda incomplete: [name for name in CANDIDATES if name.startswith(incomplete)],
        show_default=False,
    ),
]


def candidate_updates(given: Sequence[str], planned: EstimateOptions) -> dict[str, Candidate]:
    """What ``updates=`` takes, for the texts of the option.

    Args:
        given: one text for every candidate, such as ``entropy_bonus=0.01``.
        planned: options of the estimate, which a candidate may change.

    Returns:
        Candidates by text, without blanks.

    Raises:
        ConfigError: a name that there is not, numbers that its candidate does not take, or the same text twice.
    """
    updates: dict[str, Candidate] = {}
    for text in given:
        key = "".join(text.split())
        if key in updates:
            raise ConfigError(f"--candidate: {key!r} is given twice.", fix="give every candidate once.")
        updates[key] = candidate = _candidate(key)
        if candidate.options is not None:
            candidate.options(planned)  # refuses numbers now that the probe would refuse after the model is loaded
    return updates


def _candidate(text: str) -> Candidate:
    name, equals, numbers = text.partition("=")
    if name not in CANDIDATES:
        _fail(f"there is no candidate {name!r}")
    make = _maker(name)
    parameters = list(inspect.signature(make, eval_str=True).parameters.values())
    texts = numbers.split(",") if equals else []
    if len(texts) > len(parameters):
        _fail(f"{text!r} has {len(texts)} values, and {name} takes at most {len(parameters)}")
    needed = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    if len(texts) < len(needed):
        _fail(f"{text!r} lacks a value, {needed[len(texts)]}")
    values = []
    for parameter, typed in zip(parameters, texts, strict=False):
        try:
            value = parameter.annotation(typed)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            kind = "an integer" if parameter.annotation is int else "a number"
            _fail(f"{text!r} has {typed!r} for {parameter.name}, which is not {kind}")
        values.append(value)
    return make(*values)


def _maker(name: str) -> Callable[..., Candidate]:
    from entropy_fast import candidates

    maker: Callable[..., Candidate] = getattr(candidates, name)
    return maker


def _form(name: str) -> str:
    """How a candidate is typed: ``kl_cov[=share,coefficient] (0.002,1 by default)``."""
    parameters = inspect.signature(_maker(name)).parameters.values()
    values = "=" + ",".join(parameter.name for parameter in parameters)
    defaults = [parameter.default for parameter in parameters if parameter.default is not parameter.empty]
    if not defaults:
        return f"{name}{values}"
    return f"{name}[{values}] ({','.join(f'{number:g}' for number in defaults)} by default)"


def _fail(problem: str) -> NoReturn:
    raise ConfigError(f"--candidate: {problem}.", fix=f"use one of {'; '.join(map(_form, CANDIDATES))}.")
