"""The op as torch sees it: schema, fake tensors, first and second derivatives, compilation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from logprob_cases import make_case
from torch import Tensor
from torch.autograd import forward_ad

from entropy_fast import ops
from entropy_fast.errors import ConfigError

TARGETS = torch.tensor([1, 2, -100, 4, 16])
BACKENDS = ("native", "reference")


def _logprobs(backend: str, **options: object) -> Callable[[Tensor], tuple[Tensor, ...]]:
    def function(logits: Tensor) -> tuple[Tensor, ...]:
        result = ops.token_logprobs(logits, TARGETS, backend=backend, **options)
        return tuple(part for part in result if part is not None)

    return function


def _linear(backend: str, want_entropy: bool, softcap: float | None = None) -> Callable[..., tuple[Tensor, ...]]:
    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        result = ops.linear_token_logprobs(
            hidden, weight, TARGETS, bias=bias, softcap=softcap, want_entropy=want_entropy, backend=backend
        )
        return tuple(part for part in result if part is not None)

    return function


def _linear_inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((5, 4), (17, 4), (17,))
    return [
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes
    ]


@pytest.mark.parametrize("want_entropy", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_first_and_second_derivatives(backend: str, want_entropy: bool) -> None:
    logits = torch.randn(5, 17, dtype=torch.float64, requires_grad=True)
    function = _logprobs(backend, want_entropy=want_entropy)
    assert torch.autograd.gradcheck(function, logits)
    assert torch.autograd.gradgradcheck(function, logits)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("want_entropy", [False, True])
def test_derivatives_of_the_linear_op(want_entropy: bool, softcap: float | None) -> None:
    function = _linear("native", want_entropy, softcap)
    assert torch.autograd.gradcheck(function, _linear_inputs())
    assert torch.autograd.gradgradcheck(function, _linear_inputs())


@pytest.mark.parametrize("trainable", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_of_some_inputs_alone(trainable: tuple[bool, ...]) -> None:
    found = []
    for backend in BACKENDS:
        inputs = [
            tensor.detach().requires_grad_(wanted) for tensor, wanted in zip(_linear_inputs(), trainable, strict=True)
        ]
        sum(part.square().sum() for part in _linear(backend, True)(*inputs)).backward()
        assert [tensor.grad is not None for tensor in inputs] == list(trainable)
        found.append(next(tensor.grad for tensor in inputs if tensor.grad is not None))
    torch.testing.assert_close(*found)


def test_tied_embeddings_receive_both_gradients() -> None:
    tokens = torch.tensor([3, 5, 5, 16, 0])
    found = []
    for backend in BACKENDS:
        weight = _linear_inputs()[1]
        hidden = torch.tanh(weight[tokens])
        ops.linear_token_logprobs(hidden, weight, TARGETS, backend=backend).logprob.sum().backward()
        found.append(weight.grad)
    torch.testing.assert_close(*found)


def test_the_alpha_trick_through_the_linear_op() -> None:
    """Two backwards, the second through the first's graph, as per-prompt projections are found."""
    found = []
    for backend in BACKENDS:
        hidden, weight, _ = _linear_inputs()
        alpha = torch.ones(5, dtype=torch.float64, requires_grad=True)
        projection = torch.linspace(-1, 1, 4, dtype=torch.float64, requires_grad=True)
        logprob = ops.linear_token_logprobs(hidden * projection, weight.detach(), TARGETS, backend=backend).logprob
        (first,) = torch.autograd.grad((alpha * logprob).sum(), projection, create_graph=True)
        found.append(torch.autograd.grad(first.sum(), alpha)[0])
    torch.testing.assert_close(*found)
    assert found[0].abs().max() > 0.01


