"""Arguments that do not fit are refused where the addresses are taken, not read past their end.

Everything goes through the public functions and through ``torch.ops``, which leads past them. A call that reads or writes what
is not its own ends the process more often than not.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from entropy_fast.errors import ConfigError, EntropyFastError
from entropy_fast.ops import UnitRuns, add_unit_products, gated_silu, native_backend, rms_norm

LARGE = 2**20  # elements: far past the end of what is given instead


def _norm(x: Any = (64, 32), weight: Any = (32,), epsilon: float = 1e-6, **of_weight: Any) -> Tensor:
    return rms_norm(torch.ones(x), torch.ones(weight, **of_weight), epsilon)


@pytest.mark.parametrize(
    "call",
    [
        lambda: _norm((4, LARGE), (3,)),
        lambda: _norm((4, 32), (4, 32)),
        lambda: _norm(dtype=torch.float16),
        lambda: _norm(device="meta"),
        lambda: _norm((), ()),
        lambda: _norm(epsilon=float("nan")),
        lambda: rms_norm(torch.ones(4, 3, dtype=torch.int64), torch.ones(3, dtype=torch.int64), 0.0),
        lambda: gated_silu(torch.ones(64, LARGE), torch.ones(64, 1)),
        lambda: gated_silu(torch.ones(64, 32), torch.ones(64, 32, dtype=torch.bfloat16)),
        lambda: gated_silu(torch.ones(64, 32, device="meta"), torch.ones(64, 32)),
        lambda: gated_silu(torch.ones(()), torch.ones(())),
        lambda: gated_silu(torch.ones(4, 4).to_sparse(), torch.ones(4, 4)),
    ],
)
def test_frozen_layers(call: Callable[[], Tensor]) -> None:
    with pytest.raises(ConfigError, match=r"rms_norm|gated_silu"):
        call()


def _products(**other: Any) -> None:
    call = {
        "sums": [torch.zeros(2, 4, 300)],
        "left": torch.ones(10, 4),
        "right": torch.ones(10, 300),
        "scales": torch.ones(1, 10),
        "runs": [(0, 0, 6), (1, 6, 10)],
        **other,
    }
    add_unit_products(call["sums"], call["left"], call["right"], call["scales"], UnitRuns(call["runs"]))


@pytest.mark.parametrize(
    "other",
    [
        {"sums": []},
        {"sums": [torch.zeros(1, 4, 300)]},
        {"sums": [torch.zeros(2, 4, 3)]},
        {"sums": [torch.zeros(2, 300, 4)]},
        {"sums": [torch.zeros(2, 4, 300)] * 2},
        {"sums": [torch.zeros(2, 4, 300, dtype=torch.float64)]},
        {"sums": [torch.zeros(2, 4, 300, device="meta")]},
        {"left": torch.ones(3, 4)},
        {"left": torch.ones(10)},
        {"left": torch.ones(10, 4, dtype=torch.int64)},
        {"right": torch.ones(9, 300)},
        {"scales": torch.ones(1, 3)},
        {"scales": torch.ones(0, 10)},
        {"scales": torch.ones(10, 2).t()[:1]},
        {"scales": torch.ones(1, 10, dtype=torch.float64)},
        {"runs": []},
        {"runs": [(0, 0, LARGE)]},
        {"runs": [(LARGE, 0, 10)]},
        {"runs": [(-1, 0, 10)]},
        {"runs": [(0, 4, 10)]},
        {"runs": [(0, 0, 6), (1, 6, 2)]},
        {"runs": [(0, 0, 6), (1, 7, 10)]},
    ],
)
def test_unit_products(other: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"add_unit_products|UnitRuns"):
        _products(**other)


def test_unit_products_of_nothing() -> None:
    _products(runs=[], left=torch.ones(0, 4), right=torch.ones(0, 300), scales=torch.ones(1, 0))


def _accumulate(**other: Any) -> Tensor:
    lists = {name: [torch.ones(LARGE)] for name in ("x", "g", "v", "X_sum", "Y_sum")}
    call = {**lists, "bias_correction": [1.0], "eps": [1e-8], "ratio": [1.0], **other}
    found: Tensor = torch.ops.entropy_fast.precondition_accumulate(*call.values(), 1.0, 1.0, True)
    return found


SHARED = torch.zeros(LARGE)


@pytest.mark.parametrize(
    "other",
    [
        {"X_sum": [torch.ones(3)]},
        {"Y_sum": [torch.ones(LARGE, dtype=torch.bfloat16)]},
        {"v": [torch.ones(3)]},
        {"g": [torch.ones(3)]},
        {"g": []},
        {"eps": []},
        {"X_sum": [], "Y_sum": []},
        {"X_sum": [torch.ones(LARGE, 2)[:, 0]]},
        {"X_sum": [SHARED], "Y_sum": [SHARED]},
        {"x": [torch.ones(LARGE, dtype=torch.int32)], "g": [torch.ones(LARGE, dtype=torch.int32)]},
    ],
)
def test_precondition_accumulate_by_its_name(other: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="precondition_accumulate"):
        _accumulate(**other)


def _backward(op: str = "token_logprobs_backward", **other: Any) -> Any:
    rows = torch.zeros(64, dtype=torch.float64)
    call = {
        "grad_logprob": rows.float(), "grad_lse": rows, "grad_entropy": None, "logits": torch.zeros(64, 4096),
        "targets": torch.zeros(64, dtype=torch.int64), "lse": rows, "entropy": None, **other,
    }  # fmt: skip
    return getattr(torch.ops.entropy_fast, op)(*call.values())


@pytest.mark.parametrize("op", ["token_logprobs_backward", "token_logprobs_backward_"])
@pytest.mark.parametrize(
    "other",
    [
        {"grad_logprob": torch.zeros(1)},
        {"grad_logprob": torch.zeros(64, dtype=torch.float64)},
        {"grad_lse": torch.zeros(64)},
        {"lse": torch.zeros(64)},
        {"lse": torch.zeros(2, dtype=torch.float64)},
        {"targets": torch.full((64,), LARGE)},
        {"targets": torch.zeros(64, dtype=torch.int32)},
        {"targets": torch.zeros(63, dtype=torch.int64)},
        {"logits": torch.zeros(64, 4096, dtype=torch.int32)},
        {"logits": torch.zeros(64, 0)},
        {"grad_entropy": torch.zeros(64, dtype=torch.float64)},
        {"grad_entropy": torch.zeros(3, dtype=torch.float64), "entropy": torch.zeros(64, dtype=torch.float64)},
        {"grad_entropy": torch.zeros(64, dtype=torch.float64), "entropy": torch.zeros(64)},
    ],
)
def test_token_logprobs_backward_by_its_name(op: str, other: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="token_logprobs"):
        _backward(op, **other)


@pytest.mark.parametrize(
    "logits", [torch.zeros(4096, 64).t(), torch.zeros(1, 4096).expand(64, -1), torch.zeros(64, 1).expand(64, 4096)]
)
def test_logits_that_cannot_be_overwritten(logits: Tensor) -> None:
    with pytest.raises(ConfigError, match="contiguous rows that share no memory"):
        _backward("token_logprobs_backward_", logits=logits)
    assert _backward(logits=logits).shape == logits.shape


def test_a_tensor_without_memory_has_no_address() -> None:
    """As wrappers of distributed tensors are, which say that they are on this device."""
    with pytest.raises(ConfigError, match="no memory"):
        native_backend.on_rows("gated_silu_forward", *[torch.ones(3, 4, device="meta")] * 3)


SHAPES = [(), (0,), (3,), (4,), (3, 4), (4, 3), (4, 4), (0, 4), (4, 0), (2, 3, 4), (1, 4), (4, 1)]
DTYPES = [*[torch.float32] * 4, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.bool]


def _any_tensor(chance: random.Random) -> Tensor:
    tensor = torch.ones(chance.choice(SHAPES))
    if chance.random() < 0.2:
        tensor = tensor.new_full(tensor.shape, chance.choice([-1.0, 7.0, float("nan"), 1e30]))
    tensor = tensor.to(chance.choice(DTYPES))
    change = chance.randrange(8)
    if change == 0 and tensor.dim() > 1:
        tensor = tensor.transpose(0, -1)
    elif change == 1:
        tensor = tensor[None].expand(4, *tensor.shape)
    elif change == 2 and tensor.is_floating_point():
        tensor = tensor.clone().requires_grad_()
    return tensor


def _any_call(chance: random.Random) -> Callable[[], object]:
    def some() -> Tensor:
        return _any_tensor(chance)

    runs = [(chance.randint(-1, 3), begin, begin + chance.randint(0, 3)) for begin in range(chance.randint(0, 3))]
    calls: list[Callable[[], object]] = [
        lambda: rms_norm(some(), some(), chance.choice([0.0, 1e-6, -1.0])),
        lambda: gated_silu(some(), some()),
        lambda: add_unit_products(
            [some() for _ in range(chance.randint(0, 3))], some(), some(), some(), UnitRuns(runs)
        ),
        lambda: _accumulate(**{name: [some()] for name in ("x", "g", "v", "X_sum", "Y_sum")}),
        lambda: _backward(grad_logprob=some(), logits=some(), targets=some(), lse=some()),
        lambda: _backward("token_logprobs_backward_", grad_lse=some(), logits=some(), targets=some(), lse=some()),
        lambda: torch.ops.entropy_fast.token_logprobs(some(), some(), chance.random() < 0.5),
        lambda: torch.ops.entropy_fast.linear_token_logprobs(some(), some(), some()),
    ]
    return chance.choice(calls)


@pytest.mark.parametrize("count", [1500, pytest.param(30_000, marks=pytest.mark.exhaustive)])
def test_any_arguments(count: int) -> None:
    chance = random.Random("hostile calls")
    refused = 0
    for _ in range(count):
        call = _any_call(chance)
        try:
            call()
        except EntropyFastError:
            refused += 1
    assert refused > count / 2
