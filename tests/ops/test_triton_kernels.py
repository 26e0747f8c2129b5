"""The Triton kernels: interpreted against the truth, compiled for GPUs that need not be here, and run on one that is."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_drivers import REPOSITORY
from logprob_cases import DTYPES
from triton_cases import (
    FoldCase,
    LinearCase,
    assert_fold_right,
    assert_linear_right,
    make_fold_case,
    make_linear_case,
)

from entropy_fast import ops
from entropy_fast.ops import triton_backend
from entropy_fast.ops.accumulation_table import accumulation_table
from entropy_fast.reference import LinearTokenLogprobs

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SUPPORT = REPOSITORY / "tests" / "_support"
# Shared memory of one program where it is scarce: gfx942, and NVIDIA cards below the data centre.
SHARED_LIMIT = {"hip": 64 * 2**10, "cuda": 99 * 2**10}


def _run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    done = subprocess.run(
        [sys.executable, str(SUPPORT / script), *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env={**inherited, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "cases"),
    [
        ("token_logprobs", 152),
        ("linear_token_logprobs", 72),
        # Beside bfloat16, of the same width and so of the same tiles.
        pytest.param("linear_token_logprobs of float16", 24, marks=pytest.mark.exhaustive),
        ("precondition_accumulate", 14),
    ],
)
def test_interpreted_kernels_are_right(op: str, cases: int) -> None:
    done = _run("triton_interpreted.py", op, TRITON_INTERPRET="1")
    assert done.stdout == f"checked {cases}\n"


@pytest.mark.slow
@pytest.mark.parametrize("which", ["most", pytest.param("all", marks=pytest.mark.exhaustive)])
def test_kernels_compile_for_every_target_without_spilling(which: str, tmp_path: Path) -> None:
    # A cache of its own: a kernel compiled before would not be compiled again.
    arguments = ["most"] if which == "most" else []
    done = _run("triton_ahead_of_time.py", *arguments, TRITON_CACHE_DIR=str(tmp_path))
    report = json.loads(done.stdout)
    kernels = {label.split()[0] for label in report}
    assert len(kernels) == 7
    assert {name: usage for name, usage in report.items() if usage["spilled"]} == {}
    limits = {name: SHARED_LIMIT[name.split()[-1].split("-")[0]] for name in report}
    assert {name: usage for name, usage in report.items() if usage["shared"] > limits[name]} == {}


def _on_device(case: LinearCase) -> LinearTokenLogprobs:
    hidden, weight, targets = (part.cuda() for part in (case.hidden, case.weight, case.targets))
    result = ops.linear_token_logprobs_with_units(
        hidden,
        weight,
        targets,
        bias=None if case.bias is None else case.bias.cuda(),
        softcap=case.softcap,
        want_entropy=True,
        backend="triton",
    )
    return LinearTokenLogprobs(*(part.cpu() for part in result))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestOnDevice:
    def test_linear_token_logprobs(self, dtype: torch.dtype) -> None:
        cases = [make_linear_case(rows, 1000, 96, dtype) for rows in (1, 64, 150)]
        cases += [make_linear_case(9, 1000, units, dtype) for units in (1, 127, 129)]
        cases += [make_linear_case(9, 50257, 64, dtype), make_linear_case(9, 300, 64, dtype, bias=-110.0)]
        cases += [make_linear_case(9, 300, 64, dtype, softcap=30.0), make_linear_case(9, 300, 64, dtype, likely=True)]
        for case in cases:
            assert_linear_right(_on_device(case), case)

    def test_a_row_does_not_depend_on_the_batch(self, dtype: torch.dtype) -> None:
        case = make_linear_case(150, 3000, 96, dtype, masked=0.0)
        alone = LinearCase(case.hidden[77:78], case.weight, case.targets[77:78])
        for whole, part in zip(_on_device(case), _on_device(alone), strict=True):
            assert torch.equal(whole[77:78], part)


GRADIENTS = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float64, torch.float64),
    (torch.bfloat16, None),
)


def _fold(case: FoldCase, update: bool = True) -> torch.Tensor:
    return ops.precondition_accumulate(
        case.x, case.g, case.v, case.x_sum, case.y_sum, update=update, backend="triton", **case.factors()
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
class TestPreconditionAccumulateOnDevice:
    @pytest.mark.parametrize("update", [True, False])
    def test_every_kind_in_one_call(self, update: bool) -> None:
        before = make_fold_case(GRADIENTS, (1, 0, 7, 8191, 8192, 8193, 100_003))
        fast = before.to("cuda")
        assert_fold_right(fast, _fold(fast, update), before, update)

    def test_two_runs_give_the_same_bits(self) -> None:
        before = make_fold_case(GRADIENTS, (7, 100_003)).to("cuda")
        first, second = before.clone(), before.clone()
        assert torch.equal(_fold(first), _fold(second))
        for one, other in zip((*first.x_sum, *first.y_sum), (*second.x_sum, *second.y_sum), strict=True):
            assert torch.equal(one, other)

    def test_captured_in_a_graph(self) -> None:
        before = make_fold_case(GRADIENTS, (7, 8193)).to("cuda")
        eager, captured = before.clone(), before.clone()
        expected = [_fold(eager), _fold(eager)]
        factors = captured.factors()
        per_tensor = list(zip(factors["bias_correction"], factors["eps"], factors["ratio"], strict=True))
        table = accumulation_table(captured.x, captured.g, captured.v, captured.x_sum, captured.y_sum, per_tensor)
        dots = torch.full_like(expected[0], torch.nan)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            triton_backend.precondition_accumulate(table, dots, factors["x_scale"], factors["g_scale"], True)
        for wanted in expected:
            graph.replay()
            assert torch.equal(dots, wanted)
        for one, other in zip((*captured.x_sum, *captured.y_sum), (*eager.x_sum, *eager.y_sum), strict=True):
            assert torch.equal(one, other)
