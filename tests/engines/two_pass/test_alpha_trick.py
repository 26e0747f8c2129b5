"""All projections from one double backward agree with one backward a prompt, or the failure is explained."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from probe_models.architectures import BUILDERS, add_lora, build_model, enable_checkpointing, quantize_nf4
from probe_models.batches import make_rollouts
from probe_models.cases import Case, case_of, components_of, lora_case, mute_adapters
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from entropy_fast import DeltaH1Result
from entropy_fast.columns.coefficients import Coefficients, ColumnWeights
from entropy_fast.engines.two_pass import alpha_trick
from entropy_fast.engines.two_pass.alpha_trick import alpha_projections
from entropy_fast.errors import CheckpointingError, GradientCoverageError, GraphDetachedError
from entropy_fast.ways.teacher_forcing import ForwardResult


def both_routes(case: Case, **options: Any) -> tuple[DeltaH1Result, DeltaH1Result]:
    entropy = make_rollouts((2, 3, 2, 2), seed=11)
    return (
        case.probe(conditional_variance="per_prompt", **options).run_mixed_probe(
            entropy_rollouts=entropy, update_rollouts=case.rollouts
        ),
        case.probe(conditional_variance="alpha", **options).run_mixed_probe(
            entropy_rollouts=entropy, update_rollouts=case.rollouts
        ),
    )


def assert_agree(one: DeltaH1Result, other: DeltaH1Result, tolerance: float = 2e-5) -> None:
    scale = float(one.row_sums.abs().max())
    torch.testing.assert_close(other.row_sums, one.row_sums, rtol=0, atol=tolerance * scale)
    assert other.std_error == pytest.approx(one.std_error, rel=10 * tolerance)
    assert other.delta_h1 == one.delta_h1


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("size", [1, 3])
def test_agrees_with_one_backward_a_prompt(family: str, size: int) -> None:
    assert_agree(*both_routes(lora_case(family), prompts_per_microbatch=size))


def test_agrees_for_full_fine_tuning_and_for_fp64() -> None:
    assert_agree(*both_routes(case_of(build_model("gpt2"))))
    assert_agree(*both_routes(case_of(build_model("gpt2", dtype=torch.float64))), tolerance=1e-11)


def test_agrees_over_a_4_bit_base() -> None:
    assert_agree(*both_routes(case_of(add_lora(quantize_nf4(build_model())))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_agrees_in_bf16_to_bf16(dtype: torch.dtype | None) -> None:
    """bf16 weights, and bf16 autocast; the second derivative rounds on its own."""
    model = build_model(dtype=dtype or torch.float32)
    options = {} if dtype else {"autocast_dtype": torch.bfloat16}
    one, other = both_routes(case_of(add_lora(model)), **options)
    assert float((one.row_sums - other.row_sums).norm() / one.row_sums.norm()) < 0.1


def test_runs_through_non_reentrant_checkpointing() -> None:
    plain = both_routes(lora_case())[0]
    case = lora_case()
    enable_checkpointing(case.model, reentrant=False)
    assert_agree(*both_routes(case))
    torch.testing.assert_close(both_routes(case)[1].row_sums, plain.row_sums, rtol=1e-4, atol=1e-4)


def test_refuses_reentrant_checkpointing_and_names_the_module() -> None:
    case = lora_case()
    enable_checkpointing(case.model, reentrant=True)
    with pytest.raises(CheckpointingError, match=r"'base_model.model.model'.*reentrant") as caught:
        both_routes(case)
    assert "per_prompt" in caught.value.fix
    assert '"use_reentrant": False' in caught.value.fix


def test_sdpa_needs_the_math_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it torch's fused CPU attention has no second derivative, and the message says what to do."""
    case = lora_case()
    assert case.model.config._attn_implementation == "sdpa"
    assert_agree(*both_routes(case))
    monkeypatch.setattr(alpha_trick, "twice_differentiable_attention", contextlib.nullcontext)
    with pytest.raises(GraphDetachedError, match="differentiated twice") as caught:
        both_routes(case)
    assert "per_prompt" in caught.value.fix


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return gradient * s * (1 + x * (1 - s))


