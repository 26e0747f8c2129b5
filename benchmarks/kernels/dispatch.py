"""What torch takes to get from Python to an op's implementation, with inputs so small that nothing else takes time."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernels.timing import Spread

_NAMESPACE = "entropy_fast_benchmark"
LONG_LIST = 800


def _one(x: Tensor, y: Tensor) -> Tensor:
    return torch.empty(1)


def _many(x: list[Tensor]) -> Tensor:
    return torch.empty(1)


def _in_place(x: list[Tensor]) -> None:
    return None


def _defined(name: str, schema: str, function: Callable[..., object]) -> Callable[..., object]:
    torch.library.define(f"{_NAMESPACE}::{name}", schema)
    torch.library.impl(f"{_NAMESPACE}::{name}", "CompositeExplicitAutograd", function)
    return getattr(getattr(torch.ops, _NAMESPACE), name).default


@functools.cache
def _ops() -> dict[str, Callable[..., object]]:
    custom = torch.library.custom_op
    return {
        "one, custom_op": custom(f"{_NAMESPACE}::one_custom", mutates_args=())(_one),
        "one, define + impl": _defined("one_defined", "(Tensor x, Tensor y) -> Tensor", _one),
        "many, custom_op": custom(f"{_NAMESPACE}::many_custom", mutates_args=())(_many),
        "many, define + impl": _defined("many_defined", "(Tensor[] x) -> Tensor", _many),
        "in place, custom_op": custom(f"{_NAMESPACE}::in_place_custom", mutates_args=("x",))(_in_place),
        "in place, define + impl": _defined("in_place_defined", "(Tensor(a!)[] x) -> ()", _in_place),
    }


def _seconds_per_call(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(9):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        times.append((time.perf_counter() - start) / repeats)
    return Spread.of(times).median


def costs(repeats: int = 300) -> dict[str, float]:
    """Seconds per call. Every implementation returns a fresh tensor of one element, or nothing where it works in place."""
    ops = _ops()
    x, y = torch.ones(1), torch.ones(1)
    tensors = [torch.ones(1) for _ in range(LONG_LIST)]
    calls = {
        "Python function, 2 tensors": lambda: _one(x, y),
        "custom_op, 2 tensors": lambda: ops["one, custom_op"](x, y),
        "define + impl, 2 tensors": lambda: ops["one, define + impl"](x, y),
        f"custom_op, list of {LONG_LIST}": lambda: ops["many, custom_op"](tensors),
        f"define + impl, list of {LONG_LIST}": lambda: ops["many, define + impl"](tensors),
        f"custom_op, list of {LONG_LIST} changed in place": lambda: ops["in place, custom_op"](tensors),
        f"define + impl, list of {LONG_LIST} changed in place": lambda: ops["in place, define + impl"](tensors),
    }
    with torch.no_grad():
        for call in calls.values():
            call()
        return {name: _seconds_per_call(call, repeats) for name, call in calls.items()}
