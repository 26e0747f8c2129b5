"""Rewards: 1 for a right response, 0 for any other. Partial credit would reward brevity or format instead."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

from entropy_fast.errors import SamplingError
from entropy_fast.sampling.tasks import PromptTask

__all__ = ["VERIFIERS", "Verifier", "exact_text", "last_number", "number_in"]

Verifier = Callable[[str, PromptTask], float]

# A minus sign belongs to the number only where it cannot be an operator ("3-5", "a - 5").
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?|\d[\d,]*(?:\.\d+)?")


def number_in(text: str) -> str | None:
    """The last number in the text, without thousands separators; None when there is none."""
    found = NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None


def last_number(response: str, task: PromptTask) -> float:
    """1.0 when the last number of the response equals the answer as a number.

    Raises:
        SamplingError: the task has no numeric answer.
    """
    try:
        expected = Decimal(str(task.answer))
    except InvalidOperation as error:
        raise SamplingError(
            f"verifier last-number: the answer {task.answer!r} of prompt {task.prompt[:60]!r} is not a number.",
            fix="give a numeric `answer`, or use the verifier exact-text.",
        ) from error
    number = number_in(response)
    return float(number is not None and Decimal(number) == expected)


def exact_text(response: str, task: PromptTask) -> float:
    """1.0 when the response, stripped, is the answer.

    Raises:
        SamplingError: the task has no answer.
    """
    if task.answer is None:
        raise SamplingError(
            f"verifier exact-text: prompt {task.prompt[:60]!r} has no answer.", fix="give every prompt an `answer`."
        )
    return float(response.strip() == task.answer.strip())


VERIFIERS: dict[str, Verifier] = {"last-number": last_number, "exact-text": exact_text}
