"""The forward-mode engine against the two-pass one, and against derivatives by definition."""

from __future__ import annotations

import copy
import json
import math

import peft
import pytest
import torch
from engine_results import TOLERANCE, distance
from engine_sums import median_error, ratio_of
from probe_models.architectures import (
    BUILDERS,
    ROPE_SHAPE,
    add_lora,
    build_model,
    disable_checkpointing,
    enable_checkpointing,
    quantize_nf4,
    stepped_adamw,
)
from probe_models.batches import Sample, make_rollouts, make_samples, pack
from probe_models.cases import case_of, components_of, mute_adapters
from probe_models.oracle import _preconditioner, kernel_by_definition
from probe_models.own_dtype import computing_in_own_dtype
from probe_options import options_of
from rich.console import Console
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from entropy_fast import DeltaH1Result, OfflineEntropyProbe, Rollouts, fast_delta_h1
from entropy_fast.engines.forward_mode.engine import ForwardModeEngine
from entropy_fast.errors import ConfigError, ForwardDerivativeError, GraphDetachedError, ModelStateError
from entropy_fast.report.terminal import print_result
from entropy_fast.run_folder.result_files import result_document
from entropy_fast.step import AdamState

GROUPS = (2, 3, 2, 4)


def two_batches(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | AdamState,
    *,
    seed: int = 1,
    batches: tuple[Rollouts, Rollouts] | None = None,
    engines: tuple[str, ...] = ("jvp", "two_pass"),
    **options: object,
) -> list[DeltaH1Result]:
    """One result an engine, on the same entropy and update batch."""
    entropy, update = batches or (make_rollouts(GROUPS, seed=seed), make_rollouts((3, 2, 2), seed=seed + 50))
    config = dict(**{"prompts_per_microbatch": 2, **options})
    return [
        fast_delta_h1(model, optimizer, update, entropy_rollouts=entropy, **options_of(engine=engine, **config))
        for engine in engines
    ]