class SilentlyOnce(torch.autograd.Function):
    """As kernels written by hand often are: the backward works on raw data, and autograd is not told."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return (gradient * s * (1 + x * (1 - s))).detach()


class Activation(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.function.apply(x)
        return result


@pytest.mark.parametrize("function", [OnceDifferentiable, SilentlyOnce])
@pytest.mark.parametrize("where", ["before_the_head", "in_every_block", "in_the_first_block"])
def test_an_operation_without_second_derivative_is_found_out(
    function: type[torch.autograd.Function], where: str
) -> None:
    case = lora_case()
    base = case.model.get_base_model()
    if where == "before_the_head":
        base.model.norm = nn.Sequential(base.model.norm, Activation(function))
    else:
        for layer in base.model.layers[: 1 if where == "in_the_first_block" else None]:
            layer.mlp.act_fn = Activation(function)
    entropy = make_rollouts((2, 2, 2), seed=11)
    case.probe().run_mixed_probe(entropy_rollouts=entropy, update_rollouts=case.rollouts)  # first derivatives are fine
    with pytest.raises(GraphDetachedError, match="alpha trick") as caught:
        case.probe(conditional_variance="alpha").run_mixed_probe(
            entropy_rollouts=entropy, update_rollouts=case.rollouts
        )
    assert "per_prompt" in caught.value.fix


def test_a_silent_operation_beside_the_trained_path_is_found_out() -> None:
    """No trained parameter sits inside the branch, so every gradient has a graph; only the sum tells."""
    case = lora_case("gpt2")
    for name, parameter in case.model.named_parameters():
        if "attn" not in name:
            parameter.requires_grad_(False)
    case = case_of(case.model)
    for block in case.model.get_base_model().transformer.h:
        block.mlp.act = Activation(SilentlyOnce)
    entropy = make_rollouts((2, 2, 2), seed=11)
    per_prompt = case.probe().run_mixed_probe(entropy_rollouts=entropy, update_rollouts=case.rollouts)
    assert per_prompt.diagnostics.coverage["entropy"].untouched == ()
    with pytest.raises(GraphDetachedError, match="they must agree"):
        case.probe(conditional_variance="alpha").run_mixed_probe(
            entropy_rollouts=entropy, update_rollouts=case.rollouts
        )


SIGNS = torch.tensor([0.5, -0.5]).double()
OPPOSITE = Coefficients(SIGNS[None], (ColumnWeights(SIGNS),))


def test_a_gradient_without_graph_among_others_is_counted() -> None:
    straight, behind = (
        torch.randn(3, 5, generator=torch.Generator().manual_seed(s)).requires_grad_(True) for s in (1, 2)
    )
    x = torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(3))
    logits = x @ straight + SilentlyOnce.apply(x @ behind)
    token = torch.log_softmax(logits, -1)[..., 0]
    forward = ForwardResult(token.sum(-1), token, torch.tensor([1, 1]), logits, torch.ones(2, 1).bool())
    y_mean = [torch.ones(3, 5), torch.ones(3, 5)]
    with pytest.raises(GraphDetachedError, match="carries no graph for 1 of 2 parameters"):
        alpha_projections(forward, OPPOSITE, torch.tensor([0, 0]), [straight, behind], y_mean, strict=False)


def toy(cut: str | None) -> tuple[ForwardResult, list[Tensor]]:
    """A forward of two sequences with the graph cut in a chosen place."""
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    x = torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(2)).requires_grad_(True)
    logits = x @ (weight.detach() if cut == "inside" else weight)
    scored = logits.detach() if cut == "between" else logits
    token = torch.log_softmax(scored, -1)[..., 0]
    if cut == "between":
        token = token + x.sum(-1)  # S has a graph all the same
    return ForwardResult(token.sum(-1), token, torch.tensor([1, 1]), logits, torch.ones(2, 1).bool()), [weight]


@pytest.mark.parametrize(("cut", "message"), [("inside", "there, so"), ("between", "missing or zero")])
def test_no_parameter_reached_says_whether_the_logits_are(cut: str, message: str) -> None:
    forward, parameters = toy(cut)
    prompt = torch.tensor([0, 0])
    with pytest.raises(GradientCoverageError, match=f"none of the 1 trainable.*logits is {message}"):
        alpha_projections(forward, OPPOSITE, prompt, parameters, [torch.ones(3, 5)], strict=False)
    whole, parameters = toy(None)
    assert alpha_projections(whole, OPPOSITE, prompt, parameters, [torch.ones(3, 5)], strict=False).n_with_gradient == 1


def test_no_parameter_reached_in_a_real_model() -> None:
    case = lora_case()
    case.model.enable_input_require_grads()
    components = components_of(case.probe())
    y_mean = [torch.ones_like(p) for p in components.context.registry.tensors]
    mute_adapters(case.model)
    with pytest.raises(GradientCoverageError, match="graph is cut inside the model"):
        components.compute_conditional_variance_over_E_alpha(case.rollouts, y_mean)


def test_strict_names_the_parameter_that_is_not_in_the_graph() -> None:
    model = add_lora(build_model())
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    case = case_of(model)
    y_mean = [torch.ones_like(p) for p in case.probe().context.registry.tensors]
    lenient = components_of(case.probe()).compute_conditional_variance_over_E_alpha(case.rollouts, y_mean)
    assert lenient.shape == (case.rollouts.n_prompts,)
    with pytest.raises(GraphDetachedError, match="not have been used in the graph"):
        components_of(case.probe(strict=True)).compute_conditional_variance_over_E_alpha(case.rollouts, y_mean)
