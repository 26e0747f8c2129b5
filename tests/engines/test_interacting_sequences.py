"""Models in which rows of a batch see one another: what belongs to one sequence cannot be told from a backward of the sum."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from engine_sums import assert_same_estimate, observe
from exactness import batch_of
from probe_models.architectures import add_lora, build_model, stepped_adamw
from probe_models.own_dtype import computing_in_own_dtype
from torch import Tensor, nn

from entropy_fast.errors import EntropyFastError


class Centred(nn.Module):
    """Subtracts the mean over rows."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y - y.mean(0, keepdim=True)


class Normalised(nn.Module):
    """Divides by statistics of the whole batch, as batch norm does in training, whatever mode it is in."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        flat = y.flatten(0, -2)
        return nn.functional.batch_norm(flat, None, None, training=True).view_as(y)


class Limited(nn.Module):
    """Serves the half of the batch's tokens with the largest norms and drops the others, as a router with a capacity does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        size = x.detach().norm(dim=-1)
        capacity = size.numel() // 2
        return y * (size >= size.flatten().kthvalue(size.numel() - capacity + 1).values).unsqueeze(-1)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("mixing", [Centred, Normalised, Limited], ids=lambda m: m.__name__)
def test_exact_or_refused(mixing: Callable[[nn.Module], nn.Module], lora: bool) -> None:
    """One prompt at a time in both engines, so that the same rows see one another."""
    model = build_model("llama", dtype=torch.float64)
    layer = model.model.layers[0]
    layer.mlp = mixing(layer.mlp)
    if lora:
        model = add_lora(model).double()
    optimizer = stepped_adamw(model)
    rollouts = batch_of("uneven groups")
    with computing_in_own_dtype(model):
        expected = observe("two_pass", model, optimizer, rollouts, prompts_per_microbatch=1)
        try:
            found = observe("one_pass", model, optimizer, rollouts, prompts_per_microbatch=1)
        except EntropyFastError as error:
            assert "sequence" in str(error)  # noqa: PT017 (either behaviour is right)
        else:
            assert_same_estimate(found, expected, 1e-10)
