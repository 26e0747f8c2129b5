"""RMS norm and gated MLPs: the compiled passes against plain torch in float64, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from logprob_cases import DTYPES, accumulator
from torch import Tensor

from entropy_fast import reference
from entropy_fast.errors import NativeLibraryError
from entropy_fast.ops import compiled_layers_take, gated_silu, native_backend, rms_norm

EPSILON = 1e-6
Sizes = Callable[..., list[Tensor]]


def _sizes_of_norm(weight: Tensor) -> Sizes:
    """dx is a difference: of its two terms, by absolute values."""

    def sizes(dy: Tensor, x: Tensor) -> list[Tensor]:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON)
        along_x = (weight.double() * dy * x).abs().mean(-1, keepdim=True) * scale**3
        return [(weight.double() * dy).abs() * scale + x.abs() * along_x]

    return sizes


def _sizes_of_gate(dy: Tensor, gate: Tensor, up: Tensor) -> list[Tensor]:
    s = gate.sigmoid()
    return [(dy * up).abs() * s * (1 + gate.abs() * (1 - s)), (dy * gate).abs() * s]


def _compare(
    found: Callable[..., Tensor], plain: Callable[..., Tensor], leaves: list[Tensor], sizes_of_gradients: Sizes
) -> None:
    """Values and gradients of both, by the number of roundings of what is added up."""
    own = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    value, expected = found(*own), plain(*wide)
    dtype = leaves[0].dtype
    assert value.dtype == dtype
    dy = torch.sin(torch.arange(value.numel(), dtype=torch.float64)).view(value.shape).to(dtype)
    value.backward(dy)
    expected.backward(dy.double())
    sizes = [expected.detach().abs(), *sizes_of_gradients(dy.double(), *(leaf.detach() for leaf in wide))]
    pairs = [(value.detach(), expected.detach()), *((a.grad, b.grad) for a, b in zip(own, wide, strict=True))]
    # Of 576 numbers, at most 288 are added in each of two lanes: 8 standard deviations of their roundings are 8 √(288/3/2) = 55
    # of the total's, and there are no more than 9 others. A 16-bit result is rounded to its dtype twice.
    units = 64 * torch.finfo(accumulator(dtype)).eps / 2 + (1.5 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 0)
    # What is below the smallest normal number may be 0; factors that follow are below 2^10.
    smallest = 2**10 * max(torch.finfo(accumulator(dtype)).tiny, torch.finfo(dtype).tiny * torch.finfo(dtype).eps)
    for (mine, right), size in zip(pairs, sizes, strict=True):
        assert mine is not None and right is not None
        assert ((mine.double() - right).abs() <= units * size + smallest).all()


def _compare_norms(x: Tensor, weight: Tensor) -> None:
    _compare(
        lambda own: rms_norm(own, weight, EPSILON),
        lambda own: reference.rms_norm(own, weight.double(), EPSILON),
        [x],
        _sizes_of_norm(weight),
    )


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    width = draw(st.integers(1, 70) | st.sampled_from([256, 576]))
    return (*draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)), width)


@example(shape=(2, 1), dtype=torch.float32, size=1.0)  # where the two terms of dx cancel
@given(shape=shapes(), dtype=st.sampled_from(DTYPES), size=st.sampled_from([1e-4, 1.0, 1e3]))
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, size: float) -> None:
    generator = torch.Generator().manual_seed(shape[-1])
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) * size
    weight = torch.randn(shape[-1], generator=generator, dtype=torch.float64).to(dtype)
    _compare_norms(x, weight)


@given(shape=shapes(), dtype=st.sampled_from(DTYPES), size=st.sampled_from([1e-3, 1.0, 30.0]))
def test_gated_silu(shape: tuple[int, ...], dtype: torch.dtype, size: float) -> None:
    generator = torch.Generator().manual_seed(shape[-1])
    gate, up = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    _compare(gated_silu, reference.gated_silu, [gate * size, up], _sizes_of_gate)


def test_strided_inputs() -> None:
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    weight = torch.randn(5, 2, dtype=torch.float64)[:, 0]
    _compare_norms(x.mT.mT, weight)
    turned = x.transpose(0, 1)
    _compare(gated_silu, reference.gated_silu, [turned, turned.flip(0)], _sizes_of_gate)


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    (dx,) = torch.autograd.grad(rms_norm(x, torch.ones(3), 1e-6).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_nan_and_infinity_go_through() -> None:
    x = torch.tensor([[1.0, float("nan"), 2.0], [1.0, 2.0, 3.0]])
    found = rms_norm(x, torch.ones(3), 1e-6)
    assert found[0].isnan().all() and found[1].isfinite().all()
    gate = torch.tensor([[float("nan"), float("inf"), -float("inf"), 1.0]])
    expected = reference.gated_silu(gate, torch.ones(1, 4))
    assert torch.equal(gated_silu(gate, torch.ones(1, 4)).isnan(), expected.isnan())


def test_what_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3)
    assert compiled_layers_take(x, x)
    assert not compiled_layers_take(x, x.double())
    assert not compiled_layers_take(x.long())
    assert not compiled_layers_take(x.to("meta"))
    monkeypatch.setenv("ENTROPY_FAST_BACKEND", "reference")
    assert not compiled_layers_take(x, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_forward_rounds_as_tensor_operations_do(dtype: torch.dtype) -> None:
    x, up = torch.randn(2, 50, 64).to(dtype)
    weight = torch.randn(64).to(dtype)
    for found, plain in (
        (rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6)),
        (gated_silu(x, up), reference.gated_silu(x, up)),
    ):
        # Where fp32 falls on the other side of a tie, one rounding differs.
        assert float((found != plain).float().mean()) < 0.01
        assert torch.allclose(found, plain, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_the_kernel_refuses_an_epsilon_below_zero() -> None:
    with pytest.raises(NativeLibraryError, match="epsilon"):
        native_backend.on_rows("rms_norm_forward", *[torch.ones(2, 3)] * 4, parameters=(-1.0,))
