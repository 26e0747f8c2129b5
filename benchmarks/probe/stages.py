"""Where the time of a call goes, by what the functions on the stack are for.

Python's profile hook sees every function enter and leave; native work counts for the function that started it. On a CPU
autograd runs the backward of custom functions in the calling thread, so they are seen too. A frame that no rule knows
belongs to the stage of its caller.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import time
from collections.abc import Callable, Sequence
from types import CodeType, FrameType

FORWARD, OUTPUT, BACKWARD = "decoder forward", "output layer", "backward"
CAPTURED, SUMS, CHECKS, REST = "captured products", "sums and kernel", "checks", "rest"
STAGES = (FORWARD, OUTPUT, BACKWARD, CAPTURED, SUMS, CHECKS, REST)


@dataclasses.dataclass(frozen=True)
class Rule:
    """A frame in such a file and with such a name begins a stage.

    Attributes:
        stage: which.
        file: pattern found in the file's path.
        function: pattern found in the function's name.
        within: the stages it can begin in; None for all but checks.
    """

    stage: str
    file: str
    function: str = ""
    within: tuple[str, ...] | None = None


# The first that fits. Checks keep whatever they call: a second forward for their sake is their cost.
RULES = (
    Rule(
        CHECKS,
        r"/entropy_fast/",
        r"check|again|repeatable|excluded|refuse|assert_|uncaptured|find_|_try_|^why_not$|^choose",
    ),
    Rule(CHECKS, r"/entropy_fast/ways/trial"),
    Rule(BACKWARD, r"/entropy_fast/.*attention", r"backward", (BACKWARD,)),
    Rule(CAPTURED, r"/entropy_fast/(capture|engines|ways)/", "", (BACKWARD,)),
    Rule(OUTPUT, r"/entropy_fast/(ops/(blockwise|linear_|token_)|ways/packed/output)"),
    Rule(OUTPUT, r"/entropy_fast/", r"hidden_logprobs|linear_token_logprobs|token_logprobs", (REST,)),
    Rule(FORWARD, r"/(transformers|peft)/", "", (REST, OUTPUT)),
    Rule(BACKWARD, r"/torch/autograd/", r"^(backward|grad|_engine_run_backward)$"),
    Rule(
        SUMS,
        r"/entropy_fast/(engines/(sums|one_pass/engine|(.*/)?gradient_)|step/|ops/(accum|precond)|estimates/)",
        r"kernel$|^_kernel|^kernel_of|^collect|_dots|_products$|^_add$|^add$|apply_precond|_scales|second_moments|precondition_acc|finish|estimate",
    ),
)


class StageClock:
    """Adds up time by stage while its hook is set.

    Args:
        rules: which frames begin which stage.
    """

    def __init__(self, rules: Sequence[Rule] = RULES) -> None:
        self.seconds = dict.fromkeys([*STAGES, *(r.stage for r in rules)], 0.0)
        self._rules = [(r, re.compile(r.file), re.compile(r.function)) for r in rules]
        self._known: dict[tuple[CodeType, str], str] = {}
        self._stack = [REST]
        self._since = 0.0

    def run(self, call: Callable[[], object]) -> float:
        """One call under the clock; its wall time in seconds, which is what the stages add up to."""
        self._stack, self._since = [REST], time.perf_counter()
        start = self._since
        sys.setprofile(self._event)
        try:
            call()
        finally:
            sys.setprofile(None)
            self._charge()
        return self._since - start

    def _charge(self) -> None:
        now = time.perf_counter()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    def _event(self, frame: FrameType, event: str, _argument: object) -> None:
        if event == "call":
            stage = self._stage(frame.f_code, self._stack[-1])
            if stage != self._stack[-1]:
                self._charge()
            self._stack.append(stage)
        elif event == "return" and len(self._stack) > 1:
            if self._stack[-1] != self._stack[-2]:
                self._charge()
            self._stack.pop()

    def _stage(self, code: CodeType, current: str) -> str:
        key = (code, current)
        if key not in self._known:
            self._known[key] = self._decide(code.co_filename, code.co_name, current)
        return self._known[key]

    def _decide(self, file: str, function: str, current: str) -> str:
        if current == CHECKS:
            return CHECKS
        for rule, in_file, in_function in self._rules:
            fits = in_file.search(file) and in_function.search(function)
            if fits and (rule.within is None or current in rule.within):
                return rule.stage
        return current
