"""Packed attention against attention written out for one sequence at a time, differentiated by autograd.

Legend: K_p and V_p keys and values of a prompt, S_i a weighted sum of the outputs of response i, c_i and a_i coefficients.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from entropy_fast.ops.attention_inputs import AttentionOptions
from entropy_fast.ways.packed.attention import packed_attention
from entropy_fast.ways.packed.groups import AttentionGroups
from entropy_fast.ways.packed.layout import PackedGroup
from entropy_fast.ways.packed.prefix_states import PrefixStates

# Prompt length, and lengths of its tails. A group without any tail, single ones, and one without a prompt.
GROUPS = ((5, (3, 1, 0, 6)), (2, (0, 0)), (1, (4,)), (0, (2, 2)), (7, (2, 2, 2)))
SIZE = 8
FORMS = {"plain": (None, None), "window": (3, None), "softcap": (None, 1.5), "both": (4, 0.7)}


@dataclasses.dataclass
class Case:
    """Packed queries, keys, values and weights of the outputs, [1, heads, N, D] each, of prompts and of tails."""

    groups: list[PackedGroup]
    prefixes: list[Tensor]
    tails: list[Tensor]
    weights: Tensor  # [C, rows]
    options: AttentionOptions


def packed_groups(shapes: tuple[tuple[int, tuple[int, ...]], ...]) -> list[PackedGroup]:
    groups = []
    row = n_prefix = n_tail = 0
    for unit, (length, tails) in enumerate(shapes):
        ends = [n_tail + end for end in itertools.accumulate(tails)]
        spans = tuple(zip([n_tail, *ends[:-1]], ends, strict=True))
        groups.append(PackedGroup(unit, (row, row + len(tails)), (n_prefix, n_prefix + length), spans))
        row, n_prefix, n_tail = row + len(tails), n_prefix + length, ends[-1]
    return groups


def case_of(heads: int, key_heads: int, form: str, value_size: int = SIZE, columns: int = 2) -> Case:
    groups = packed_groups(GROUPS)
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> list[Tensor]:
        shapes = ((heads, SIZE), (key_heads, SIZE), (key_heads, value_size), (heads, value_size))
        return [torch.randn(1, h, length, d, generator=generator, dtype=torch.float64) for h, d in shapes]

    weights = torch.randn(columns, groups[-1].rows[1], generator=generator, dtype=torch.float64)
    window, softcap = FORMS[form]
    options = AttentionOptions(0.6, window, softcap)
    return Case(groups, draw(groups[-1].prefix[1]), draw(groups[-1].tail_span[1]), weights, options)


def written_out(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
    """[T, heads, D'] attention of one sequence's last T tokens over all S, a query and a head at a time."""
    heads, length, _ = query.shape
    total = key.shape[1]
    shared = heads // key.shape[0]
    rows = []
    for token in range(length):
        place = total - length + token
        first = 0 if options.window is None else max(0, place - options.window + 1)
        seen = slice(first, place + 1)
        row = []
        for head in range(heads):
            score = options.scale * (key[head // shared, seen] @ query[head, token])
            if options.softcap is not None:
                score = options.softcap * torch.tanh(score / options.softcap)
            row.append(score.softmax(0) @ value[head // shared, seen])
        rows.append(torch.stack(row))
    return torch.stack(rows)


@dataclasses.dataclass
class Expected:
    """Outputs [N, heads, D'] of the tails, gradients of ΣS_i, and [C, heads, P, D] what goes back to K_p and V_p."""

    output: Tensor
    gradients: list[Tensor]
    cotangents: list[Tensor]


def of_tails(case: Case) -> Expected:
    query, key, value = (t[0].clone().requires_grad_() for t in case.tails[:3])
    prompt_key, prompt_value = (t[0].clone().requires_grad_() for t in case.prefixes[1:3])
    above = case.tails[3][0].transpose(0, 1)
    output = torch.zeros_like(above)
    cotangents = [torch.zeros(len(case.weights), *t.shape, dtype=torch.float64) for t in (prompt_key, prompt_value)]
    sums = torch.zeros((), dtype=torch.float64)
    for group in case.groups:
        before = slice(*group.prefix)
        for row, (begin, end) in zip(range(*group.rows), group.tails, strict=True):
            if begin == end:
                continue
            own = slice(begin, end)
            keys = torch.cat([prompt_key[:, before], key[:, own]], 1)
            values = torch.cat([prompt_value[:, before], value[:, own]], 1)
            found = written_out(query[:, own], keys, values, case.options)
            output[own] = found.detach()
            S = (found * above[own]).sum()
            sums = sums + S
            back = torch.autograd.grad(S, (prompt_key, prompt_value), retain_graph=True)
            for total, gradient in zip(cotangents, back, strict=True):
                total += case.weights[:, row, None, None, None] * gradient
    return Expected(output, list(torch.autograd.grad(sums, (query, key, value))), cotangents)


@dataclasses.dataclass
class Found:
    output: Tensor
    gradients: list[Tensor]
    cotangents: list[Tensor]


def by_packing(case: Case, dtype: torch.dtype = torch.float64) -> Found:
    query, key, value, above = (t.to(dtype) for t in case.tails)
    leaves = [t.clone().requires_grad_() for t in (query, key, value)]
    prefix = PrefixStates(*(t.to(dtype).requires_grad_() for t in case.prefixes[1:3]))
    groups = AttentionGroups(case.groups, tails=True)
    weights: list[Tensor] = []
    output = packed_attention(*leaves, groups, prefix, weights, case.options)
    weights.append(case.weights)
    output.backward(above.transpose(1, 2))
    assert prefix.cotangents is not None
    assert prefix.key.grad is None and prefix.value.grad is None
    gradients = [leaf.grad[0] for leaf in leaves if leaf.grad is not None]
    return Found(output.detach()[0], gradients, list(prefix.cotangents))


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected).norm() / expected.norm())


