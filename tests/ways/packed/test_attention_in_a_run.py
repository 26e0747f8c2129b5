"""That packed attention is the same function however often, and when, it is called, and runs natively in a model's run."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from entropy_fast import ops
from entropy_fast.ops.attention_inputs import AttentionOptions
from entropy_fast.ways.packed.attention import packed_attention
from entropy_fast.ways.packed.groups import AttentionGroups
from entropy_fast.ways.packed.layout import PackedGroup
from entropy_fast.ways.packed.prefix_states import PrefixStates

PLAIN = AttentionOptions(0.4, None, None)
# Two prompts, a tail that is empty, a prompt none of whose tails has a token, and one that shares nothing.
GROUPS = (
    PackedGroup(0, (0, 3), (0, 5), ((0, 4), (4, 4), (4, 7))),
    PackedGroup(1, (3, 5), (5, 7), ((7, 7), (7, 7))),
    PackedGroup(2, (5, 6), (7, 8), ((7, 13),)),
    PackedGroup(3, (6, 8), (8, 8), ((13, 15), (15, 16))),
)
TAILS, PREFIXES, ROWS = 16, 8, 8


@dataclasses.dataclass
class Layer:
    """Leaves of one layer: queries, keys and values of tails, and the states of prefixes."""

    query: Tensor
    key: Tensor
    value: Tensor
    prefix: PrefixStates
    weights: list[Tensor]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.query, self.key, self.value]

    def attention(self, options: AttentionOptions = PLAIN) -> Tensor:
        groups = AttentionGroups(GROUPS, tails=True)
        return packed_attention(*self.leaves, groups, self.prefix, self.weights, options)


def layer_of(dtype: torch.dtype = torch.float32, value_size: int = 8) -> Layer:
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, tokens: int, size: int = 8) -> Tensor:
        values = torch.randn(1, heads, tokens, size, generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    prefix = PrefixStates(draw(2, PREFIXES), draw(2, PREFIXES, value_size))
    weights = [torch.randn(2, ROWS, generator=generator, dtype=torch.float64)]
    return Layer(draw(4, TAILS), draw(2, TAILS), draw(2, TAILS, value_size), prefix, weights)


def native_calls() -> int:
    return next(record.calls for record in ops.backend_report() if record.name == "native")


@pytest.mark.parametrize(
    ("dtype", "options", "value_size", "expected"),
    [
        (torch.float32, PLAIN, 8, 2),
        (torch.float64, PLAIN, 8, 2),
        (torch.bfloat16, PLAIN, 8, 2),
        (torch.float32, AttentionOptions(0.4, 3, None), 8, 2),
        (torch.float32, AttentionOptions(0.4, None, 2.0), 8, 0),
        (torch.float32, PLAIN, 5, 0),
        (torch.float16, PLAIN, 8, 0),
    ],
    ids=["float32", "float64", "bfloat16", "window", "softcap", "other values", "float16"],
)
def test_one_call_forward_and_one_back(
    dtype: torch.dtype, options: AttentionOptions, value_size: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ENTROPY_FAST_BACKEND", raising=False)
    before = native_calls()
    layer_of(dtype, value_size).attention(options).sum().backward()
    assert native_calls() - before == expected


def assert_same(one: Layer, two: Layer) -> None:
    for a, b in zip(one.leaves, two.leaves, strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)
    assert one.prefix.cotangents is not None and two.prefix.cotangents is not None
    for a, b in zip(one.prefix.cotangents, two.prefix.cotangents, strict=True):
        assert torch.equal(a, b)


def test_layers_that_are_computed_again() -> None:
    """Gradient checkpointing runs the forward a second time, and hands out what was saved once."""
    plain, again = layer_of(), layer_of()
    above = torch.randn(1, TAILS, 4, 8, generator=torch.Generator().manual_seed(1))
    plain.attention().backward(above)
    found = checkpoint(lambda *_: again.attention(), *again.leaves, use_reentrant=False)
    found.backward(above)
    assert_same(plain, again)


def test_a_second_backward_through_one_graph() -> None:
    """What goes back to prompts is that of the last one, not the sum."""
    once, twice = layer_of(), layer_of()
    once.attention().square().sum().backward()
    output = twice.attention()
    output.square().sum().backward(retain_graph=True)
    for leaf in twice.leaves:
        leaf.grad = None
    output.square().sum().backward()
    assert_same(once, twice)


def test_prompts_that_nothing_continues_from_get_zeros() -> None:
    layer = layer_of()
    layer.attention().sum().backward()
    assert layer.prefix.cotangents is not None
    for total in layer.prefix.cotangents:
        assert total.shape == (2, 2, PREFIXES, 8)
        assert not total[:, :, 5:7].any()
        assert total[:, :, [*range(5), 7]].all()


def test_prompts_without_a_graph_are_only_looked_at() -> None:
    layer = layer_of()
    whole = layer_of()
    layer.prefix = PrefixStates(layer.prefix.key.detach(), layer.prefix.value.detach())
    layer.attention().sum().backward()
    whole.attention().sum().backward()
    assert layer.prefix.cotangents is None
    for a, b in zip(layer.leaves, whole.leaves, strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)


def test_heads_whose_elements_are_apart() -> None:
    """As they come where the projection was transposed, and gradients that are one number seen everywhere."""
    plain, strided = layer_of(), layer_of()
    leaves = [leaf.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for leaf in strided.leaves]
    strided.query, strided.key, strided.value = leaves
    strided.prefix = PrefixStates(
        *(
            t.detach().transpose(1, 3).contiguous().transpose(1, 3).requires_grad_()
            for t in (plain.prefix.key, plain.prefix.value)
        )
    )
    plain.attention().sum().backward()
    strided.attention().sum().backward()
    assert_same(plain, strided)
