"""The compiled CPU kernels against float64 truth, on every instruction set that this machine runs."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from logprob_cases import (
    DTYPES,
    IGNORE,
    Case,
    Outcome,
    assert_right,
    make_case,
    shaped_rows,
    special_rows,
    with_gradients,
)

from entropy_fast import _native, ops
from entropy_fast.errors import ConfigError
from entropy_fast.ops import native_backend

VARIANTS = _native.supported_variants()
# Around the width of a vector (4 to 16), of four of them, and of a chunk (4096).
VOCABULARIES = (1, 2, 3, 15, 16, 17, 63, 64, 65, 4095, 4096, 4097, 50257)


def run_native(case: Case, *, in_place: bool = False) -> Outcome:
    """The kernels themselves, on outputs filled with NaN; ``in_place`` writes the gradient over a copy of the logits."""
    rows, vocabulary = case.logits.shape
    logprob = torch.full((rows,), float("nan"), dtype=case.grad_logprob.dtype)
    lse = torch.full((rows,), float("nan"), dtype=torch.float64)
    entropy = None if case.grad_entropy is None else torch.full_like(lse, float("nan"))
    native_backend.token_logprobs_forward(case.logits, case.targets, logprob, lse, entropy, IGNORE)
    logits = case.logits
    if in_place:
        logits = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype).copy_(logits)
    grad_logits = logits if in_place else torch.full((rows, vocabulary), float("nan"), dtype=case.logits.dtype)
    native_backend.token_logprobs_backward(
        case.grad_logprob,
        case.grad_lse,
        case.grad_entropy,
        logits,
        case.targets,
        lse,
        entropy,
        grad_logits,
        IGNORE,
    )
    return Outcome(logprob, lse, grad_logits, entropy)


@pytest.fixture(params=VARIANTS)
def _variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENTROPY_FAST_ISA", request.param)
    assert _native.selected_variant() == request.param


@pytest.mark.usefixtures("_variant")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestAgainstTruth:
    @pytest.mark.parametrize("entropy", [False, True])
    @pytest.mark.parametrize("vocabulary", VOCABULARIES)
    def test_vocabulary_sizes(self, vocabulary: int, dtype: torch.dtype, entropy: bool) -> None:
        case = make_case(5, vocabulary, dtype, seed=vocabulary, entropy=entropy)
        assert_right(run_native(case), case)

    @pytest.mark.slow
    @pytest.mark.parametrize("vocabulary", [129_920, 151_936])
    def test_vocabularies_of_large_models(self, vocabulary: int, dtype: torch.dtype) -> None:
        case = make_case(3, vocabulary, dtype, masked=0, entropy=True)
        assert_right(run_native(case), case)

    @pytest.mark.parametrize("vocabulary", [2, 17, 1500, 9000])
    def test_flat_and_peaked_rows(self, vocabulary: int, dtype: torch.dtype) -> None:
        case = shaped_rows(vocabulary, dtype)
        assert_right(run_native(case), case)

    @pytest.mark.parametrize("padding", [0, 3])
    def test_gradient_in_place_of_the_logits(self, padding: int, dtype: torch.dtype) -> None:
        case = make_case(5, 700, dtype, padding=padding, entropy=True)
        apart, over = run_native(case), run_native(case, in_place=True)
        assert torch.equal(apart.grad_logits, over.grad_logits)
        assert_right(over, case)

    @pytest.mark.parametrize("rows", [0, 1, 31])
    def test_row_counts(self, rows: int, dtype: torch.dtype) -> None:
        case = make_case(rows, 100, dtype)
        assert_right(run_native(case), case)

    @pytest.mark.parametrize("padding", [1, 7, 64])
    def test_rows_any_distance_apart(self, padding: int, dtype: torch.dtype) -> None:
        case = make_case(6, 1000, dtype, padding=padding)
        assert case.logits.stride(0) == 1000 + padding
        assert_right(run_native(case), case)

    def test_the_same_row_again_and_again(self, dtype: torch.dtype) -> None:
        one = make_case(1, 300, dtype, masked=0).logits
        case = with_gradients(one.expand(4, 300), torch.tensor([0, 299, IGNORE, 150]))
        assert_right(run_native(case), case)

    @pytest.mark.parametrize("offset", [1e4, -1e4])
    def test_far_from_zero(self, offset: float, dtype: torch.dtype) -> None:
        case = make_case(5, 5000, dtype, offset=offset, entropy=True)
        assert_right(run_native(case), case)

    @pytest.mark.parametrize("center", [-110.0, -130.0])
    def test_every_logit_below_the_smallest_exponential(self, center: float, dtype: torch.dtype) -> None:
        case = make_case(4, 3000, dtype, offset=center, scale=1.0, entropy=True)
        assert_right(run_native(case), case)

    @pytest.mark.parametrize("vocabulary", [2, 17, 1500, 9000])
    @pytest.mark.parametrize("entropy", [False, True])
    def test_nan_and_infinite_rows(self, vocabulary: int, dtype: torch.dtype, entropy: bool) -> None:
        case = special_rows(vocabulary, dtype, entropy=entropy)
        assert_right(run_native(case), case)

    def test_maximum_rises_through_the_row(self, dtype: torch.dtype) -> None:
        rising = torch.linspace(-60, 60, 5000).to(dtype).expand(3, -1)
        case = with_gradients(
            torch.stack([rising[0], rising[0].flip(0), rising[0].roll(2500)]), torch.tensor([0, 1, 2])
        )
        assert_right(run_native(case), case)

    def test_everything_masked(self, dtype: torch.dtype) -> None:
        logits = torch.full((7, 50), float("nan"), dtype=dtype)
        case = with_gradients(logits, torch.full((7,), IGNORE), entropy=True)
        outcome = run_native(case)
        for tensor in (outcome.logprob, outcome.lse, outcome.grad_logits, outcome.entropy):
            assert torch.equal(tensor, torch.zeros_like(tensor))

    def test_every_bit_pattern_of_a_half(self, dtype: torch.dtype) -> None:
        if dtype.itemsize != 2:
            # The class runs for every dtype; 2^32 values would take hours.
            pytest.skip("only 16-bit types have few enough values to try them all")
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).unsqueeze(1)
        case = Case(every, torch.zeros(2**16, dtype=torch.int64), torch.zeros(2**16), torch.ones(2**16).double())
        outcome = run_native(case)
        finite = every.squeeze(1).isfinite()
        assert torch.equal(outcome.lse[finite], every.squeeze(1)[finite].double())
        assert torch.equal(outcome.lse.isnan(), every.squeeze(1).isnan())

    def test_gradients_are_rounded_to_nearest(self, dtype: torch.dtype) -> None:
        # One token, gradient of lse alone: grad_logits is grad_lse, rounded to the dtype.
        values = torch.cat(
            [torch.randn(20000), torch.randn(2000) * 1e-5, torch.randn(2000) * 3e-8, torch.ones(1) * 7e4]
        )
        values[:2000] = 1 + torch.arange(2000) / 4096  # ties
        values = values.to(torch.float64 if dtype == torch.float64 else torch.float32)
        rows = len(values)
        zeros = torch.zeros(rows, dtype=values.dtype)
        case = Case(torch.zeros(rows, 1, dtype=dtype), torch.zeros(rows, dtype=torch.int64), zeros, values.double())
        assert torch.equal(run_native(case).grad_logits.squeeze(1), values.to(dtype))


@pytest.mark.usefixtures("_variant")
@hypothesis.settings(
    max_examples=40, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(
    rows=st.integers(0, 9),
    vocabulary=st.integers(1, 2100),
    dtype=st.sampled_from(DTYPES),
    padding=st.integers(0, 20),
    masked=st.floats(0, 1),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0]),
    offset=st.sampled_from([0.0, 1e3, -1e4]),
    seed=st.integers(0, 2**31),
    entropy=st.booleans(),
)
def test_any_shape(
    rows: int,
    vocabulary: int,
    dtype: torch.dtype,
    padding: int,
    masked: float,
    scale: float,
    offset: float,
    seed: int,
    entropy: bool,
) -> None:
    case = make_case(
        rows,
        vocabulary,
        dtype,
        seed=seed,
        offset=offset,
        scale=scale,
        padding=padding,
        masked=masked,
        entropy=entropy,
    )
    assert_right(run_native(case), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_run_thread_count_and_batch(dtype: torch.dtype) -> None:
    case = make_case(37, 9001, dtype, entropy=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = run_native(case)
        for count in (1, 2, 5, 64):
            torch.set_num_threads(count)
            again = run_native(case)
            assert torch.equal(first.logprob, again.logprob)
            assert torch.equal(first.lse, again.lse)
            assert torch.equal(first.entropy, again.entropy)
            assert torch.equal(first.grad_logits, again.grad_logits)
    finally:
        torch.set_num_threads(threads)
    for row in (0, 1, 17, 36):
        part = slice(row, row + 1)
        # A copy, so that the row's address is another one too.
        alone = Case(
            case.logits[part].clone(),
            case.targets[part],
            case.grad_logprob[part],
            case.grad_lse[part],
            case.grad_entropy[part],
        )
        outcome = run_native(alone)
        assert torch.equal(outcome.logprob, first.logprob[part])
        assert torch.equal(outcome.grad_logits, first.grad_logits[part])


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("target", [-1, 10, 2**40, -101])
def test_target_outside_the_vocabulary_is_an_error(backend: str, target: int) -> None:
    with pytest.raises(ConfigError, match=rf"targets\[1\] = {target}"):
        ops.token_logprobs(torch.zeros(3, 10), torch.tensor([0, target, 2]), backend=backend)


def test_the_library_checks_targets_too() -> None:
    case = Case(torch.zeros(1, 4), torch.tensor([4]), torch.zeros(1), torch.zeros(1).double())
    with pytest.raises(Exception, match=r"targets\[0\] is 4, outside \[0, 4\)"):
        run_native(case)


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(6, dtype=torch.int64), r"\[rows, vocabulary\]"),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), r"\[rows, vocabulary\]"),
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int32), "int32 targets"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), "int64 logits"),
        (torch.zeros(2, 3, device="meta"), torch.zeros(2, dtype=torch.int64), "one device"),
    ],
)
def test_arguments_that_do_not_fit(logits: torch.Tensor, targets: torch.Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ops.token_logprobs(logits, targets)


def test_columns_that_are_not_contiguous() -> None:
    case = make_case(6, 40, torch.float32)
    transposed = case.logits.t().contiguous().t()
    assert transposed.stride() == (1, 6)
    expected = ops.token_logprobs(case.logits, case.targets, backend="native")
    actual = ops.token_logprobs(transposed, case.targets, backend="native")
    assert torch.equal(actual.logprob, expected.logprob)


@pytest.mark.slow
def test_offsets_past_two_to_the_31() -> None:
    # Three rows, 2^30 elements apart: the last starts at 2^31. The pages in between are never touched.
    stride, vocabulary = 2**30, 8
    storage = torch.empty(2 * stride + vocabulary, dtype=torch.bfloat16)
    logits = storage.as_strided((3, vocabulary), (stride, 1))
    logits.copy_(torch.arange(3 * vocabulary).view(3, vocabulary))
    targets = torch.tensor([0, 3, 7])
    expected = torch.log_softmax(logits.clone().float(), 1).gather(1, targets.unsqueeze(1)).squeeze(1)
    assert torch.allclose(ops.token_logprobs(logits, targets, backend="native").logprob, expected)
