"""Packed attention by every backend against the reference in float64, on every instruction set that this machine runs."""

from __future__ import annotations

import dataclasses

import hypothesis
import pytest
import torch
from attention_cases import (
    AttentionCase,
    AttentionOutcome,
    Shapes,
    assert_attention,
    attention_case,
    written_out,
)
from hypothesis import strategies as st
from logprob_cases import accumulator
from torch import Tensor

from entropy_fast import _native, ops
from entropy_fast.errors import ConfigError, NativeLibraryError
from entropy_fast.ops import native_backend
from entropy_fast.ops.attention_inputs import AttentionOptions, PackedSequences, PrefixSums

VARIANTS = _native.supported_variants()
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
LAYOUTS = ("heads first", "tokens first", "apart")
# Around the sizes of a block of queries and of keys; groups without a prefix, without a sequence, and of empty sequences.
SHAPES: Shapes = ((130, (140, 33, 1)), (0, (64, 65, 0)), (3, ()), (5, (0, 0)), (128, (16, 17)), (1, (2,)))


def run(case: AttentionCase) -> AttentionOutcome:
    """Both ops, with sums where there is a prefix."""
    inputs = case.inputs
    wide = accumulator(inputs.query.dtype)
    output = ops.packed_attention(inputs)
    n_prefix = 0 if inputs.prefix_key is None else inputs.prefix_key.shape[1]
    shape = (len(case.weights), len(inputs.key), n_prefix)
    totals = [torch.zeros(*shape, size, dtype=wide) for size in (inputs.key.shape[2], inputs.value.shape[2])]
    sums = PrefixSums(case.weights, *totals) if n_prefix else None
    return AttentionOutcome(output, *ops.packed_attention_backward(inputs, case.above, sums), *totals)


def same(one: AttentionOutcome, two: AttentionOutcome) -> bool:
    pairs = zip(vars(one).values(), vars(two).values(), strict=True)
    return all(torch.equal(a.nan_to_num(-7.5), b.nan_to_num(-7.5)) for a, b in pairs)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ENTROPY_FAST_BACKEND", "native")
    monkeypatch.setenv("ENTROPY_FAST_ISA", request.param)
    return str(request.param)


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ENTROPY_FAST_BACKEND", request.param)
    return str(request.param)


def calls_of(name: str) -> int:
    return next(record.calls for record in ops.backend_report() if record.name == name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 20, 150])
@pytest.mark.parametrize(("heads", "key_heads"), [(3, 3), (8, 2), (3, 1)])
def test_blocks_of_queries_and_keys(
    dtype: torch.dtype, window: int | None, heads: int, key_heads: int, variant: str
) -> None:
    case = attention_case(SHAPES, dtype, heads=heads, key_heads=key_heads, window=window)
    assert_attention(run(case), case)


@hypothesis.settings(
    max_examples=60, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(
    shapes=st.lists(
        st.tuples(st.integers(0, 9), st.lists(st.integers(0, 12) | st.sampled_from([31, 33, 70]), max_size=4)),
        max_size=4,
    ),
    dtype=st.sampled_from(DTYPES),
    heads=st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 3, 4, 65])),
    size=st.integers(1, 40) | st.sampled_from([64, 80, 128]),
    window=st.none() | st.integers(1, 14),
    sinks=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    columns=st.sampled_from([1, 2, 3, 5]),
    seed=st.integers(0, 9),
)
def test_any_shape(
    variant: str,
    shapes: Shapes,
    dtype: torch.dtype,
    heads: tuple[int, int],
    size: int,
    window: int | None,
    sinks: bool,
    layout: str,
    columns: int,
    seed: int,
) -> None:
    key_heads, shared = heads
    case = attention_case(
        shapes,
        dtype,
        heads=key_heads * shared,
        key_heads=key_heads,
        size=size,
        window=window,
        sinks=sinks,
        layout=layout,
        columns=columns,
        seed=seed,
    )
    assert_attention(run(case), case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype) -> None:
    case = attention_case([(90, (64, 50, 64)), (0, (100, 30)), (40, (7, 64))], dtype, heads=8, size=32)
    before = torch.get_num_threads()
    outcomes = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            outcomes += [run(case), run(case)]
    finally:
        torch.set_num_threads(before)
    assert all(same(outcome, outcomes[0]) for outcome in outcomes[1:])


