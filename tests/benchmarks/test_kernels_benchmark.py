"""The kernel benchmark runs end to end, and gives what computes something wrong no speed."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from own_benchmarks import make_importable

if TYPE_CHECKING:
    from benchmarks.kernels import specs
    from benchmarks.kernels.measure import Measured

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    make_importable(monkeypatch)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def measured(op: str, wrong: dict[str, float]) -> Measured:
    """The quick spec of an op, with the result named by ``wrong`` of the native backend off by that factor."""
    from benchmarks.kernels import measure, problems, specs
    from benchmarks.kernels.copy_limit import QUICK_BYTES, Copy

    spec: specs.Spec = next(s for s in specs.QUICK_SPECS if s.op == op)
    problem = problems.build(spec, "cpu", compiles=False)
    native, *others = problem.contenders

    def run() -> dict[str, object]:
        found = native.run()
        return {name: value * wrong.get(name, 1.0) if name in wrong else value for name, value in found.items()}

    problem = dataclasses.replace(problem, contenders=[dataclasses.replace(native, run=run), *others])
    return measure.measure(problem, spec, "cpu", 3, Copy("cpu", QUICK_BYTES))


CASES = [
    ("token_logprobs", "entropy"),
    ("token_logprobs", "logprob"),
    ("linear_token_logprobs_with_units", "unit_logprob"),
    ("precondition_accumulate", "dots"),
]


@pytest.mark.parametrize(("op", "result"), CASES)
def test_a_wrong_backend_gets_no_speed(op: str, result: str) -> None:
    from benchmarks.kernels import report

    found = measured(op, {result: 1.001})
    assert set(found.wrong) == {"native"} and result in found.wrong["native"]
    assert "native" not in found.times and "eager" in found.times
    row = next(row for row in report.rows(found) if row[0] == "native")
    assert row[1].startswith("WRONG: ") and not any(row[2:])


def test_a_right_backend_gets_one() -> None:
    for op in dict(CASES):
        found = measured(op, {})
        assert not found.wrong and len(found.times["native"]) == 3


def test_a_missing_result_is_wrong() -> None:
    from benchmarks.kernels import check, problems, specs

    spec = specs.QUICK_SPECS[0]
    problem = problems.build(spec, "cpu", compiles=False)
    native = problem.contenders[0]
    without = dataclasses.replace(native, run=lambda: {"logprob": native.run()["logprob"]})
    assert check.complaint(without, spec, problem.expected()) == "no entropy, lse"


def test_not_a_number_is_wrong() -> None:
    assert measured("token_logprobs", {"lse": float("nan")}).wrong


def test_a_wrong_backend_ends_the_command_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.kernels import token_logprobs_problem
    from benchmarks.kernels.__main__ import main

    right = token_logprobs_problem.token_logprobs

    def wrong(*arguments: object, **options: object) -> object:
        found = right(*arguments, **options)
        return found._replace(logprob=found.logprob + 1)

    monkeypatch.setattr(token_logprobs_problem, "token_logprobs", wrong)
    arguments = ["--quick", "--rounds", "2", "--no-memory", "--op", "token_logprobs", "--out", str(tmp_path)]
    assert main(arguments) == 1
    assert "WRONG: native of token_logprobs" in capsys.readouterr().out
    content = json.loads((tmp_path / "kernels_cpu.json").read_text())
    assert "native" not in content["measured"][0]["times"]


def test_the_whole_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.kernels", "--quick", "--rounds", "2", "--no-memory"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "kernels_cpu.json").read_text())
    assert {"cpu", "cores", "torch", "entropy_fast", "commit", "date", "backends"} <= set(content["machine"])
    assert all("native" in m["times"] and not m["wrong"] for m in content["measured"])
    assert len(content["dispatch_seconds"]) == 7
    assert (tmp_path / "kernels_cpu.md").read_text().count("| native |") == len(content["measured"])


def test_memory_in_a_process_of_its_own() -> None:
    from benchmarks.kernels import memory, specs

    spec = specs.Spec(specs.TOKEN, "float32", 512, 8192, entropy=True)  # 16 MiB of logits
    eager, native = (memory.in_own_process(spec, name, "cpu") for name in ("eager", "native"))
    assert eager > 2 * 15 * 2**20 and native < 2**22


def test_actions_take_turns() -> None:
    from benchmarks.kernels.timing import Spread, interleaved, ratio

    calls: list[str] = []
    actions = {name: functools.partial(calls.append, name) for name in "AB"}
    times = interleaved(actions, "cpu", 3, between=functools.partial(calls.append, "-"), warm_up=1)
    assert "".join(calls) == "-A-B" * 4 and [len(t) for t in times.values()] == [3, 3]
    # A machine that is twice as slow for one round changes no ratio.
    assert ratio([2.0, 4.0, 2.0], [1.0, 2.0, 1.0]) == Spread(2.0, 2.0, 2.0)


def test_two_runs_fill_the_page(tmp_path: Path) -> None:
    from benchmarks.kernels import document
    from benchmarks.kernels.__main__ import main

    assert main(["--quick", "--rounds", "2", "--no-memory", "--out", str(tmp_path)]) == 0
    run = json.loads((tmp_path / "kernels_cpu.json").read_text())
    page = (ROOT / "docs" / "performance.md").read_text()
    filled = document.filled(page, run, run)
    assert run["machine"]["cpu"] in filled and "µs, run 2" in filled and filled.count("| limit: copy |") == 4
    assert document.filled(filled, run, run) == filled
    with pytest.raises(ValueError, match="begin machine"):
        document.filled("", run, run)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_without_a_cuda_device(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.kernels.__main__ import main

    assert main(["--device", "cuda"]) == 2
    assert "No CUDA device" in capsys.readouterr().err
