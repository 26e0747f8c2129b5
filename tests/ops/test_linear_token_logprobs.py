"""linear_token_logprobs in blocks against float64 truth, its gradients, its memory."""

from __future__ import annotations

import dataclasses

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from linear_cases import LinearCase, assert_right, certain_case, make_linear_case
from logprob_cases import DTYPES, IGNORE

from entropy_fast import _native, ops
from entropy_fast.errors import BackendUnavailableError, ConfigError
from entropy_fast.ops import blockwise

VARIANTS = _native.supported_variants()
# Around a block of the vocabulary: 4096 tokens of 32 bits, 2048 of 16 or 64.
VOCABULARIES = (1, 2, 17, 2047, 2048, 2049, 4095, 4096, 4097, 8193)


def run(case: LinearCase, **options: object) -> ops.LinearTokenLogprobs:
    arguments, own = case.arguments()
    return ops.linear_token_logprobs_with_units(
        *arguments, **{"want_entropy": True, "ignore_index": IGNORE, "backend": "native", **own, **options}
    )


@pytest.fixture(params=VARIANTS)
def _variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENTROPY_FAST_ISA", request.param)


@pytest.mark.usefixtures("_variant")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestAgainstTruth:
    @pytest.mark.parametrize("vocabulary", VOCABULARIES)
    def test_vocabulary_sizes(self, vocabulary: int, dtype: torch.dtype) -> None:
        case = make_linear_case(9, 20, vocabulary, dtype, seed=vocabulary)
        assert_right(run(case), case)
        assert_right(run(case, want_entropy=False), case)

    @pytest.mark.parametrize("softcap", [None, 4.0])
    @pytest.mark.parametrize("bias", [False, True])
    def test_bias_and_softcap(self, bias: bool, softcap: float | None, dtype: torch.dtype) -> None:
        case = make_linear_case(13, 33, 2500, dtype, bias=bias, softcap=softcap)
        assert_right(run(case), case)

    def test_nearly_certain_and_flat_rows(self, dtype: torch.dtype) -> None:
        case = certain_case(dtype)
        assert_right(run(case), case)

    @pytest.mark.parametrize("offset", [-130.0, -110.0, 1e4, -1e4])
    def test_far_from_zero(self, offset: float, dtype: torch.dtype) -> None:
        if abs(offset) > 1000 and dtype.itemsize == 2:
            # Skipped, not compared loosely: any answer would pass.
            pytest.skip("16-bit logits near 1e4 are more than 8 apart: there is nothing left to compare")
        case = make_linear_case(5, 8, 2100, dtype, masked=0, scale=1.0)
        hidden, weight = case.hidden.clone(), case.weight.clone()
        hidden[:, 0], weight[:, 0] = 1.0, offset
        case = dataclasses.replace(case, hidden=hidden, weight=weight)
        assert_right(run(case), case)

    def test_the_maximum_rises_through_every_block(self, dtype: torch.dtype) -> None:
        case = make_linear_case(6, 8, 20000, dtype, masked=0, scale=1.0)
        hidden, weight = case.hidden.clone(), case.weight.clone()
        weight[:, 0] = torch.linspace(-40, 40, 20000).to(dtype)
        hidden[:, 0] = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.1, 0.0]).to(dtype)
        case = dataclasses.replace(case, hidden=hidden, weight=weight)
        assert_right(run(case), case)

    def test_rows_that_are_not_finite(self, dtype: torch.dtype) -> None:
        # 2301 tokens: a partial block whose width is a multiple of nothing.
        case = make_linear_case(8, 6, 2301, dtype, masked=0)
        clean = run(case)
        hidden, weight = case.hidden.clone(), case.weight.clone()
        hidden[1, 0], hidden[3] = float("nan"), float("inf")
        broken = run(dataclasses.replace(case, hidden=hidden))
        others = [0, 2, 4, 5, 6, 7]
        for before, after in zip(clean, broken, strict=True):
            assert torch.equal(before[others], after[others])
        for part in (broken.logprob, broken.entropy, broken.unit_logprob, broken.unit_entropy):
            assert part[[1, 3]].isnan().all()
        # A token that can never come: its bias is -inf.
        bias = torch.zeros(2301, dtype=dtype)
        bias[7::3] = float("-inf")
        possible = ~bias.isinf()
        index = possible.cumsum(0) - 1
        targets = possible.nonzero().squeeze(1)[torch.arange(8) * 50]
        some = run(dataclasses.replace(case, bias=bias, targets=targets))
        few = dataclasses.replace(case, weight=weight[possible], targets=index[targets])
        assert_right(some, few)

    def test_a_first_block_that_can_never_come(self, dtype: torch.dtype) -> None:
        case = make_linear_case(5, 6, 4500, dtype, masked=0)
        bias = torch.zeros(4500, dtype=dtype)
        bias[:4200] = float("-inf")
        targets = torch.arange(4300, 4305)
        few = dataclasses.replace(case, weight=case.weight[4200:], targets=targets - 4200)
        assert_right(run(dataclasses.replace(case, bias=bias, targets=targets)), few)

    def test_no_rows_and_no_kept_rows(self, dtype: torch.dtype) -> None:
        empty = make_linear_case(0, 5, 30, dtype)
        assert [tuple(part.shape) for part in run(empty)] == [(0,), (0,), (0,), (0, 5), (0, 5)]
        case = dataclasses.replace(make_linear_case(4, 5, 30, dtype), targets=torch.full((4,), IGNORE))
        case.hidden.fill_(float("nan"))
        assert not any(part.any() for part in run(case))


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    rows=st.integers(0, 140),
    hidden_size=st.integers(1, 40),
    vocabulary=st.integers(1, 4600),
    dtype=st.sampled_from(DTYPES),
    masked=st.floats(0, 1),
    scale=st.sampled_from([0.0, 0.3, 3.0, 10.0]),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 7.0]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(
    rows: int,
    hidden_size: int,
    vocabulary: int,
    dtype: torch.dtype,
    masked: float,
    scale: float,
    bias: bool,
    softcap: float | None,
    seed: int,
) -> None:
    case = make_linear_case(
        rows, hidden_size, vocabulary, dtype, bias=bias, softcap=softcap, scale=scale, masked=masked, seed=seed
    )
    assert_right(run(case), case)


