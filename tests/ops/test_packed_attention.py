"""The kernels of packed attention against attention written out in float64, on every instruction set that this machine runs."""

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

from entropy_fast import _native, ops
from entropy_fast.errors import NativeLibraryError
from entropy_fast.ops import native_backend
from entropy_fast.ops.attention_inputs import PrefixSums
from entropy_fast.ops.packed_attention import packed_attention, packed_attention_backward, takes_packed_attention

VARIANTS = _native.supported_variants()
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
LAYOUTS = ("heads first", "tokens first", "apart")
# Around the sizes of a block of queries and of keys; groups without a prefix, without a sequence, and of empty sequences.
SHAPES: Shapes = ((130, (140, 33, 1)), (0, (64, 65, 0)), (3, ()), (5, (0, 0)), (128, (16, 17)), (1, (2,)))


def run(case: AttentionCase) -> AttentionOutcome:
    """Both calls, on results that are NaN before."""
    inputs = case.inputs
    wide = accumulator(inputs.query.dtype)
    heads, tokens, size = inputs.query.shape
    output = torch.full((tokens, heads, size), torch.nan, dtype=inputs.query.dtype)
    log_sums = torch.full((tokens, heads), torch.nan, dtype=wide)
    native_backend.packed_attention_forward(inputs, output, log_sums)
    key, value = (torch.full((tokens, len(inputs.key), size), torch.nan, dtype=wide) for _ in range(2))
    n_prefix = 0 if inputs.prefix_key is None else inputs.prefix_key.shape[1]
    totals = [torch.full((len(case.weights), len(inputs.key), n_prefix, size), torch.nan, dtype=wide) for _ in range(2)]
    sums = PrefixSums(case.weights, *totals) if n_prefix else None
    query = torch.full_like(output, torch.nan)
    gradients = (query, key, value)
    native_backend.packed_attention_backward(inputs, case.above, output, log_sums, case.runs, sums, gradients)
    return AttentionOutcome(output, log_sums, *gradients, *totals)


def same(one: AttentionOutcome, two: AttentionOutcome) -> bool:
    pairs = zip(vars(one).values(), vars(two).values(), strict=True)
    return all(torch.equal(a.nan_to_num(-7.5), b.nan_to_num(-7.5)) for a, b in pairs)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ENTROPY_FAST_ISA", request.param)
    return str(request.param)


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
    others = dataclasses.replace(case.inputs, sequences=case.inputs.sequences[1:])
    alone = run(dataclasses.replace(case, inputs=others, runs=torch.tensor([0, 1, 2])))
    assert torch.equal(alone.output[30:], whole.output[30:])
    assert alone.output[:30].isnan().all()
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
    torch.testing.assert_close(outcome.log_sums.double(), expected.log_sums, rtol=1e-6, atol=0.0)
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


def test_what_is_allocated_and_counted() -> None:
    case = attention_case(SHAPES, torch.bfloat16)
    before = {record.name: record.calls for record in ops.backend_report()}
    output, log_sums = packed_attention(case.inputs)
    found = packed_attention_backward(case.inputs, case.above, output, log_sums, case.runs, None)
    after = {record.name: record.calls for record in ops.backend_report()}
    assert {name: after[name] - before[name] for name in after} == {name: 2 * (name == "native") for name in after}
    assert log_sums.dtype == torch.float32
    assert all(t.dtype == torch.bfloat16 for t in (output, *found))
    whole = run(case)
    assert torch.equal(output, whole.output)
    for one, two in zip(found, (whole.query, whole.key, whole.value), strict=True):
        assert torch.equal(one, two.bfloat16())


def test_what_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENTROPY_FAST_BACKEND", raising=False)
    inputs = attention_case([(3, (4, 5))]).inputs

    def taken(**changes: object) -> bool:
        return takes_packed_attention(dataclasses.replace(inputs, **changes))  # type: ignore[arg-type]

    assert taken() and taken(window=3) and taken(prefix_key=None, prefix_value=None)
    halves = {name: t.half() for name, t in vars(inputs).items() if name in ("query", "key", "value")}
    assert not taken(**halves, prefix_key=None, prefix_value=None)
    assert not taken(query=inputs.query.double())
    assert not taken(value=inputs.value[..., :8])
    assert not taken(window=0)
    assert not taken(query=inputs.query.to("meta"))
    for wanted, expected in (("reference", False), ("native", True), ("auto", True), ("triton", False)):
        monkeypatch.setenv("ENTROPY_FAST_BACKEND", wanted)
        assert taken() == expected, wanted
    monkeypatch.setenv("ENTROPY_FAST_BACKEND", "")
    monkeypatch.setattr(native_backend, "_load", lambda: (None, "it was taken away"))
    assert not taken()


def test_calls_that_do_not_fit_are_refused() -> None:
    case = attention_case([(3, (4, 5))], heads=4, key_heads=2)
    inputs = case.inputs
    output, log_sums = torch.zeros(9, 4, 16), torch.zeros(9, 4)
    reversed_span, no_tokens = inputs.sequences.clone(), inputs.sequences.clone()
    reversed_span[0, 1] = -1
    no_tokens[0, 2] = 9
    for changes, reason in (
        ({"query": inputs.query[:3]}, "heads are no multiple of the key heads"),
        ({"window": 0}, "a token does not see itself"),
        ({"sequences": reversed_span}, "a sequence ends before it begins"),
        ({"sequences": no_tokens}, "a sequence ends before it begins"),
        ({"prefix_value": None}, "a prefix without keys or values"),
    ):
        with pytest.raises(NativeLibraryError, match=reason):
            native_backend.packed_attention_forward(dataclasses.replace(inputs, **changes), output, log_sums)
    with pytest.raises(NativeLibraryError, match="element type float16"):
        native_backend.packed_attention_forward(inputs, output.half(), log_sums)


def test_runs_that_do_not_fit_are_refused() -> None:
    case = attention_case([(3, (4, 5))], heads=4, key_heads=2)
    output, log_sums, total = torch.zeros(9, 4, 16), torch.zeros(9, 4), torch.zeros(2, 2, 3, 16)
    two_prefixes = case.inputs.sequences.clone()
    two_prefixes[1, 2] = 1
    for runs, sequences, sums, reason in (
        ([0, 2], None, PrefixSums(case.weights, total, None), "sums of prefixes and weights do not go together"),
        ([0, 3], None, None, "a run of sequences that are not there"),
        ([2, 0], None, None, "a run of sequences that are not there"),
        ([0, 2], None, PrefixSums(case.weights[:, :1], total, total), "a sequence without weights"),
        ([0, 2], None, PrefixSums(case.weights, total[:, :, :2], total), "a prefix without sums"),
        ([0, 2], two_prefixes, PrefixSums(case.weights, total, total), "prefixes that differ within a run"),
    ):
        inputs = case.inputs if sequences is None else dataclasses.replace(case.inputs, sequences=sequences)
        with pytest.raises(NativeLibraryError, match=reason):
            native_backend.packed_attention_backward(
                inputs, case.above, output, log_sums, torch.tensor(runs), sums, (output, output, output)
            )
