"""What a probe costs beside the training step it forecasts, on a model of a billion parameters with random weights."""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Callable

import torch

from benchmarks.gpu.device_memory import peak_bytes
from benchmarks.gpu.device_setting import DeviceSetting, llama
from benchmarks.gpu.process import run_as_stage
from benchmarks.gpu.rows import Row, RowWriter
from benchmarks.gpu.stages import Options
from benchmarks.kernels.timing import Spread, interleaved, ratio
from benchmarks.probe.check import Expected, complaint, differences, expected_from
from benchmarks.probe.contenders import ONE_PASS, PLAIN, TWO_PASS, one_pass_result, sums_of, two_pass_result
from benchmarks.probe.plain_step import plain_step
from benchmarks.probe.workloads import Workload

# The shape of Llama 3.2 1B. All prompts and responses are as long as they may be: a plain step computes nothing for padding.
WORKLOAD = Workload(
    "llama 1B",
    prompt_length=256,
    response_length=256,
    vocabulary=128256,
    hidden=2048,
    intermediate=8192,
    layers=16,
    heads=32,
    key_value_heads=8,
    ragged=False,
    bfloat16=True,
)
MICRO = dataclasses.replace(WORKLOAD.small(), key_value_heads=2)
ROUNDS = {"full": (7, 3), "micro": (1, 1)}  # of plain step and one_pass; of all three
MODEL, CHECK, TIME, SLOW_TIME = "model", "results", "time of one_pass", "time of two_pass"
GIB = 2**30


def _peak_name(name: str) -> str:
    return f"peak memory of {name}"


Calls = dict[str, Callable[[], object]]


def _plain(setting: DeviceSetting) -> torch.Tensor:
    return plain_step(setting.model, setting.padded, setting.autocast())


def _checked(setting: DeviceSetting, row: Row) -> dict[str, str]:
    """Complaints by name, against the two-pass engine in float32. Everything has run once afterwards."""
    with setting.for_a_while_in_float32() as in_float32:
        # Activations take twice the memory, so that fewer of them are held.
        exact = two_pass_result(in_float32, prompts_at_a_time=1)
    gc.collect()
    rounded = two_pass_result(setting)
    found = one_pass_result(setting)
    expected: Expected = expected_from(exact, rounded)
    complaints = {
        PLAIN: complaint(_plain(setting).cpu(), expected),
        ONE_PASS: complaint(sums_of(found), expected),
        # By this measure it is right: its own error is what others are allowed a multiple of.
        TWO_PASS: complaint(sums_of(rounded), expected),
    }
    for name, result in (("two_pass in float32", exact), (TWO_PASS, rounded), (ONE_PASS, found)):
        row.values[f"delta_h1 of {name}"] = result.delta_h1
    row.values["std_error"] = exact.std_error
    for name, result in ((TWO_PASS, rounded), (ONE_PASS, found)):
        row.values[f"{name} off by"] = max(differences(sums_of(result), expected.sums).values())
    row.values["allowed"] = expected.allowed["x_dot_y"]
    if wrong := {name: text for name, text in complaints.items() if text}:
        row.set("wrong", "; ".join(f"{name}: {text}" for name, text in wrong.items()))
    return complaints


def _seconds(row: Row, times: dict[str, list[float]]) -> None:
    for name, seconds in times.items():
        spread = Spread.of(seconds)
        row.values[f"{name}, s"] = spread.median
        row.values[f"{name}, quartiles"] = f"{spread.low:.4g} to {spread.high:.4g}"


def _refused(row: Row, names: tuple[str, ...], complaints: dict[str, str]) -> bool:
    """Whether a result is wrong, which gets no speed."""
    if wrong := [name for name in names if complaints[name]]:
        row.set("skipped", f"no speed for wrong results, those of {', '.join(wrong)}")
    return bool(wrong)


def _times(rows: RowWriter, calls: Calls, complaints: dict[str, str], options: Options) -> None:
    rounds, slow_rounds = ROUNDS[options.size]
    with rows.row(TIME) as row:
        if not _refused(row, (PLAIN, ONE_PASS), complaints):
            both = {name: calls[name] for name in (PLAIN, ONE_PASS)}
            times = interleaved(both, options.device, rounds, between=gc.collect, warm_up=1)
            _seconds(row, times)
            row.values["in plain steps"] = ratio(times[ONE_PASS], times[PLAIN]).median
    with rows.row(SLOW_TIME) as row:
        if not _refused(row, tuple(calls), complaints):
            times = interleaved(calls, options.device, slow_rounds, between=gc.collect, warm_up=0)
            _seconds(row, times)
            row.values["in plain steps"] = ratio(times[TWO_PASS], times[PLAIN]).median
            row.values["in one passes"] = ratio(times[TWO_PASS], times[ONE_PASS]).median


def _peaks(rows: RowWriter, calls: Calls, device: str) -> None:
    of_plain = None
    for name, call in calls.items():
        with rows.row(_peak_name(name)) as row:
            found = peak_bytes(call, device)
            of_plain = found if name == PLAIN else of_plain
            row.values["GiB"] = found / GIB
            row.values["of the plain step's"] = found / of_plain if of_plain else None


def run(options: Options, rows: RowWriter) -> int:
    """Check, then time, then weigh."""
    torch.backends.cuda.matmul.allow_tf32 = False
    names = (PLAIN, ONE_PASS, TWO_PASS)
    rows.plan([MODEL, CHECK, TIME, SLOW_TIME, *map(_peak_name, names)])
    device, setting = options.device, None
    with rows.row(MODEL) as row:
        workload = WORKLOAD if options.size == "full" else MICRO
        row.values["workload"] = workload.label
        setting = llama(workload, device)
        row.values["parameters, M"] = sum(p.numel() for p in setting.model.parameters()) / 1e6
        row.values["trained, M"] = sum(p.numel() for p in setting.trained.values()) / 1e6
        if device == "cuda":
            row.values["GiB"] = torch.cuda.memory_allocated() / GIB
    if setting is None:
        return 0
    complaints: dict[str, str] | None = None
    with rows.row(CHECK) as row:
        complaints = _checked(setting, row)
    if complaints is None:
        return 0
    calls: Calls = {
        PLAIN: functools.partial(_plain, setting),
        ONE_PASS: functools.partial(one_pass_result, setting),
        TWO_PASS: functools.partial(two_pass_result, setting),
    }
    _times(rows, calls, complaints, options)
    setting.model.zero_grad(set_to_none=True)
    _peaks(rows, calls, device)
    return 0


if __name__ == "__main__":
    run_as_stage(run)