def test_a_sequence_is_by_itself() -> None:
    """Bits do not depend on what else is in the row, and a NaN stays where it is."""
    case = attention_case([(20, (30, 40)), (9, (11,))])
    whole = run(case)
    alone = attention_case([(20, (30, 40))])
    for name in ("query", "key", "value"):
        getattr(alone.inputs, name)[:] = getattr(case.inputs, name)[:, :70]
    for name in ("prefix_key", "prefix_value"):
        getattr(alone.inputs, name)[:] = getattr(case.inputs, name)[:, :20]
    assert torch.equal(run(alone).output, whole.output[:70])
    case.inputs.value[:, 5] = torch.nan
    case.above[:, 7] = torch.nan
    spoiled = run(case)
    for name in ("output", "query", "key", "value"):
        assert torch.equal(getattr(spoiled, name)[30:], getattr(whole, name)[30:]), name
    assert spoiled.output[5:30].isnan().all()


def test_extreme_scores() -> None:
    """Far beyond what exp takes, and all of the weight on one key."""
    case = attention_case([(40, (50,))], size=8)
    case.inputs.query.mul_(3e4)
    outcome, expected = run(case), written_out(case)
    torch.testing.assert_close(outcome.output.double(), expected.output, rtol=0.0, atol=0.05)
    assert all(value.isfinite().all() for value in vars(outcome).values())


def test_a_long_sequence() -> None:
    """Scores are made a block at a time: written down they would be 3 GB."""
    case = attention_case([(3, (20000,))], heads=2, key_heads=2, size=16, window=300)
    outcome = run(case)
    last = attention_case([(700, (4,))], heads=2, key_heads=2, size=16, window=300)
    own, states = last.inputs, case.inputs
    for name in ("query", "key", "value"):
        getattr(own, name)[:] = getattr(states, name)[:, -4:]
    assert own.prefix_key is not None and own.prefix_value is not None
    own.prefix_key[:], own.prefix_value[:] = states.key[:, -704:-4], states.value[:, -704:-4]
    assert torch.allclose(outcome.output[-4:].double(), written_out(last).output, atol=1e-6)


@pytest.mark.parametrize("columns", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_column_of_weights_is_by_itself(dtype: torch.dtype, columns: int, variant: str) -> None:
    """Its sums are right, and the bits are those of a call with that column alone."""
    case = attention_case(SHAPES, dtype, size=21, columns=columns)
    outcome = run(case)
    assert_attention(outcome, case)
    for column in range(columns):
        alone = run(dataclasses.replace(case, weights=case.weights[column : column + 1].contiguous()))
        for together, one in ((outcome.prefix_key, alone.prefix_key), (outcome.prefix_value, alone.prefix_value)):
            assert torch.equal(together[column].nan_to_num(-7.5), one[0].nan_to_num(-7.5))


def test_weights_that_are_all_zero_give_zeros() -> None:
    case = attention_case([(6, (3, 4))])
    case.weights[1] = 0.0
    outcome = run(case)
    assert not outcome.prefix_key[1].any() and not outcome.prefix_value[1].any()
    assert outcome.prefix_key[0].any() and outcome.prefix_value[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (None, 1.5), (20, 0.7)])
