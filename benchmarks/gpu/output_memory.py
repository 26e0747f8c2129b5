"""Memory of one call of linear_token_logprobs_with_units, beside what others take for the same numbers."""

from __future__ import annotations

from benchmarks.gpu.device_memory import peak_bytes
from benchmarks.gpu.process import run_as_stage
from benchmarks.gpu.rows import RowWriter
from benchmarks.gpu.stages import Options
from benchmarks.kernels import check
from benchmarks.kernels.problem import Contender, Results
from benchmarks.kernels.problems import build
from benchmarks.kernels.specs import LARGE_VOCABULARIES, LINEAR, Spec
from entropy_fast.errors import BackendUnavailableError

FULL = Spec(LINEAR, "bfloat16", 4096, LARGE_VOCABULARIES[1], 3584, timed=False)
MICRO = Spec(LINEAR, "bfloat16", 128, 8192, 64, timed=False)
MIB = 2**20


def _weigh(rows: RowWriter, contender: Contender, spec: Spec, expected: Results, device: str) -> None:
    with rows.row(contender.name) as row:
        row.values["kind"] = contender.kind
        try:
            complaint = check.complaint(contender, spec, expected)
        except BackendUnavailableError as error:
            row.set("skipped", str(error))
            return
        if complaint:
            row.set("wrong" if contender.kind == "backend" else "skipped", complaint)
            return
        found = peak_bytes(contender.run, device)
        row.values["MiB"] = found / MIB
        row.values["of one copy of the logits"] = found / (spec.rows * spec.vocabulary * spec.torch_dtype.itemsize)


def run(options: Options, rows: RowWriter) -> int:
    """A row for each of the package's backends, one for each rival."""
    spec = FULL if options.size == "full" else MICRO
    problem = build(spec, options.device, compiles=False)
    rows.plan([contender.name for contender in problem.contenders])
    expected = problem.expected()
    for contender in problem.contenders:
        _weigh(rows, contender, spec, expected, options.device)
    for name, reason in problem.missing.items():
        rows.write(name, "skipped", reason)
    return 0


if __name__ == "__main__":
    run_as_stage(run)