def assert_same(found: DeltaH1Result, expected: DeltaH1Result, tolerance: float) -> None:
    assert (found.engine, found.estimate) == ("jvp", "two_batch")
    assert distance(found.row_sums, expected.row_sums) < tolerance
    size = float(expected.row_sums.norm())
    assert abs(found.x_dot_y - expected.x_dot_y) < tolerance * math.sqrt(len(expected.row_sums)) * size
    assert found.std_error == pytest.approx(expected.std_error, rel=10 * tolerance)
    for side in ("entropy", "update"):
        one, other = (r.sequences[side] for r in (found, expected))
        for left, right in (
            (one.sequence_logprobs, other.sequence_logprobs),
            (one.coefficients[side], other.coefficients[side]),
        ):
            torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)
    assert found.diagnostics.excluded == expected.diagnostics.excluded
    assert found.diagnostics.coverage["update"] == expected.diagnostics.coverage["update"]
    entropy_shares = [p for p in expected.per_prompt if p.role == "entropy"]
    for one, other in zip(found.per_prompt, entropy_shares, strict=True):
        assert (one.group_ids, one.role) == (other.group_ids, "entropy")
        assert abs(one.delta_h1 - other.delta_h1) <= tolerance * size * found.learning_rate
    assert found.derivatives is not None
    assert float(found.derivatives.sequence_shares.sum()) == pytest.approx(found.delta_h1, rel=1e-6)
    torch.testing.assert_close(
        found.derivatives.token_shares.sum(1), found.derivatives.sequence_shares, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("checkpointing", ["off", "on", "reentrant"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", BUILDERS)
def test_every_family(family: str, adapter: bool, checkpointing: str) -> None:
    # In fp64, transformers' eager attention, which is all that gemma2 has, gives NaN to rows that only see padding.
    dtype = torch.float32 if family == "gemma2" else torch.float64
    model = build_model(family, dtype=dtype)
    if adapter:
        model = add_lora(model).to(dtype)
    optimizer = stepped_adamw(model)
    if checkpointing != "off":
        enable_checkpointing(model, reentrant=checkpointing == "reentrant")
    try:
        found, expected = two_batches(model, optimizer)
    finally:
        disable_checkpointing(model)
    assert_same(found, expected, TOLERANCE.get(family, 1e-10))
    kind = "frozen output layer" if adapter else "trained output layer"
    assert kind in str(found.plan)


@pytest.mark.parametrize("weighting", ["dr_grpo", "per_token", "sequence"])
@pytest.mark.parametrize("microbatch", [1, 3, 10])
def test_weightings_and_microbatches(weighting: str, microbatch: int) -> None:
    model = add_lora(build_model("gpt2", dtype=torch.float64)).double()
    options = {"weighting": weighting, "prompts_per_microbatch": microbatch, "accumulate_on": "cpu"}
    assert_same(*two_batches(model, stepped_adamw(model), **options), 1e-10)


def derivatives_by_definition(
    model: nn.Module, optimizer: torch.optim.Optimizer, entropy: list[Sample], update: list[Sample]
) -> dict[Sample, list[float]]:
    """∇s_t · Ȳ of every response token, by one ``torch.autograd.grad`` a token of an unpadded sequence."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    g = kernel_by_definition(model, optimizer, update).g_gradients
    y_mean = [
        _preconditioner(optimizer, p) * torch.stack([prompt[i] for prompt in g]).mean(0)
        for i, p in enumerate(parameters)
    ]
    found = {}
    for sample in entropy:
        ids = torch.tensor([[*sample.prompt, *sample.response]])
        logprobs = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0].log_softmax(-1)
        start = len(sample.prompt)
        found[sample] = []
        for t, token in enumerate(sample.response):
            taken = torch.autograd.grad(
                logprobs[start - 1 + t, token], parameters, retain_graph=True, allow_unused=True
            )
            products = [float((a * b).sum()) for a, b in zip(taken, y_mean, strict=True) if a is not None]
            found[sample].append(sum(products))
    return found


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_every_token_against_its_gradient(adapter: bool) -> None:
    model = build_model("gpt2", dtype=torch.float64)
    model = add_lora(model).double() if adapter else model
    optimizer = stepped_adamw(model)
    entropy, update = make_samples(GROUPS, seed=3), make_samples((2, 2, 3), seed=4)
    expected = derivatives_by_definition(model, optimizer, entropy, update)
    batch = pack(entropy)
    (result,) = two_batches(model, optimizer, batches=(batch, pack(update)), engines=("jvp",))
    assert result.derivatives is not None
    tokens = result.derivatives.tokens
    assert tokens.shape == batch.input_ids.shape
    assert not tokens[batch.loss_mask == 0].any()
    for row, sample in enumerate(entropy):
        own = torch.tensor(expected[sample], dtype=torch.float64)
        torch.testing.assert_close(tokens[row][batch.loss_mask[row] == 1], own, rtol=1e-9, atol=1e-9)
        assert float(result.derivatives.sequences[row]) == pytest.approx(float(own.sum()), rel=1e-9, abs=1e-9)


def test_derivatives_predict_what_a_small_step_does() -> None:
    """Log-probs before and after the parameters really move by h · Ȳ: central differences in fp64."""
    model = add_lora(build_model("gpt2", dtype=torch.float64)).double()
    optimizer = stepped_adamw(model)
    entropy, update = make_rollouts(GROUPS, seed=1), make_rollouts((3, 2, 2), seed=51)
    (result,) = two_batches(model, optimizer, batches=(entropy, update), engines=("jvp",))
    components = components_of(OfflineEntropyProbe(model, optimizer, **options_of()))
    y_sum = components.accumulate_sum_Y(update).tensors
    step, values = 1e-6, []
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        for parameter, y in zip([p for p in moved.parameters() if p.requires_grad], y_sum, strict=True):
            parameter.data.add_(y, alpha=sign * step / update.n_prompts)
        probe = OfflineEntropyProbe(moved, AdamState.from_optimizer(optimizer, model), **options_of(engine="two_pass"))
        values.append(probe.compute_delta_h1(entropy).sequences["entropy"].sequence_logprobs)
    assert result.derivatives is not None
    torch.testing.assert_close((values[0] - values[1]) / (2 * step), result.derivatives.sequences, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_the_padding_token_inside_a_response(adapter: bool) -> None:
    """A tied embedding whose padding row is trained by the output layer alone, and sequences that end with that token."""
    model = build_model("llama", dtype=torch.float64)
    if adapter:
        model = add_lora(model).double()
        for parameter in model.get_input_embeddings().parameters():
            parameter.requires_grad_(True)
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    assert model.get_input_embeddings().padding_idx == 0
    samples = [
        Sample(s.group, s.prompt, (*s.response[:-1], 0, *s.response[-1:]), s.advantage) for s in make_samples(GROUPS)
    ]
    optimizer = stepped_adamw(model)
    with computing_in_own_dtype(model):
        found, expected = two_batches(model, optimizer, batches=(pack(samples), make_rollouts((3, 2), seed=2)))
    assert_same(found, expected, 1e-10)


def test_nf4() -> None:
    model = add_lora(quantize_nf4(build_model("qwen2")))
    found, expected = two_batches(model, stepped_adamw(model))
    assert_same(found, expected, 1e-4)


@pytest.mark.parametrize(
    ("family", "adapter"),
    [
        ("qwen2", True),
        pytest.param("gpt2", True, marks=pytest.mark.exhaustive),
        pytest.param("qwen2", False, marks=pytest.mark.exhaustive),
    ],
)
def test_bfloat16_autocast_is_no_worse_than_the_two_pass_engine(family: str, adapter: bool) -> None:
    """Against fp64 of the same weights, over 96 prompts.

    For engines that round alike, the logarithm of the ratio of median errors is of mean 0 and spreads by less than 0.6 over
    batches of eight prompts: 3 for twelve of them is more than six standard errors away, once in 10^9 runs.
    """
    model = build_model(family)
    model = add_lora(model) if adapter else model
    state = AdamState.from_optimizer(stepped_adamw(model), model)
    truth = copy.deepcopy(model).double()
    errors: dict[str, list[float]] = {"jvp": [], "two_pass": []}
    for seed in range(12):
        batches = (make_rollouts(2 * GROUPS, seed=seed), make_rollouts((3, 2, 2), seed=seed + 50))
        (exact,) = two_batches(truth, state, batches=batches, engines=("two_pass",))
        found = two_batches(model, state, batches=batches, autocast_dtype=torch.bfloat16)
        for own, result in zip(errors.values(), found, strict=True):
            own.append(median_error(result.row_sums, exact.row_sums))
    assert ratio_of(errors) <= 3, errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_16_bits(dtype: torch.dtype) -> None:
    model = add_lora(build_model("qwen2", dtype=dtype)).to(dtype)
    found, expected = two_batches(model, stepped_adamw(model))
    assert distance(found.row_sums, expected.row_sums) < 0.05


def test_the_model_s_own_logits_where_the_output_layer_is_of_another_kind() -> None:
    model = build_model("gpt2", dtype=torch.float64)
    model.lm_head.register_forward_hook(lambda _m, _i, out: 0.7 * out + out.tanh())
    found, expected = two_batches(model, stepped_adamw(model))
    assert_same(found, expected, 1e-10)
    assert "the model's own logits" in str(found.plan)


ADAPTERS: dict[str, dict[str, object]] = {
    "weight decomposed": {"use_dora": True, "target_modules": ["q_proj"]},
    "on the output layer": {"target_modules": ["lm_head"]},
    "on the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "with a trained copy of the output layer": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_other_adapters(kind: str) -> None:
    base = build_model("qwen2", dtype=torch.float64)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **ADAPTERS[kind])).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(3))
    samples = [Sample(s.group, s.prompt, (*s.response, 0, 5), s.advantage) for s in make_samples(GROUPS)]
    update = make_rollouts((3, 2), seed=2)
    with computing_in_own_dtype(model):
        found, expected = two_batches(model, stepped_adamw(model), batches=(pack(samples), update))
    assert_same(found, expected, 1e-10)
    assert ("the model's own logits" in str(found.plan)) == ("output layer" in kind)


def test_several_adapters_at_once() -> None:
    model = add_lora(build_model("gpt2", dtype=torch.float64))
    model.add_adapter("second", peft.LoraConfig(r=3, use_rslora=True, target_modules=["c_fc"], fan_in_fan_out=True))
    model.base_model.set_adapter(["default", "second"])
    model.double()
    assert_same(*two_batches(model, stepped_adamw(model)), 1e-10)


def test_experts() -> None:
    """Whose fast path has no forward derivative, and whose plain one has."""
    shape = {**ROPE_SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    fast = MixtralForCausalLM(MixtralConfig(**shape, experts_implementation="grouped_mm"))
    plain = MixtralForCausalLM(MixtralConfig(**shape, experts_implementation="eager"))
    with pytest.raises(ForwardDerivativeError, match="_grouped_mm has no forward derivative") as caught:
        two_batches(fast, stepped_adamw(fast), engines=("jvp",))
    assert "experts_implementation='eager'" in caught.value.fix
    with computing_in_own_dtype(plain):
        found, expected = two_batches(plain.double(), stepped_adamw(plain))
    assert_same(found, expected, TOLERANCE["mistral"])  # the router's softmax stays in fp32


def test_coefficients_that_are_all_zero() -> None:
    model = add_lora(build_model("gpt2", dtype=torch.float64)).double()
    optimizer = stepped_adamw(model)
    samples = [Sample(s.group, s.prompt, s.response, 0.0) for s in make_samples((2, 2), seed=8)]
    (result,) = two_batches(model, optimizer, batches=(make_rollouts(GROUPS), pack(samples)), engines=("jvp",))
    assert result.delta_h1 == 0
    assert any("update is exactly 0" in note for note in result.diagnostics.warnings)
    # Logits of 0, with their derivatives: every log-prob is -log V to the bit, in whatever order a row is added up.
    model.get_output_embeddings().register_forward_hook(lambda _m, _i, out: out - out.detach())
    same = [Sample(s.group, s.prompt, (3, 4, 5), s.advantage) for s in make_samples((2, 2, 2))]
    (result,) = two_batches(model, optimizer, batches=(pack(same), make_rollouts((2, 2), seed=8)), engines=("jvp",))
    assert result.delta_h1 == 0
    assert result.derivatives is not None and bool((result.derivatives.sequences != 0).all())
    assert any("entropy gradient is exactly 0" in note for note in result.diagnostics.warnings)


def test_what_is_not_known_is_said() -> None:
    model = add_lora(build_model("gpt2"))
    (result,) = two_batches(model, stepped_adamw(model), engines=("jvp",))
    assert result.column_sums is None
    assert {p.role for p in result.per_prompt} == {"entropy"}
    assert [(e.name, math.isnan(e.value)) for e in result.diagnostics.standard_errors] == [
        ("conditional_on_update", False),
        ("v_x_plus_v_y", True),
    ]
    x = result.diagnostics.coverage["entropy"]
    assert (x.norm, x.one_prompt, x.n_with_gradient) == (None, True, x.n_trainable)
    notes = " ".join(result.diagnostics.warnings)
    assert "does not form X_sum" in notes
    with pytest.raises(ConfigError, match="'alpha', and engine 'jvp' has no use for it"):
        two_batches(model, stepped_adamw(model), engines=("jvp",), conditional_variance="alpha")
    document = json.loads(json.dumps(result_document(result), allow_nan=False))
    assert document["derivatives"]["sequences"] == result.derivatives.sequences.tolist()
    console = Console(record=True, width=200)
    print_result(result, console, verbose=True)
    assert "not defined here" in console.export_text()


def test_one_batch_is_refused() -> None:
    model = add_lora(build_model("gpt2"))
    with pytest.raises(ConfigError, match="diagonal K_nn") as caught:
        fast_delta_h1(model, stepped_adamw(model), make_rollouts(GROUPS), **options_of(engine="jvp"))
    assert "one_pass" in caught.value.fix
    assert "entropy_rollouts" in caught.value.fix
    context = OfflineEntropyProbe(model, stepped_adamw(model), **options_of(engine="jvp")).context
    with pytest.raises(ConfigError, match="diagonal K_nn"):
        ForwardModeEngine(context).same_batch(make_rollouts(GROUPS))


def test_an_adapter_out_of_the_forward_is_an_error() -> None:
    case = case_of(add_lora(build_model("gpt2")))
    mute_adapters(case.model)
    with pytest.raises(GraphDetachedError, match="requires_grad=False"):
        two_batches(case.model, case.optimizer, engines=("jvp",))


def test_randomness_that_is_left_is_an_error() -> None:
    model = add_lora(build_model("gpt2"))
    model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: nn.functional.dropout(out, 0.5))
    with pytest.raises(ModelStateError, match="two forwards of sequence"):
        two_batches(model, stepped_adamw(model), engines=("jvp",))


def test_one_probe_many_calls() -> None:
    model = add_lora(build_model("gpt2", dtype=torch.float64)).double()
    probe = OfflineEntropyProbe(model, stepped_adamw(model), **options_of(engine="jvp"))
    large, small, other = (
        make_rollouts(groups, seed=seed) for groups, seed in (((3, 4, 3), 1), ((2, 2), 2), ((2, 3), 3))
    )
    first = probe.run_mixed_probe(entropy_rollouts=small, update_rollouts=large)
    probe.run_mixed_probe(entropy_rollouts=other, update_rollouts=small)
    again = probe.run_mixed_probe(entropy_rollouts=small, update_rollouts=large)
    assert again.delta_h1 == first.delta_h1
    assert torch.equal(again.derivatives.tokens, first.derivatives.tokens)


def columns_of(tokens: Tensor) -> Tensor:
    return tokens.abs().sum(0) != 0


def test_empty_responses_are_left_out() -> None:
    model = add_lora(build_model("gpt2", dtype=torch.float64)).double()
    samples = make_samples(GROUPS, seed=3)
    emptied = [*samples, Sample(samples[0].group, samples[0].prompt, (), 0.5)]
    optimizer = stepped_adamw(model)
    update = make_rollouts((2, 2), seed=8)
    (expected,) = two_batches(model, optimizer, batches=(pack(samples), update), engines=("jvp",))
    with pytest.warns(UserWarning, match="without response tokens"):
        (found,) = two_batches(model, optimizer, batches=(pack(emptied), update), engines=("jvp",))
    assert torch.equal(found.derivatives.sequences, expected.derivatives.sequences)
    assert torch.equal(columns_of(found.derivatives.tokens), columns_of(expected.derivatives.tokens))
