"""What one slice does for the whole vocabulary, all slices in one process: against the op on all rows, and against autograd."""

from __future__ import annotations

import dataclasses
import itertools

import hypothesis
import pytest
import torch
from linear_cases import LinearCase, assert_right, certain_case, make_linear_case
from logprob_cases import DTYPES, IGNORE
from torch import Tensor
from vocabulary_cuts import cut_cases

from entropy_fast import ops, reference
from entropy_fast.ops.slice_parts import (
    SliceCall,
    gradient_of_rows,
    hidden_part,
    own_values,
    slice_gradients,
    values_of,
)


@dataclasses.dataclass(frozen=True)
class Together:
    """All slices of a case, and what each has found by itself."""

    case: LinearCase
    sizes: list[int]
    ignore_index: int = IGNORE

    def __post_init__(self) -> None:
        ends = list(itertools.accumulate(self.sizes))
        rows = [range(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]
        case, options = self.case, {"softcap": self.case.softcap, "want_entropy": True, "units": True}
        calls = [SliceCall.of(case.targets, r, ends[-1], ignore_index=self.ignore_index, **options) for r in rows]
        weights = case.weight.split(self.sizes)
        biases = [None] * len(rows) if case.bias is None else case.bias.split(self.sizes)
        found = [own_values(case.hidden, *own) for own in zip(weights, biases, calls, strict=True)]
        values = reference.SliceValues(
            *torch.stack([values_of(*own) for own in zip(found, calls, strict=True)], 1).unbind()
        )
        self.__dict__.update(
            calls=calls,
            weights=weights,
            biases=biases,
            found=found,
            values=values,
            merged=reference.merge_slices(values),
        )

    def gradient_of_hidden(self, grads: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        backs = slice_gradients(grads, self.values, self.merged, torch.stack([call.held for call in self.calls]))
        parts = [
            hidden_part(tuple(back[r] for back in backs), weight, found, call)
            for r, (weight, found, call) in enumerate(zip(self.weights, self.found, self.calls, strict=True))
        ]
        return torch.stack(parts).sum(0)

    def results(self) -> ops.LinearTokenLogprobs:
        one, nothing = torch.ones_like(self.merged.lse), torch.zeros_like(self.merged.lse)
        units = [self.gradient_of_hidden(grads) for grads in ((one, nothing, nothing), (nothing, nothing, one))]
        return ops.LinearTokenLogprobs(*self.calls[0].results(self.merged, units[0].dtype), *units)


def whole_of(case: LinearCase, **changes: Tensor) -> ops.TokenLogprobs:
    arguments, options = dataclasses.replace(case, **changes).arguments()
    return ops.linear_token_logprobs(*arguments, **options, want_entropy=True, ignore_index=IGNORE)


@hypothesis.settings(max_examples=30)
@hypothesis.given(cut_cases())
def test_results_are_those_of_the_whole(drawn: tuple[LinearCase, list[int]]) -> None:
    case, sizes = drawn
    arguments, options = case.arguments()
    whole = ops.linear_token_logprobs_with_units(*arguments, **options, want_entropy=True, ignore_index=IGNORE)
    found = Together(case, sizes).results()
    for name, one, two in zip(found._fields, found, whole, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=2e-12, msg=lambda text, name=name: f"{name}: {text}")


@hypothesis.settings(max_examples=30)
@hypothesis.given(cut_cases())
def test_gradients_are_those_of_the_whole(drawn: tuple[LinearCase, list[int]]) -> None:
    case, sizes = drawn
    leaves = {name: getattr(case, name).clone().requires_grad_() for name in ("hidden", "weight", "bias")}
    results = whole_of(case, **leaves)
    grads = tuple(torch.linspace(-1, 2, len(case.targets), dtype=torch.float64) + shift for shift in (0.1, 0.3, -0.2))
    torch.autograd.backward(list(results), list(grads))
    slices = Together(case, sizes)
    close = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(slices.gradient_of_hidden(grads), leaves["hidden"].grad, **close)
    parts = [
        gradient_of_rows(grads, (case.hidden, weight, bias), slices.merged, call, (True, True))
        for weight, bias, call in zip(slices.weights, slices.biases, slices.calls, strict=True)
    ]
    for name, found in zip(("weight", "bias"), zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(found), leaves[name].grad, **close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_less_exact_than_the_whole(dtype: torch.dtype) -> None:
    for case, sizes in (
        (make_linear_case(20, 24, 1003, dtype, bias=True, softcap=4.0, scale=3.0), [500, 0, 503]),
        (certain_case(dtype), [1501, 1499]),
        (certain_case(dtype), [5, 1, 2993, 1]),
    ):
        assert_right(Together(case, sizes).results(), case)


def test_what_comes_back_to_a_slice_is_what_autograd_says() -> None:
    generator = torch.Generator().manual_seed(4)
    lse, entropy = (3 * torch.randn(3, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    held = torch.arange(3).unsqueeze(1) == torch.arange(6) % 3
    logprob = -torch.rand(3, 6, generator=generator, dtype=torch.float64)
    lse[0, 1], entropy[0, 1] = -torch.inf, torch.nan
    leaves = [t.requires_grad_() for t in (logprob, lse, entropy)]
    # The logit of the target, from what the slice says of it.
    values = reference.SliceValues(lse, torch.where(held, logprob + lse, 0.0), entropy)
    merged = reference.merge_slices(values)
    grads = [torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(3)]
    expected = torch.autograd.grad([merged.logprob, merged.lse, merged.entropy], leaves, grads)
    found = slice_gradients(tuple(grads), values, merged, held)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one.detach(), two, rtol=1e-12, atol=1e-13)


def test_the_rest_of_a_share_near_one_is_not_lost() -> None:
    """Slice 0 holds the target and all but 1e-30 of the probability: what its row gets is that rest."""
    lse = torch.tensor([[0.0], [-69.0]], dtype=torch.float64)
    values = reference.SliceValues(lse, torch.zeros(2, 1, dtype=torch.float64), None)
    one, nothing = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    held = torch.tensor([[True], [False]])
    _, of_lse, _ = slice_gradients((one, nothing, None), values, reference.merge_slices(values), held)
    torch.testing.assert_close(of_lse[:, 0], torch.tensor([1.0, -1.0], dtype=torch.float64) * torch.exp(lse[1]))


def test_targets_that_no_slice_holds_are_nan() -> None:
    """On a GPU, where nobody looks at targets before."""
    case = make_linear_case(3, 4, 9, torch.float64, bias=True, masked=0)
    case = dataclasses.replace(case, targets=torch.tensor([1, 9, -3]))
    found = Together(case, [5, 4]).results()
    assert found.logprob.isnan().tolist() == [False, True, True]
    assert found.unit_logprob.isnan().any(1).tolist() == [False, True, True]
    assert found.lse.isfinite().all() and found.entropy.isfinite().all()


def test_an_index_to_ignore_that_is_a_token_of_a_slice() -> None:
    """Within the slices other tokens have that index."""
    case = make_linear_case(6, 4, 9, torch.float64, bias=True, masked=0)
    case = dataclasses.replace(case, targets=torch.tensor([2, 0, 7, 4, 2, 6]))
    arguments, options = case.arguments()
    whole = ops.linear_token_logprobs_with_units(*arguments, **options, want_entropy=True, ignore_index=2)
    for found, expected in zip(Together(case, [5, 4], ignore_index=2).results(), whole, strict=True):
        torch.testing.assert_close(found, expected)


def test_an_impossible_target_in_a_slice_without_probability() -> None:
    case = make_linear_case(3, 4, 9, torch.float64, bias=True, masked=0)
    bias = case.bias.clone()
    bias[5:] = -torch.inf
    case = dataclasses.replace(case, bias=bias, targets=torch.tensor([8, 5, 0]))
    arguments, options = case.arguments()
    whole = ops.linear_token_logprobs_with_units(*arguments, **options, want_entropy=True)
    for found, expected in zip(Together(case, [5, 4]).results(), whole, strict=True):
        torch.testing.assert_close(found, expected)
    assert whole.logprob[:2].eq(-torch.inf).all()