def test_by_torch(
    dtype: torch.dtype, sinks: bool, window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENTROPY_FAST_BACKEND", "reference")
    case = attention_case(SHAPES, dtype, columns=3, window=window, softcap=softcap, sinks=sinks, layout="apart")
    before = calls_of("reference")
    outcome = run(case)
    assert calls_of("reference") - before == 2
    assert_attention(outcome, case)


def test_scores_written_out_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few sequences at a time."""
    case = attention_case(SHAPES, torch.float64, softcap=1.5)
    monkeypatch.setattr("entropy_fast.ops.padded_attention._AT_ONCE", 1)
    assert_attention(run(case), case)


def gradients_of_scores(case: AttentionCase) -> tuple[Tensor, Tensor]:
    """Of one sequence [heads, T, T]: dz = p_j Σ_k p_k (dp_j - dp_k), in which nothing large cancels, and its bound."""
    inputs = case.inputs
    q, k, v, above = (t.double() for t in (inputs.query, inputs.key, inputs.value, case.above))
    k, v = (t.repeat_interleave(len(q) // len(k), 0) for t in (k, v))
    z = inputs.options.scale * q @ k.transpose(1, 2)
    hidden = torch.ones_like(z, dtype=torch.bool).triu(1)
    highest = z.masked_fill(hidden, 0.0).abs().amax(-1, keepdim=True)
    p, dp = z.masked_fill(hidden, -torch.inf).softmax(-1), above @ v.transpose(1, 2)
    dz = p * ((dp[..., :, None] - dp[..., None, :]) * p[..., None, :]).sum(-1)
    largest = above.norm(dim=-1, keepdim=True) * v.norm(dim=-1).amax()
    # 1 - p without rounding.
    other = (p[..., None, :] * ~torch.eye(len(p[0]), dtype=torch.bool)).sum(-1)
    # A score is off by what rounding it makes of the largest; what is smaller than the smallest number is 0.
    of = torch.finfo(accumulator(inputs.query.dtype))
    return dz, largest * (16 * of.eps * (1 + highest) * p * other + of.tiny)


@pytest.mark.parametrize("scale", [10.0**power for power in range(0, 13, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_a_saturated_softmax(dtype: torch.dtype, scale: float, backend: str) -> None:
    """Nearly all weight is on one key, and queries are so large that the rounding of what cancels would show.

    What p (dp - Σ o do) leaves of two equal numbers, 1e-7 of them, is a gradient of 10 where queries are 1e8 and it is 0.
    """
    case = attention_case([(0, (40,))], dtype, size=16)
    case.inputs.query.mul_(scale)
    outcome = run(case)
    dz, allowed = gradients_of_scores(case)
    q = case.inputs.options.scale * case.inputs.query.double()
    k = case.inputs.options.scale * case.inputs.key.double().repeat_interleave(2, 0)
    pairs = (
        (outcome.query, dz @ k, allowed @ k.abs()),
        (outcome.key, *(t.view(2, 2, 40, 16).sum(1) for t in (dz.mT @ q, allowed.mT @ q.abs()))),
    )
    for found, expected, bound in pairs:
        excess = (found.transpose(0, 1).double() - expected).abs() - bound
        assert (excess <= 2 * torch.finfo(dtype).eps * expected.abs()).all(), float(excess.max())


def test_what_is_allocated_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENTROPY_FAST_BACKEND", raising=False)
    case = attention_case(SHAPES, torch.bfloat16)
    before = {record.name: record.calls for record in ops.backend_report()}
    output = ops.packed_attention(case.inputs)
    found = ops.packed_attention_backward(case.inputs, case.above, None)
    after = {record.name: record.calls for record in ops.backend_report()}
    assert {name: after[name] - before[name] for name in after} == {name: 2 * (name == "native") for name in after}
    assert all(t.dtype == torch.bfloat16 for t in (output, *found))
    whole = run(case)
    for one, two in zip((output, *found), (whole.output, whole.query, whole.key, whole.value), strict=True):
        assert torch.equal(one, two)


def test_which_backend_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENTROPY_FAST_BACKEND", raising=False)
    inputs = attention_case([(3, (4, 5))]).inputs

    def natively(**changes: object) -> bool:
        before = calls_of("native"), calls_of("reference")
        ops.packed_attention(dataclasses.replace(inputs, **changes))  # type: ignore[arg-type]
        after = calls_of("native"), calls_of("reference")
        assert sum(after) - sum(before) == 1
        return after[0] > before[0]

    def options(**changes: object) -> AttentionOptions:
        return dataclasses.replace(inputs.options, **changes)  # type: ignore[arg-type]

    assert natively() and natively(options=options(window=3)) and natively(options=options(sinks=torch.zeros(4)))
    assert not natively(options=options(softcap=2.0))
    names = ("query", "key", "value", "prefix_key", "prefix_value")
    assert not natively(**{name: getattr(inputs, name).half() for name in names})
    assert not natively(value=inputs.value[..., :8], prefix_value=inputs.prefix_value[..., :8])
    assert not natively(**{name: getattr(inputs, name).to("meta") for name in names})
    for wanted, expected in (("reference", False), ("native", True), ("auto", True), ("triton", False), ("", True)):
        monkeypatch.setenv("ENTROPY_FAST_BACKEND", wanted)
        assert natively() == expected, wanted
    monkeypatch.setattr(native_backend, "_load", lambda: (None, "it was taken away"))
    assert not natively()


def table(*rows: tuple[int, ...]) -> PackedSequences:
    return PackedSequences(torch.tensor(rows))


@pytest.mark.parametrize(
    "rows",
    [
        [(1, 4, 0, 3, 0)],
        [(0, 4, 0, 3, 0), (5, 9, 0, 3, 1)],
        [(0, 4, 0, 3, 0), (3, 9, 0, 3, 1)],
        [(0, -1, 0, 3, 0)],
        [(0, 4, 3, 0, 0)],
        [(0, 4, -1, 3, 0)],
        [(0, 4, 0, 3, -1)],
        [(0, 4, 0, 3, 0), (4, 9, 1, 3, 1)],
        [(0, 4, 0, 3, 0), (4, 9, 3, 5, 1), (9, 10, 0, 3, 2)],
    ],
)
def test_tables_that_are_refused(rows: list[tuple[int, ...]]) -> None:
    with pytest.raises(ConfigError, match="one behind the other"):
        table(*rows)


@pytest.mark.parametrize("wrong", [torch.zeros(2, 4).long(), torch.zeros(2, 5), torch.zeros(5).long()])
def test_what_is_no_table(wrong: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"expected \[S, 5\] int64"):
        PackedSequences(wrong)


def test_runs_of_sequences() -> None:
    sequences = table((0, 4, 0, 5, 0), (4, 7, 0, 5, 2), (7, 9, 7, 8, 4), (9, 10, 8, 8, 5), (10, 12, 8, 8, 6))
    assert sequences.by_prefix.tolist() == [0, 2, 3, 4, 5]
    assert sequences.each.tolist() == [0, 1, 2, 3, 4, 5]
    assert (sequences.tokens, sequences.prefix_tokens, sequences.rows) == (12, 8, 7)
    nothing = PackedSequences(torch.zeros(0, 5, dtype=torch.int64))
    assert nothing.by_prefix.tolist() == nothing.each.tolist() == [0]


def test_inputs_that_do_not_fit_are_refused(backend: str) -> None:
    case = attention_case([(3, (4, 5))], heads=4, key_heads=2)
    inputs, total = case.inputs, torch.zeros(2, 2, 3, 16)
    changed = [
        {"query": inputs.query[:3]},
        {"query": inputs.query[:, :8]},
        {"query": inputs.query[0]},
        {"query": inputs.query.double()},
        {"query": inputs.query.to("meta")},
        {"query": inputs.query.long()},
        {"key": inputs.key[:, :8]},
        {"key": inputs.key[..., :8]},
        {"value": inputs.value[:1]},
        {"prefix_value": None},
        {"prefix_key": inputs.prefix_key[:, :2]},
        {"prefix_value": inputs.prefix_value[..., :7]},
        {"prefix_key": None, "prefix_value": None},
        {"sequences": table((0, 4, 0, 4, 0), (4, 9, 0, 4, 1))},
        {"sequences": table((0, 4, 0, 3, 0))},
        {"sequences": table((0, 4, 0, 3, 0), (4, 10**12, 0, 3, 1))},
        {"options": AttentionOptions(1.0, 0)},
        {"options": AttentionOptions(1.0, None, 0.0)},
        {"options": AttentionOptions(1.0, sinks=torch.zeros(2))},
    ]
    for changes in changed:
        wrong = dataclasses.replace(inputs, **changes)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="packed_attention got"):
            ops.packed_attention(wrong)
        with pytest.raises(ConfigError, match="packed_attention"):
            ops.packed_attention_backward(wrong, case.above, None)
    for above in (case.above[:, :8], case.above.double(), case.above[..., :4], case.above.to("meta")):
        with pytest.raises(ConfigError, match="got a gradient of"):
            ops.packed_attention_backward(inputs, above, None)
    for sums in (
        PrefixSums(case.weights[:, :1], total, total),
        PrefixSums(case.weights, total[:1], total),
        PrefixSums(case.weights, total, total[:, :, :2]),
        PrefixSums(case.weights, total, total.double()),
        PrefixSums(case.weights.double(), total, total),
        PrefixSums(case.weights, total.transpose(1, 2).contiguous().transpose(1, 2), total),
    ):
        with pytest.raises(ConfigError, match="as weights and sums"):
            ops.packed_attention_backward(inputs, case.above, sums)


def test_a_table_that_was_changed_afterwards_is_refused_by_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENTROPY_FAST_BACKEND", "native")
    case = attention_case([(3, (4, 5))])
    for place, value, reason in (
        ((0, 1), 10**15, "stand one behind the other|tokens that are not there"),
        ((1, 1), 10**15, "tokens that are not there"),
        ((1, 1), 8, "tokens that are in no sequence"),
        ((1, 0), 3, "one behind the other"),
        ((1, 1), -(2**62), "ends before it begins"),
        ((0, 3), 10**15, "a prefix that is not there"),
        ((0, 2), -(2**62), "a prefix that is not there"),
    ):
        changed = case.inputs.sequences.table[place].clone()
        case.inputs.sequences.table[place] = value
        with pytest.raises(NativeLibraryError, match=reason):
            ops.packed_attention(case.inputs)
        case.inputs.sequences.table[place] = changed
    sums = PrefixSums(case.weights, torch.zeros(2, 2, 3, 16), torch.zeros(2, 2, 3, 16))
    for value in (2, -1):
        case.inputs.sequences.table[1, 4] = value
        with pytest.raises(NativeLibraryError, match="without weights"):
            ops.packed_attention_backward(case.inputs, case.above, sums)
