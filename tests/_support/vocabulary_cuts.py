"""Cuts of a vocabulary into slices, for hypothesis."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import strategies as st
from linear_cases import LinearCase, make_linear_case
from logprob_cases import IGNORE


@st.composite
def cut_cases(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> tuple[LinearCase, list[int]]:
    """A case, and the sizes of one to five slices of its vocabulary, of which some may be empty.

    In some cases every token of one slice has a bias of -inf, and no row has one of them as its target.
    """
    sizes = draw(st.lists(st.integers(0, 12), min_size=1, max_size=5))
    sizes = sizes if sum(sizes) else [*sizes[1:], 3]
    vocabulary, softcap = sum(sizes), draw(st.sampled_from([None, 3.0]))
    case = make_linear_case(
        draw(st.integers(0, 9)),
        draw(st.integers(1, 8)),
        vocabulary,
        dtype,
        bias=True,
        softcap=softcap,
        scale=draw(st.sampled_from([0.0, 0.3, 3.0, 20.0])),
        seed=draw(st.integers(0, 2**31)),
    )
    never = draw(st.integers(0, len(sizes) - 1))
    if softcap is None and sizes[never] < vocabulary and draw(st.booleans()):
        begin, end = sum(sizes[:never]), sum(sizes[: never + 1])
        assert case.bias is not None
        bias = case.bias.clone()
        bias[begin:end] = -torch.inf
        possible = (bias > -torch.inf).nonzero().squeeze(1)
        moved = possible[case.targets.clamp_min(0) % len(possible)]
        case = dataclasses.replace(case, bias=bias, targets=torch.where(case.targets == IGNORE, IGNORE, moved))
    return case, sizes
