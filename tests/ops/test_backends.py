"""Which backend runs, and what is said when the wanted one cannot."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

from entropy_fast import _native, ops
from entropy_fast.errors import BackendUnavailableError, ConfigError, EntropyFastWarning
from entropy_fast.ops import backends, native_backend, triton_loading

LOGITS, TARGETS = torch.zeros(2, 3), torch.tensor([0, 1])


def _record(name: str) -> ops.BackendRecord:
    return {record.name: record for record in ops.backend_report()}[name]


def _remove_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_backend, "_load", lambda: (None, "it was taken away"))
    monkeypatch.setattr(backends, "_warned", set())


def test_report_names_every_backend_and_explains_the_missing() -> None:
    report = ops.backend_report()
    assert tuple(record.name for record in report) == ops.BACKENDS
    for record in report:
        assert record.available == (record.reason == "")
        assert bool(record.detail) == record.available


@pytest.mark.parametrize("name", ["native", "reference"])
def test_calls_are_counted_for_the_backend_that_ran(name: str) -> None:
    before = {record.name: record.calls for record in ops.backend_report()}
    logits = LOGITS.clone().requires_grad_()
    ops.token_logprobs(logits, TARGETS, backend=name).logprob.sum().backward()
    after = {record.name: record.calls for record in ops.backend_report()}
    assert {key: after[key] - before[key] for key in after} == {key: 2 * (key == name) for key in after}
    assert _record(name).last_op == "entropy_fast::token_logprobs_backward"


def test_cpu_tensors_run_natively_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENTROPY_FAST_BACKEND", raising=False)
    assert backends.resolve_backend(None, torch.device("cpu")) == "native"
    monkeypatch.setenv("ENTROPY_FAST_BACKEND", "reference")
    assert backends.resolve_backend(None, torch.device("cpu")) == "reference"
    assert backends.resolve_backend("native", torch.device("cpu")) == "native"


# In a process of its own, given the compiled library: first beside torch, then with neither library nor triton.
BESIDE_TORCH = """
import ctypes, sys, torch, warnings
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("entropy_fast._native", sys.argv[1])
native = module_from_spec(spec)
spec.loader.exec_module(native)
print(native.uses_openmp(), hasattr(ctypes.CDLL(None), "GOMP_parallel"))
sys.modules["entropy_fast._native"] = None
sys.modules["triton"] = None
from entropy_fast import ops
warnings.simplefilter("ignore")
print([record.name for record in ops.backend_report() if record.available])
print(ops.token_logprobs(torch.zeros(1, 4), torch.tensor([0])).logprob.exp().item())
"""


def _printed(script: str) -> list[str]:
    command = [sys.executable, "-c", script, _native.__file__]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.splitlines()


@pytest.fixture(scope="module")
def beside_torch() -> list[str]:
    return _printed(BESIDE_TORCH)


def test_cpu_kernels_run_on_the_openmp_threads_of_the_process(beside_torch: list[str]) -> None:
    """Found by name, so that it makes no difference which library was loaded first."""
    used, there = beside_torch[0].split()
    assert used == there
    without_torch = BESIDE_TORCH.replace(", torch, warnings", "").partition('sys.modules["')[0]
    assert _printed(without_torch) == ["False False"]
    detail = _record("native").detail
    assert "OpenMP" in detail or "threads of its own" in detail


def test_unknown_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="'fastest'; expected one of reference, native, triton, cuda"):
        ops.token_logprobs(LOGITS, TARGETS, backend="fastest")
    monkeypatch.setenv("ENTROPY_FAST_BACKEND", "magic")
    with pytest.raises(ConfigError, match="ENTROPY_FAST_BACKEND is 'magic'"):
        ops.token_logprobs(LOGITS, TARGETS)


def test_asking_for_what_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    _remove_library(monkeypatch)
    with pytest.raises(BackendUnavailableError, match="it was taken away"):
        ops.token_logprobs(LOGITS, TARGETS, backend="native")
    monkeypatch.setenv("ENTROPY_FAST_BACKEND", "native")
    with pytest.raises(BackendUnavailableError, match="ENTROPY_FAST_BACKEND asks for 'native'"):
        ops.token_logprobs(LOGITS, TARGETS)
    assert _record("native").reason == "it was taken away"


def test_without_the_library_the_reference_runs_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENTROPY_FAST_BACKEND", raising=False)
    _remove_library(monkeypatch)
    with pytest.warns(EntropyFastWarning, match="it was taken away"):
        ops.token_logprobs(LOGITS, TARGETS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.token_logprobs(LOGITS, TARGETS)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_device_backends_refuse_cpu_tensors(backend: str) -> None:
    with pytest.raises(BackendUnavailableError, match="runs on CUDA tensors"):
        ops.token_logprobs(LOGITS, TARGETS, backend=backend)


def test_cuda_without_kernels_in_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        @staticmethod
        def build_info() -> dict[str, object]:
            return {"cuda": False, "cuda_reason": "built with ENTROPY_FAST_CUDA=off"}

    monkeypatch.setattr(native_backend, "_load", lambda: (Library, ""))
    assert "built with ENTROPY_FAST_CUDA=off" in native_backend.cuda_reason("cuda")


def test_missing_triton_is_a_reason_not_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    triton_loading.load.cache_clear()
    try:
        assert "triton cannot be imported" in _record("triton").reason
    finally:
        triton_loading.load.cache_clear()


def test_library_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_backend, "__version__", "99.0")
    native_backend._load.cache_clear()
    try:
        assert "this is 99.0" in native_backend.cpu_reason("cpu")
    finally:
        native_backend._load.cache_clear()


@pytest.mark.parametrize(
    ("value", "message"),
    [("sse9", "names no build of the kernels; there are .*baseline"), ("BASELINE", "names no build")],
)
def test_unknown_instruction_set(value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENTROPY_FAST_ISA", value)
    with pytest.raises(BackendUnavailableError, match=message):
        ops.token_logprobs(LOGITS, TARGETS, backend="native")


def test_import_without_library_and_triton(beside_torch: list[str]) -> None:
    assert beside_torch[1:] == ["['reference']", "0.25"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_device_backends_on_a_device(backend: str) -> None:
    from logprob_cases import DTYPES, Outcome, assert_right, make_case, special_rows

    for dtype in DTYPES:
        for case in (make_case(7, 50257, dtype), special_rows(1500, dtype)):
            logits = case.logits.cuda().requires_grad_()
            result = ops.token_logprobs(logits, case.targets.cuda(), backend=backend)
            grads = [case.grad_logprob.cuda(), case.grad_lse.to(result.lse.dtype).cuda()]
            (gradient,) = torch.autograd.grad(list(result), logits, grads)
            assert_right(Outcome(result.logprob.detach().cpu(), result.lse.detach().cpu(), gradient.cpu()), case)
