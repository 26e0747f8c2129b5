"""From a spec to its problem."""

from __future__ import annotations

from benchmarks.kernels import accumulate_problem, linear_problem, token_logprobs_problem
from benchmarks.kernels.problem import Problem
from benchmarks.kernels.specs import FOLD, LINEAR, TOKEN, Spec

_BUILDERS = {
    TOKEN: token_logprobs_problem.problem,
    LINEAR: linear_problem.problem,
    FOLD: accumulate_problem.problem,
}


def build(spec: Spec, device: str, compiles: bool) -> Problem:
    """The problem of ``spec`` on ``device``; with ``compiles`` also what needs torch.compile."""
    return _BUILDERS[spec.op](spec, device, compiles)