def assert_near(found: Found, expected: Expected, tolerance: float) -> None:
    assert relative(found.output, expected.output) < tolerance
    for name, one, two in zip("qkv", found.gradients, expected.gradients, strict=True):
        assert relative(one, two) < tolerance, name
    for name, one, two in zip("kv", found.cotangents, expected.cotangents, strict=True):
        assert one.shape == two.shape
        for column in range(len(two)):
            assert relative(one[column], two[column]) < tolerance, f"column {column}, {name}"


@pytest.fixture(params=["native", "reference"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both backends; a softcap is for the second one in any case."""
    monkeypatch.setenv("ENTROPY_FAST_BACKEND", request.param)
    return str(request.param)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("heads", [(3, 3), (6, 2)], ids=["", "grouped-query"])
def test_tails_against_one_sequence_at_a_time(heads: tuple[int, int], form: str, kernel: str) -> None:
    case = case_of(*heads, form)
    assert_near(by_packing(case), of_tails(case), 1e-12)


@pytest.mark.parametrize("columns", [1, 3, 5])
def test_any_number_of_columns(columns: int, kernel: str) -> None:
    case = case_of(6, 2, "window", columns=columns)
    assert_near(by_packing(case), of_tails(case), 1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_prefixes_by_themselves(form: str, kernel: str) -> None:
    """Without states to continue from, every prompt is a sequence of its own."""
    case = case_of(6, 2, form)
    query, key, value = (t.clone().requires_grad_() for t in case.prefixes[:3])
    groups = AttentionGroups(case.groups, tails=False)
    output = packed_attention(query, key, value, groups, None, [], case.options)
    above = case.prefixes[3].transpose(1, 2)
    output.backward(above)
    parts = [slice(*g.prefix) for g in case.groups if g.prefix[0] != g.prefix[1]]
    plain = [t.clone().requires_grad_() for t in case.prefixes[:3]]
    expected = torch.cat([written_out(*(t[0, :, part] for t in plain), case.options) for part in parts])
    expected.backward(above[0])
    assert relative(output.detach()[0], expected.detach()) < 1e-12
    for found, wanted in zip((query, key, value), plain, strict=True):
        assert found.grad is not None and wanted.grad is not None
        assert relative(found.grad, wanted.grad) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_values_of_another_size_than_keys(form: str) -> None:
    """The fused kernel does not take them."""
    case = case_of(4, 2, form, value_size=5)
    assert_near(by_packing(case), of_tails(case), 1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_rounds_as_half_precision(form: str, kernel: str) -> None:
    """Against fp64 of the rounded inputs; the sums that go back to prompts are fp32 all the same."""
    case = case_of(6, 2, form)
    for tensors in (case.prefixes, case.tails):
        tensors[:] = [t.bfloat16().double() for t in tensors]
    found = by_packing(case, torch.bfloat16)
    assert found.output.dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for t in found.cotangents)
    assert_near(found, of_tails(case), 4 * 2**-8)


def test_cotangents_of_prompts_without_a_graph_are_not_made() -> None:
    case = case_of(3, 3, "plain")
    prefix = PrefixStates(*case.prefixes[1:3])
    leaves = [t.clone().requires_grad_() for t in case.tails[:3]]
    groups = AttentionGroups(case.groups, tails=True)
    packed_attention(*leaves, groups, prefix, [case.weights], case.options).sum().backward()
    assert prefix.cotangents is None
