"""RMS norm and gated MLPs: the compiled passes against plain torch in float64, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from logprob_cases import DTYPES
from torch import Tensor

from entropy_fast import reference
from entropy_fast.errors import NativeLibraryError
from entropy_fast.ops import compiled_layers_take, gated_silu, native_backend, rms_norm


def _compare(found: Callable[..., Tensor], plain: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    """Values and gradients of both, within roundings of the largest."""
    own = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    value, expected = found(*own), plain(*wide)
    assert value.dtype == leaves[0].dtype
    dy = torch.sin(torch.arange(value.numel(), dtype=torch.float64)).view(value.shape)
    value.backward(dy.to(value.dtype))
    expected.backward(dy)
    pairs = [(value.detach(), expected.detach()), *((a.grad, b.grad) for a, b in zip(own, wide, strict=True))]
    for mine, right in pairs:
        assert mine is not None and right is not None
        allowed = 32 * torch.finfo(mine.dtype).eps * (right.abs() + right.abs().mean())
        assert ((mine.double() - right).abs() <= allowed).all()


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    width = draw(st.integers(1, 70) | st.sampled_from([256, 576]))
    return (*draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)), width)


@given(shape=shapes(), dtype=st.sampled_from(DTYPES), size=st.sampled_from([1e-4, 1.0, 1e3]))
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, size: float) -> None:
    generator = torch.Generator().manual_seed(shape[-1])
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) * size
    weight = torch.randn(shape[-1], generator=generator, dtype=torch.float64).to(dtype)
    _compare(lambda own: rms_norm(own, weight, 1e-6), lambda own: reference.rms_norm(own, weight.double(), 1e-6), [x])


@given(shape=shapes(), dtype=st.sampled_from(DTYPES), size=st.sampled_from([1e-3, 1.0, 30.0]))
def test_gated_silu(shape: tuple[int, ...], dtype: torch.dtype, size: float) -> None:
    generator = torch.Generator().manual_seed(shape[-1])
    gate, up = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    _compare(gated_silu, reference.gated_silu, [gate * size, up])


def test_strided_inputs() -> None:
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    weight = torch.randn(5, 2, dtype=torch.float64)[:, 0]
    _compare(lambda own: rms_norm(own, weight, 1e-6), lambda own: reference.rms_norm(own, weight, 1e-6), [x.mT.mT])
    turned = x.transpose(0, 1)
    _compare(gated_silu, reference.gated_silu, [turned, turned.flip(0)])


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
