"""precondition_accumulate against the reference in float64, on every instruction set that this machine runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from entropy_fast import _native, ops, reference
from entropy_fast.errors import ConfigError
from entropy_fast.ops.accumulation_table import CHUNK

VARIANTS = _native.supported_variants()
# Gradients and second moments: the five kinds of csrc/precondition_accumulate.h.
KINDS = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float64, torch.float64),
)


@dataclasses.dataclass
class Call:
    x: list[Tensor]
    g: list[Tensor]
    v: list[Tensor | None]
    X_sum: list[Tensor]
    Y_sum: list[Tensor]
    bias_correction: list[float]
    eps: list[float]
    ratio: list[float]

    def lists(self) -> tuple[list[Tensor], list[Tensor], list[Tensor | None], list[Tensor], list[Tensor]]:
        return self.x, self.g, self.v, self.X_sum, self.Y_sum

    def factors(self) -> dict[str, list[float]]:
        return {"bias_correction": self.bias_correction, "eps": self.eps, "ratio": self.ratio}

    def copy(self, dtype: torch.dtype | None = None) -> Call:
        def copies(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
            return [None if t is None else t.to(dtype or t.dtype, copy=True) for t in tensors]

        return Call(*map(copies, self.lists()), *self.factors().values())


def make_call(sizes: Sequence[int], kinds: Sequence[tuple[torch.dtype, torch.dtype]], seed: int = 0) -> Call:
    """Tensors of these sizes, their kinds taken in turn; every fifth without second moment, some v exactly 0, some tiny."""
    generator = torch.Generator().manual_seed(seed)

    def random(size: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    call = Call([], [], [], [], [], [], [], [])
    for index, size in enumerate(sizes):
        gradient, moment = kinds[index % len(kinds)]
        wide = torch.promote_types(gradient, torch.float32)
        v = random(size, moment).square() * 1e-4
        v[torch.rand(size, generator=generator) < 0.1] = 0
        v[torch.rand(size, generator=generator) < 0.1] *= 1e-16
        call.x.append(random(size, gradient))
        call.g.append(random(size, gradient))
        call.v.append(None if index % 5 == 4 else v)
        call.X_sum.append(random(size, wide) * 3)
        call.Y_sum.append(random(size, wide) * 100)
        call.bias_correction.append(1 / (1 - 0.999 ** (index + 1)))
        call.eps.append((1e-8, 1e-6)[index % 2])
        call.ratio.append((1.0, 0.5, 0.0)[index % 3])
    return call


def assert_same(call: Call, backend: str = "native", **options: object) -> Tensor:
    """Run a copy of the call and the reference in float64; elements and dots must agree. Returns the dots."""
    fast, truth, eager = call.copy(), call.copy(torch.float64), call.copy()
    dots = ops.precondition_accumulate(*fast.lists(), **fast.factors(), **options, backend=backend)
    expected = reference.precondition_accumulate(*truth.lists(), **truth.factors(), **options)
    same_dtype = reference.precondition_accumulate(*eager.lists(), **eager.factors(), **options)
    # With absolute values throughout: the size of what is added up, in the sums and in the dots.
    sizes = Call(
        *([None if t is None else t.double().abs() for t in part] for part in call.lists()), *call.factors().values()
    )
    magnitude = reference.precondition_accumulate(*sizes.lists(), **sizes.factors(), **options)
    for index in range(len(call.x)):
        for found, exact, plain, size in zip(
            *((part.X_sum[index], part.Y_sum[index]) for part in (fast, truth, eager, sizes)), strict=True
        ):
            allowed = 2 * (plain.double() - exact).abs() + 4 * torch.finfo(found.dtype).eps * size
            assert ((found.double() - exact).abs() <= allowed).all(), f"tensor {index}"
    # The y of a dot is rounded to the dtype of the sums: a few units in the last place of every product.
    eps = torch.tensor([torch.finfo(total.dtype).eps for total in call.X_sum], dtype=torch.float64).unsqueeze(1)
    error, allowed = (dots - expected).abs(), 2 * (same_dtype - expected).abs() + 4 * eps * magnitude
    assert (error <= allowed).all(), (error - allowed).max()
    return dots


@pytest.fixture(params=VARIANTS)
def _variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENTROPY_FAST_ISA", request.param)


@pytest.mark.usefixtures("_variant")
class TestAgainstTheReference:
    @pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}")
    def test_sizes_around_a_vector_and_a_chunk(self, kind: tuple[torch.dtype, torch.dtype]) -> None:
        sizes = [0, 1, 3, 15, 16, 17, 33, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]
        assert_same(make_call(sizes, [kind]))

    def test_all_kinds_in_one_call(self) -> None:
        assert_same(make_call([100, 0, 9000, 7, 20000, 1, 513, 64, 8192, 31], KINDS), x_scale=0.25, g_scale=8.0)

    def test_without_update_the_sums_stay(self) -> None:
        call = make_call([100, 9000, 7], KINDS)
        before = call.copy()
        dots = assert_same(call, update=False)
        after = call.copy()
        again = ops.precondition_accumulate(*after.lists(), **after.factors(), update=False, backend="native")
        assert torch.equal(dots, again)
        for kept, total in zip(before.X_sum + before.Y_sum, after.X_sum + after.Y_sum, strict=True):
            assert torch.equal(kept, total)

    def test_addresses_that_are_not_aligned(self) -> None:
        call = make_call([1000, 5000], [KINDS[0], KINDS[1]])
        for tensors in call.lists():
            for index, tensor in enumerate(tensors):
                tensors[index] = torch.cat([tensor.new_zeros(1), tensor])[1:]
        fast, expected = call.copy(), call.copy()
        dots = ops.precondition_accumulate(*call.lists(), **call.factors(), backend="native")
        reference.precondition_accumulate(*expected.lists(), **expected.factors())
        ops.precondition_accumulate(*fast.lists(), **fast.factors(), backend="native")
        assert all(torch.equal(a, b) for a, b in zip(call.X_sum + call.Y_sum, fast.X_sum + fast.Y_sum, strict=True))
        assert dots.isfinite().all()


def test_elements_without_second_moment_stay_out_of_y() -> None:
    x, g = [torch.ones(20)], [torch.full((20,), 2.0)]
    v = torch.ones(20)
    v[5:] = 0
    for moment, expected in ((v, 5 * 2.0), (None, 0.0)):
        X_sum, Y_sum = [torch.zeros(20)], [torch.zeros(20)]
        dots = ops.precondition_accumulate(x, g, [moment], X_sum, Y_sum, bias_correction=[1.0], eps=[0.0])
        assert dots[0].tolist() == [expected, 0.0, 0.0]
        assert X_sum[0].sum() == 20


def test_a_bad_number_is_not_hidden() -> None:
    call = make_call([40, 40], [KINDS[0]])
    call.g[0][3], call.v[0][3], call.v[1][7] = float("nan"), 0.0, float("nan")
    dots = ops.precondition_accumulate(*call.lists(), **call.factors(), backend="native")
    assert dots[:, 0].isnan().all()
    assert [total.isnan().nonzero().flatten().tolist() for total in call.Y_sum] == [[3], [7]]


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_sum_of_dots_is_the_product_of_sums(backend: str) -> None:
    """⟨ΣX, ΣY⟩ - Σ⟨x_i, y_i⟩ = Σ_j (⟨x_j, Y_<j⟩ + ⟨y_j, X_<j⟩), which holds for dots taken before the update only."""
    steps = [make_call([300, 9000], [KINDS[4]], seed=seed) for seed in range(6)]
    X_sum, Y_sum = ([torch.zeros(300).double(), torch.zeros(9000).double()] for _ in range(2))
    diagonal = earlier = 0.0
    for step in steps:
        factors = steps[0].factors()
        dots = ops.precondition_accumulate(step.x, step.g, steps[0].v, X_sum, Y_sum, **factors, backend=backend)
        diagonal += float(dots[:, 0].sum())
        earlier += float(dots[:, 1:].sum())
    product = sum(float(a @ b) for a, b in zip(X_sum, Y_sum, strict=True))
    assert earlier == pytest.approx(product - diagonal, rel=1e-12)
    assert abs(earlier) > 1


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    sizes=st.lists(st.integers(0, 20000), max_size=6),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=5),
    update=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_list(sizes: list[int], kinds: list[tuple[torch.dtype, torch.dtype]], update: bool, seed: int) -> None:
    assert_same(make_call(sizes, kinds, seed), update=update)


def test_same_bits_for_any_run_and_thread_count() -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 1, 2, 7):
            torch.set_num_threads(count)
            call = make_call([100_000, 17, 30_000], KINDS)
            dots = ops.precondition_accumulate(*call.lists(), **call.factors(), backend="native")
            results.append([dots, *call.X_sum, *call.Y_sum])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradients_that_are_not_contiguous_and_moments_of_another_dtype() -> None:
    x, g = torch.randn(30, 20), torch.randn(30, 20)
    v = torch.rand(30, 20)
    results = []
    for arguments in ((x, g, v), (x.t().contiguous().t(), g.t().contiguous().t(), v.double())):
        sums = [torch.zeros(30, 20)], [torch.zeros(30, 20)]
        ops.precondition_accumulate(
            *([a] for a in arguments), *sums, bias_correction=[1.0], eps=[1e-8], backend="native"
        )
        results.append(sums[1][0])
    assert torch.equal(*results)


def test_opcheck_and_compilation() -> None:
    call = make_call([5, 70], [KINDS[0]])
    arguments = (*call.lists(), *call.factors().values(), 1.0, 1.0, True, "native")
    torch.library.opcheck(torch.ops.entropy_fast.precondition_accumulate.default, arguments)
    eager, compiled = call.copy(), call.copy()

    def step(part: Call) -> Tensor:
        return ops.precondition_accumulate(*part.lists(), **part.factors(), backend="native").sum(0)

    expected = step(eager)
    assert torch.equal(torch.compile(step, backend="aot_eager", fullgraph=True)(compiled), expected)
    assert all(torch.equal(a, b) for a, b in zip(eager.Y_sum, compiled.Y_sum, strict=True))


def test_a_graph_break_around_the_op() -> None:
    """Then the op runs eagerly while the compiler looks on; it must not look inside."""
    eager, compiled = (make_call([5, 70], [KINDS[0]]) for _ in range(2))

    def step(part: Call) -> Tensor:
        torch._dynamo.graph_break()
        dots = ops.precondition_accumulate(*part.lists(), **part.factors(), backend="native")
        torch._dynamo.graph_break()
        return dots.sum(0)

    assert torch.equal(torch.compile(step, backend="aot_eager")(compiled), step(eager))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [torch.zeros(4)] * 2}, r"lists of \[2, 1"),
        ({"x": [torch.zeros(5)]}, "tensor 0: got torch.float32"),
        ({"X_sum": [torch.zeros(4, dtype=torch.bfloat16)]}, "contiguous sums in torch.float32"),
        ({"X_sum": [torch.zeros(8)[::2]]}, "contiguous sums"),
        ({"g": [torch.zeros(4, dtype=torch.bfloat16)]}, "one floating dtype"),
        ({"v": [torch.zeros(4, device="meta")]}, "one device"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, list[Tensor]], message: str) -> None:
    tensors = {name: [torch.zeros(4)] for name in ("x", "g", "v", "X_sum", "Y_sum")}
    with pytest.raises(ConfigError, match=message):
        ops.precondition_accumulate(**{**tensors, **change}, bias_correction=[1.0], eps=[1e-8])


def test_one_sum_given_twice() -> None:
    total = torch.zeros(4)
    for pair in ((total, total), (total[:3], total[1:])):
        same = [torch.ones_like(pair[0])]
        with pytest.raises(ConfigError, match="share memory"):
            ops.precondition_accumulate(same, same, same, [pair[0]], [pair[1]], bias_correction=[1.0], eps=[1e-8])
