"""The one-pass engine against the two-pass engine on the device, and both against the CPU, on small models."""

from __future__ import annotations

import dataclasses

import torch

from benchmarks.gpu.device_setting import DeviceSetting, small
from benchmarks.gpu.process import run_as_stage
from benchmarks.gpu.rows import Row, RowWriter
from benchmarks.gpu.stages import Options
from benchmarks.probe.check import Expected, complaint, differences, expected_from
from benchmarks.probe.contenders import one_pass_result, sums_of, two_pass_result
from benchmarks.probe.workloads import Workload
from entropy_fast.estimates.result import DeltaH1Result

BASE = Workload("small", prompt_length=48, response_length=48, vocabulary=4096, layers=4, responses=4)
MODELS = {
    "float32": BASE,
    "bfloat16": dataclasses.replace(BASE, bfloat16=True),
    "float32, full fine-tuning": dataclasses.replace(BASE, rank=None),
    "float32, two batches": dataclasses.replace(BASE, batches=2),
}


def names_of(kind: str) -> tuple[str, str]:
    """The rows of a model: the engines against each other, and the reference on the device against that on the CPU."""
    return f"{kind}: one_pass against two_pass", f"{kind}: two_pass against two_pass on the CPU"


def compare(row: Row, found: DeltaH1Result, expected: Expected) -> None:
    """Fill a row with how far a result is from what was expected."""
    sums = sums_of(found)
    for name, off in differences(sums, expected.sums).items():
        row.values[f"{name} off by"] = off
    row.values["allowed"] = expected.allowed["x_dot_y"]
    complained = complaint(sums, expected)
    if complained:
        row.set("wrong", complained)


def _against_the_cpu(row: Row, workload: Workload, device: str) -> None:
    if device == "cpu":
        row.set("skipped", "the device is the CPU")
        return
    truth = two_pass_result(small(workload, "cpu"))
    compare(row, two_pass_result(small(workload, device)), expected_from(truth))


def _expected(setting: DeviceSetting) -> Expected:
    if not setting.workload.bfloat16:
        return expected_from(two_pass_result(setting))
    with setting.for_a_while_in_float32() as exact:
        truth = two_pass_result(exact)
    return expected_from(truth, two_pass_result(setting))


def run(options: Options, rows: RowWriter) -> int:
    """Two rows a model."""
    torch.backends.cuda.matmul.allow_tf32 = False
    micro = options.size == "micro"
    models = {kind: w.small() for kind, w in list(MODELS.items())[:2]} if micro else MODELS
    rows.plan([name for kind, w in models.items() for name in names_of(kind)[: 1 if w.bfloat16 else 2]])
    for kind, workload in models.items():
        between, across = names_of(kind)
        with rows.row(between) as row:
            setting = small(workload, options.device)
            compare(row, one_pass_result(setting), _expected(setting))
        if workload.bfloat16:
            continue  # nothing says how far two devices may be apart in half precision
        with rows.row(across) as row:
            _against_the_cpu(row, workload, options.device)
    return 0


if __name__ == "__main__":
    run_as_stage(run)
