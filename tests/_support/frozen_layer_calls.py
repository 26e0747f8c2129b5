"""Calls of the kernels of csrc/frozen_layers.h as call files, and what they made of them against float64."""

from __future__ import annotations

import dataclasses

import torch
from kernel_drivers import ELEMENT_TYPES, CallImage, CallResults, Place
from torch import Tensor

from entropy_fast import reference

EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class FrozenLayerCalls:
    """A forward and a backward of one layer in an image; results and gradients by place."""

    expected: list[Tensor]
    places: list[Place]
    dtype: torch.dtype

    def assert_right(self, results: CallResults) -> None:
        eps = torch.finfo(self.dtype).eps
        for place, expected in zip(self.places, self.expected, strict=True):
            found = results.tensor(place, self.dtype, *expected.shape).double()
            assert ((found - expected).abs() <= 32 * eps * (expected.abs() + 1)).all()


def rms_norm_calls(dtype: torch.dtype, rows: int, width: int, image: CallImage) -> FrozenLayerCalls:
    x, dy, weight = _signals(dtype, (rows, width), (rows, width), (width,))
    y, scales, dx = (image.poison(n * dtype.itemsize) for n in (rows * width, rows, rows * width))
    place = {"x": image.add(x), "dy": image.add(dy), "weight": image.add(weight)}
    kind = ELEMENT_TYPES[dtype]
    image.call("rms_norm_forward", place["x"], place["weight"], y, scales, rows, width, EPSILON, kind)
    image.call("rms_norm_backward", place["dy"], place["x"], place["weight"], scales, dx, rows, width, kind)
    leaf = x.double().requires_grad_()
    expected = reference.rms_norm(leaf, weight.double(), EPSILON)
    (gradient,) = torch.autograd.grad(expected, leaf, dy.double())
    return FrozenLayerCalls([expected.detach(), gradient], [y, dx], dtype)


def gated_silu_calls(dtype: torch.dtype, rows: int, width: int, image: CallImage) -> FrozenLayerCalls:
    gate, up, dy = _signals(dtype, *[(rows, width)] * 3)
    if gate.numel() > 3:
        gate.view(-1)[:4] = torch.tensor([-200.0, 200.0, 0.0, -0.0])
    y, dgate, dup = (image.poison(rows * width * dtype.itemsize) for _ in range(3))
    places = [image.add(tensor) for tensor in (dy, gate, up)]
    kind = ELEMENT_TYPES[dtype]
    image.call("gated_silu_forward", *places[1:], y, rows, width, kind)
    image.call("gated_silu_backward", *places, dgate, dup, rows, width, kind)
    leaves = [gate.double().requires_grad_(), up.double().requires_grad_()]
    expected = reference.gated_silu(*leaves)
    gradients = torch.autograd.grad(expected, leaves, dy.double())
    return FrozenLayerCalls([expected.detach(), *gradients], [y, dgate, dup], dtype)


def _signals(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