@pytest.mark.parametrize("op", ["logits", "linear"])
def test_third_derivative_is_that_of_the_reference(op: str) -> None:
    results = []
    for backend in BACKENDS:
        inputs = _linear_inputs()
        x = inputs[1].detach().t().contiguous().repeat(2, 1)[:5].requires_grad_() if op == "logits" else inputs[0]
        y = (_logprobs(backend)(x) if op == "logits" else _linear(backend, True)(x, *inputs[1:]))[0].pow(2).sum()
        for _ in range(3):
            (x_grad,) = torch.autograd.grad(y, x, create_graph=True)
            y = x_grad.pow(2).sum()
        results.append(x_grad.detach())
    torch.testing.assert_close(*results)
    assert results[0].abs().max() > 0.1


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("want_entropy", [False, True])
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_opcheck(backend: str, want_entropy: bool, requires_grad: bool) -> None:
    logits = torch.randn(5, 17, requires_grad=requires_grad)
    namespace = torch.ops.entropy_fast
    torch.library.opcheck(namespace.token_logprobs.default, (logits, TARGETS, want_entropy, -100, False, backend))
    saved = [
        None if part is None else part.detach().requires_grad_(requires_grad)
        for part in namespace.token_logprobs(logits, TARGETS, want_entropy)[1:]
    ]
    grad_logprob = torch.randn(5, requires_grad=requires_grad)
    others = [torch.randn(5, dtype=torch.float64, requires_grad=requires_grad) for _ in range(2)]
    grads = (grad_logprob, others[0], others[1] if want_entropy else None)
    arguments = (*grads, logits, TARGETS, *saved, -100, backend)
    torch.library.opcheck(namespace.token_logprobs_backward.default, arguments)
    if not requires_grad:
        torch.library.opcheck(namespace.token_logprobs_backward_.default, arguments)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("want_entropy", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_the_linear_op(backend: str, want_entropy: bool, requires_grad: bool) -> None:
    namespace = torch.ops.entropy_fast
    hidden, weight, bias = (t.detach().requires_grad_(requires_grad) for t in _linear_inputs(torch.float32))
    for units in (False, True):
        arguments = (hidden, weight, TARGETS, bias, 3.0, want_entropy, units, -100, backend)
        if units or not requires_grad:
            torch.library.opcheck(namespace.linear_token_logprobs.default, arguments)
    result = [None if part is None else part.detach() for part in namespace.linear_token_logprobs(*arguments)]
    grads = (torch.ones(5), torch.ones(5).double(), torch.ones(5).double() if want_entropy else None)
    torch.library.opcheck(
        namespace.linear_token_logprobs_backward.default,
        (*grads, hidden, weight, bias, TARGETS, *result, 3.0, [True, True, True], -100, backend),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["logits", "linear"])
def test_compiles_without_a_graph_break(op: str, dtype: torch.dtype) -> None:
    def loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        if op == "linear":
            result = ops.linear_token_logprobs(x * 2, weight, targets, want_entropy=True)
        else:
            result = ops.token_logprobs(x * 2, targets, want_entropy=True)
        return result.logprob.sum() + result.entropy.sum()

    case = make_case(6, 33, dtype)
    eager, compiled = (case.logits.clone().requires_grad_() for _ in range(2))
    weight = torch.randn(40, 33).to(dtype)
    loss(eager, weight, case.targets).backward()
    torch.compile(loss, backend="aot_eager", fullgraph=True)(compiled, weight, case.targets).backward()
    assert torch.equal(eager.grad, compiled.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_one_output_alone(backend: str) -> None:
    logits = torch.randn(5, 17, requires_grad=True)
    result = ops.token_logprobs(logits, TARGETS, backend=backend)
    (gradient,) = torch.autograd.grad(result.lse.sum(), logits)
    expected = torch.softmax(logits.detach(), 1)
    expected[2] = 0
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_over_the_logits(backend: str) -> None:
    source = torch.randn(5, 17, requires_grad=True)
    expected = torch.autograd.grad(ops.token_logprobs(source * 1.0, TARGETS).logprob.sum(), source)[0]
    logits = source * 1.0
    loss = ops.token_logprobs(logits, TARGETS, overwrite_logits=True, backend=backend).logprob.sum()
    (gradient,) = torch.autograd.grad(loss, source, retain_graph=True)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(logits.detach(), expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, source)


def test_logits_that_someone_else_needs_are_not_lost_unnoticed() -> None:
    source = torch.randn(5, 17, requires_grad=True)
    logits = torch.tanh(source)  # its derivative is taken from its result
    loss = ops.token_logprobs(logits, TARGETS, overwrite_logits=True).logprob.sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_graph_of_the_backward_leaves_the_logits_alone() -> None:
    source = torch.randn(5, 17, requires_grad=True)
    logits = source * 1.0
    before = logits.detach().clone()
    loss = ops.token_logprobs(logits, TARGETS, overwrite_logits=True).logprob.pow(2).sum()
    (gradient,) = torch.autograd.grad(loss, source, create_graph=True)
    torch.autograd.grad(gradient.pow(2).sum(), source)
    assert torch.equal(logits.detach(), before)


@pytest.mark.parametrize("in_dims", [(0, 0), (1, None), (None, 1), (2, 0)])
@pytest.mark.parametrize("want_entropy", [False, True])
def test_vmap(want_entropy: bool, in_dims: tuple[int | None, int | None]) -> None:
    logits, targets = torch.randn(3, 5, 17), torch.randint(0, 17, (3, 5))
    arguments = (
        logits[0] if in_dims[0] is None else logits.movedim(0, in_dims[0]),
        targets[0] if in_dims[1] is None else targets.movedim(0, in_dims[1]),
    )

    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return tuple(part for part in ops.token_logprobs(x, y, want_entropy=want_entropy) if part is not None)

    found = torch.vmap(function, in_dims=in_dims)(*arguments)
    for index in range(3):
        x = logits[0] if in_dims[0] is None else logits[index]
        y = targets[0] if in_dims[1] is None else targets[index]
        for part, expected in zip(found, function(x, y), strict=True):
            assert torch.equal(part[index], expected)


def test_autocast_casts_hidden_states_as_linear_does() -> None:
    hidden, weight, _ = (tensor.detach() for tensor in _linear_inputs(torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ops.linear_token_logprobs(hidden, weight, TARGETS).logprob
        logits = torch.nn.functional.linear(hidden, weight)
    torch.testing.assert_close(found, ops.token_logprobs(logits, TARGETS).logprob, rtol=2e-2, atol=2e-2)
    assert torch.equal(found, ops.linear_token_logprobs(hidden.bfloat16(), weight.bfloat16(), TARGETS).logprob)


def test_logits_may_require_no_gradient() -> None:
    assert not ops.token_logprobs(torch.zeros(5, 17), TARGETS).logprob.requires_grad


@pytest.mark.parametrize("inputs", ["weight", "hidden", "both"])
def test_gradients_of_a_call_with_defaults_alone(inputs: str) -> None:
    """The dispatcher leaves out what has its default, also of what it says about needed gradients."""
    found = []
    for way in ("op", "plain"):
        hidden, weight, _ = (tensor.detach() for tensor in _linear_inputs())
        hidden.requires_grad_(inputs != "weight")
        weight.requires_grad_(inputs != "hidden")
        targets = torch.arange(5)
        if way == "op":
            loss = ops.linear_token_logprobs(hidden, weight, targets).logprob.sum()
        else:
            loss = torch.log_softmax(hidden @ weight.t(), 1).gather(1, targets[:, None]).sum()
        loss.backward()
        found.append([tensor.grad for tensor in (hidden, weight) if tensor.requires_grad])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_forward_mode_is_refused_and_not_taken_for_zero() -> None:
    hidden, weight, _ = (tensor.detach() for tensor in _linear_inputs())
    calls = {
        "token_logprobs": lambda x: ops.token_logprobs(x, TARGETS.clamp_min(0) % 4).logprob,
        "linear_token_logprobs": lambda x: ops.linear_token_logprobs(x, weight, TARGETS).logprob,
    }
    for name, call in calls.items():
        with pytest.raises(ConfigError, match=f"{name} got a tensor with a tangent"):
            torch.func.jvp(call, (hidden,), (torch.ones_like(hidden),))
        with forward_ad.dual_level(), pytest.raises(ConfigError, match=r"entropy_fast\.reference"):
            call(forward_ad.make_dual(hidden, torch.ones_like(hidden)))
        with forward_ad.dual_level():
            call(hidden)


@pytest.mark.parametrize("spread", [lambda x: x.expand(5, 17), lambda x: x.as_strided((5, 17), (1, 1))])
def test_rows_that_share_memory_are_not_overwritten(spread: Callable[[Tensor], Tensor]) -> None:
    gradients = []
    for overwrite in (False, True):
        source = torch.linspace(-1, 1, 21)[None].requires_grad_()
        logits = spread((source * 1.0)[:, :17] if spread(source[:, :17]).stride(0) == 0 else source * 1.0)
        ops.token_logprobs(logits, TARGETS, overwrite_logits=overwrite).logprob.sum().backward()
        gradients.append(source.grad)
    assert torch.equal(*gradients)


def test_autocast_leaves_float64_alone() -> None:
    hidden, weight, _ = (tensor.detach() for tensor in _linear_inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.linear_token_logprobs(hidden, weight, TARGETS).logprob.dtype == torch.float64
        narrow = ops.linear_token_logprobs_with_units(hidden.float(), weight.float(), TARGETS)
    expected = ops.linear_token_logprobs_with_units(hidden.bfloat16(), weight.bfloat16(), TARGETS)
    assert torch.equal(narrow.logprob, expected.logprob)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weight_gradients_of_16_bits_are_those_of_eager_code(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 64, generator=generator).to(dtype)
    weight = torch.randn(500, 64, generator=generator).to(dtype)
    targets = torch.randint(0, 500, (64,), generator=generator)
    errors = {}
    truth = weight.double().requires_grad_()
    torch.nn.functional.cross_entropy(hidden.double() @ truth.t(), targets, reduction="sum").backward()
    for way in ("op", "eager"):
        leaf = weight.clone().requires_grad_()
        if way == "op":
            (-ops.linear_token_logprobs(hidden, leaf, targets).logprob.sum()).backward()
        else:
            torch.nn.functional.cross_entropy((hidden @ leaf.t()).float(), targets, reduction="sum").backward()
        errors[way] = float((leaf.grad.double() - truth.grad).norm() / truth.grad.norm())
    assert errors["op"] <= 2 * errors["eager"]


@pytest.mark.parametrize("rows", [0, 5])
def test_a_vocabulary_of_nothing(rows: int) -> None:
    targets = torch.full((rows,), -100)
    if rows:
        with pytest.raises(ConfigError, match="a vocabulary of 0"):
            ops.token_logprobs(torch.zeros(rows, 0), targets)
    with pytest.raises(ConfigError, match="a vocabulary of 0"):
        ops.linear_token_logprobs(torch.zeros(rows, 3), torch.zeros(0, 3), targets)