def test_layouts_of_hidden_states_and_weights() -> None:
    case = make_linear_case(12, 16, 700, torch.float32)
    expected = run(case)
    spread = torch.empty(12, 40)[:, 3:19].copy_(case.hidden)
    transposed = case.weight.t().contiguous().t()
    for hidden, weight in ((spread, case.weight), (case.hidden, transposed)):
        found = run(dataclasses.replace(case, hidden=hidden, weight=weight))
        torch.testing.assert_close(found.logprob, expected.logprob)
        torch.testing.assert_close(found.unit_entropy, expected.unit_entropy)


def test_weights_of_another_dtype_are_cast_block_by_block() -> None:
    case = make_linear_case(12, 16, 3000, torch.bfloat16)
    mixed = run(dataclasses.replace(case, weight=case.weight.float()))
    same = run(case)
    assert all(torch.equal(a, b) for a, b in zip(mixed, same, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_same_bits_for_any_run_and_batch(threads: int, dtype: torch.dtype) -> None:
    # Two blocks of the vocabulary and a part of one.
    case = make_linear_case(700, 48, {2: 4200, 4: 7000}[dtype.itemsize], dtype, masked=0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        first = run(case)
        for n in (700, 3, 130, 512):
            found = run(dataclasses.replace(case, hidden=case.hidden[-n:], targets=case.targets[-n:]))
            assert all(torch.equal(a[-n:], b) for a, b in zip(first, found, strict=True)), n
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(4, 6)}, r"hidden \(4, 6\), weight \(9, 5\)"),
        ({"weight": torch.zeros(9, 5, dtype=torch.int8)}, "quantised"),
        ({"bias": torch.zeros(8)}, r"bias \(8,\)"),
        ({"softcap": -1.0}, "softcap=-1.0"),
        ({"targets": torch.tensor([0, 9, 1, 2])}, r"targets\[1\] = 9"),
        ({"weight": torch.zeros(9, 5, device="meta")}, "cpu, meta"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, object], message: str) -> None:
    arguments = {"hidden": torch.zeros(4, 5), "weight": torch.zeros(9, 5), "targets": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(ConfigError, match=message):
        ops.linear_token_logprobs(**{**arguments, **change})


def test_a_backend_without_this_op() -> None:
    with pytest.raises(BackendUnavailableError, match="does not have this op"):
        ops.linear_token_logprobs(torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([0]), backend="cuda")


@pytest.mark.parametrize("trainable", [False, True])
def test_only_trainable_weights_get_a_buffer(trainable: bool) -> None:
    """Every allocation of the forward and the backward, largest first."""
    rows, hidden_size, vocabulary = 512, 64, 100_000
    hidden = torch.randn(rows, hidden_size, requires_grad=True)
    weight = torch.randn(vocabulary, hidden_size, requires_grad=trainable)
    targets = torch.randint(0, vocabulary, (rows,))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = ops.linear_token_logprobs(hidden, weight, targets, want_entropy=True, backend="native")
        (result.logprob.sum() + result.entropy.sum()).backward()
    largest = max((event.cpu_memory_usage for event in profile.events()), default=0)
    if trainable:
        assert largest >= weight.numel() * 4
    else:
        assert largest <= blockwise.WORKSPACE_BYTES < min(weight.numel(), rows * vocabulary) * 4
    assert hidden.grad is not None


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("hidden_size", [64, 576])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_depend_on_how_many_there_are(hidden_size: int, threads: int, dtype: torch.dtype) -> None:
    """BLAS libraries round otherwise for few rows."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(1400, hidden_size, generator=generator).to(dtype)
    weight = torch.randn(900, hidden_size, generator=generator).to(dtype)
    targets = torch.randint(0, 900, (1400,), generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = ops.linear_token_logprobs_with_units(hidden, weight, targets, backend="native")
        for rows in (1, 300, 513, 1249):
            few = ops.linear_token_logprobs_with_units(hidden[:rows], weight, targets[:rows], backend="native")
            assert torch.equal(few.logprob, whole.logprob[:rows])
            assert torch.equal(few.unit_logprob, whole.unit_logprob[:rows])
    finally:
        torch.set_num_threads(before)
