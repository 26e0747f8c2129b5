"""At whatever line of a probe something comes: model, optimizer, process and the next number stay what they were."""

from __future__ import annotations

import ast
import collections
import dataclasses
import functools
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from probe_models.architectures import add_lora, build_model
from probe_models.batches import make_rollouts
from probe_models.cases import Case, case_of
from probe_models.snapshot import assert_unchanged, take_snapshot
from probe_options import options_of
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import entropy_fast
from entropy_fast import fast_delta_h1

PACKAGE = str(Path(entropy_fast.__file__).parent)
ENGINES = ["one_pass", "two_pass", "jvp"]


@dataclasses.dataclass
class Lines:
    """Counts the lines of this package that run, and does something before one of them.

    Attributes:
        at: which line, from 0; None to count alone.
        action: what is done there.
        count: lines so far.
        seen: when each line ran, by file and number.
    """

    at: int | None
    action: Callable[[], object]
    count: int = 0
    seen: dict[tuple[str, int], list[int]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))

    def _enter(self, frame: FrameType, event: str, argument: object) -> Any:
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "line":
            if self.at is None:
                self.seen[frame.f_code.co_filename.removeprefix(PACKAGE), frame.f_lineno].append(self.count)
            self.count += 1
            if self.at is not None and self.count == self.at + 1:
                self.action()
        return self._line

    def run(self, call: Callable[[], object]) -> None:
        """Call under the count."""
        sys.settrace(self._enter)
        try:
            call()
        finally:
            sys.settrace(None)


def process_state() -> tuple[object, ...]:
    cuda = torch.backends.cuda
    return (
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()),
        (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()),
        sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()),
        signal.getsignal(signal.SIGINT),
        torch.get_num_threads(),
    )


def small_case() -> Case:
    """Two layers of a model with dropout, in training, with gradients lying about."""
    model = add_lora(build_model("qwen2", dropout=0.3), dropout=0.3)
    case = dataclasses.replace(case_of(model), rollouts=make_rollouts((2, 2, 2)))
    model.train()
    for parameter in list(model.parameters())[::3]:
        parameter.grad = torch.ones_like(parameter)
    return case


def probe_of(case: Case, engine: str) -> Callable[[], float]:
    entropy = make_rollouts((2, 2, 2), seed=9) if engine == "jvp" else None
    options = options_of(engine=engine, prompts_per_microbatch=2)

    def probe() -> float:
        return fast_delta_h1(case.model, case.optimizer, case.rollouts, entropy_rollouts=entropy, **options).delta_h1

    return probe


def raise_here() -> None:
    raise KeyboardInterrupt


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


# Lines tried of each engine; all of them are one or two thousand.
COUNTS = [20, pytest.param(700, marks=pytest.mark.exhaustive)]


LOCK = "/checks/exclusive.py"  # between taking it and noting that it is taken nothing else can give it back


@functools.cache
def leaving(file: str) -> frozenset[int]:
    """Lines at which a ``with`` is left or a ``finally`` runs: what raises there is Python's last word on what they undo.

    Those of the lock too. That no signal raises there is the other half of this test.
    """
    if file == LOCK:
        return frozenset(range(1, 1 + len(Path(PACKAGE + file).read_text().splitlines())))
    lines: set[int] = set()
    for node in ast.walk(ast.parse(Path(PACKAGE + file).read_text())):
        if isinstance(node, ast.With):
            lines.update(range(node.lineno, node.body[0].lineno))
        elif isinstance(node, ast.Try) and node.finalbody:
            lines.update(range(node.finalbody[0].lineno, (node.finalbody[-1].end_lineno or 0) + 1))
    return frozenset(lines)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("action", [raise_here, interrupt], ids=["exception", "interrupt"])
@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_is_left(engine: str, action: Callable[[], None], count: int) -> None:
    case = small_case()
    probe = probe_of(case, engine)
    expected, state = probe(), process_state()
    before = take_snapshot(case.model, case.optimizer)
    whole = Lines(None, action)
    whole.run(probe)
    chance = random.Random(f"{engine} {action.__name__}")
    places = sorted((file, line) for file, line in whole.seen if action is interrupt or line not in leaving(file))
    for place in chance.sample(places, min(count, len(places))):
        lines = Lines(chance.choice(whole.seen[place]), action)
        try:
            with pytest.raises(KeyboardInterrupt):
                lines.run(probe)
            assert process_state() == state
            assert_unchanged(before, case.model, case.optimizer)
        except (AssertionError, pytest.fail.Exception) as error:
            raise AssertionError(f"after {action.__name__} at {place}") from error
    assert probe() == expected
