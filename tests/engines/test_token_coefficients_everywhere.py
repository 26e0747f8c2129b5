"""Coefficients that differ from token to token, by every engine and every way through a batch."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings

import pytest
import torch
from engine_sums import assert_same_estimate, assert_same_sums, median_error, observe, ratio_of, relative
from exactness import CHECKPOINTING, checkpointed, model_of, widened
from probe_models.architectures import add_lora, build_model, stepped_adamw
from probe_models.batches import make_samples, pack
from probe_models.cases import components_of
from probe_models.own_dtype import computing_in_own_dtype
from probe_options import options_of
from token_options import OPTIONS, definition_of, rollouts_of, wide_model
from torch import Tensor, nn

from entropy_fast import DeltaH1Result, OfflineEntropyProbe, fast_delta_h1
from entropy_fast.columns import SequenceTable
from entropy_fast.errors import EntropyFastWarning
from entropy_fast.step import AdamState
from entropy_fast.ways.packed import PackedWay
from entropy_fast.ways.packed import output as packed_output
from entropy_fast.ways.packed import way as packed_way
from entropy_fast.ways.padded import HiddenStatesWay

WAYS = {
    "packed": "packed without padding, prompts' tokens shared",
    "packed whole": "packed without padding, whole sequences",
    "whole": "whole sequences, log-probs from hidden states",
    "logits": "whole sequences, the model's own logits",
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma2"])
def test_every_way_through_a_microbatch(family: str, options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.float32 if family == "gemma2" else torch.float64
    model = add_lora(build_model(family, dtype=dtype)).to(dtype)
    optimizer = stepped_adamw(model)
    rollouts = rollouts_of(make_samples((2, 3, 2, 4)))
    tolerance = 1e-4 if family == "gemma2" else 1e-10
    with computing_in_own_dtype(model):
        expected = observe("two_pass", model, optimizer, rollouts, **OPTIONS[options])
        for way, said in WAYS.items():
            if way == "packed whole":
                monkeypatch.setattr(packed_way, "reentrant_checkpointing", lambda *_: "as if")
            if way == "whole":
                monkeypatch.setattr(PackedWay, "why_not", lambda *_: "as if")
            if way == "logits":
                monkeypatch.setattr(HiddenStatesWay, "why_not", lambda *_: "as if")
            found = observe("one_pass", model, optimizer, rollouts, **OPTIONS[options])
            assert found.result.plan.way.startswith(said)
            assert relative(found.kernel, expected.kernel) <= tolerance, way
            assert abs(found.std_error - expected.std_error) <= tolerance * expected.std_error, way


@pytest.mark.parametrize("checkpointing", CHECKPOINTING[:2])
@pytest.mark.parametrize("options", OPTIONS)
def test_prompts_in_a_row_of_their_own(options: str, checkpointing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What came back to them for X is not there any more when that for g comes."""
    monkeypatch.setattr(PackedWay, "_copies", lambda *_: ())
    model = wide_model("qwen2", True)
    optimizer = stepped_adamw(model)
    rollouts = rollouts_of(make_samples((2, 3, 2, 4)))
    with computing_in_own_dtype(model), checkpointed(model, checkpointing):
        expected = observe("two_pass", model, optimizer, rollouts, **OPTIONS[options])
        found = observe("one_pass", model, optimizer, rollouts, **OPTIONS[options])
    assert found.result.plan.way.startswith(WAYS["packed"])
    assert_same_sums(found, expected, 1e-10)
    assert_same_estimate(found, expected, 1e-10)


@pytest.mark.parametrize("options", OPTIONS)
def test_an_output_layer_of_its_own_for_some_prompts_at_a_time(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide_model("qwen2", False)
    optimizer = stepped_adamw(model)
    rollouts = rollouts_of(make_samples((2, 3, 2, 4)))
    calls: list[int] = []
    whole = packed_output.token_logprobs

    def counted(logits: Tensor, *arguments: object, **named: object) -> object:
        calls.append(len(logits))
        return whole(logits, *arguments, **named)

    with computing_in_own_dtype(model):
        expected = observe("two_pass", model, optimizer, rollouts, **OPTIONS[options])
        monkeypatch.setattr(packed_output, "token_logprobs", counted)
        monkeypatch.setattr(packed_output, "_ROWS", 1)
        found = observe("one_pass", model, optimizer, rollouts, prompts_per_microbatch=4, **OPTIONS[options])
    assert len(calls) == 4
    assert_same_sums(found, expected, 1e-10)
    assert_same_estimate(found, expected, 1e-10)
    for side in ("entropy", "update"):
        assert_same_table(found.result.sequences[side], expected.result.sequences[side], side)


@pytest.mark.parametrize(
    "more",
    [
        {"blocks": 2},
        {"accumulate_on": "cpu", "weighting": "sequence"},
        {"y_pass": "autograd_grad"},
        {"prompts_per_microbatch": 1, "weighting": "per_token"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_beside_other_options(more: dict[str, object]) -> None:
    model = wide_model("gpt2", True)
    state = AdamState.from_optimizer(stepped_adamw(model), model)
    rollouts = rollouts_of(make_samples((2, 3, 2, 4)))
    config = dict(full_kernel=True, **OPTIONS["both"], **more)
    of_one_pass = {name: value for name, value in config.items() if name != "y_pass"}
    one, two = (
        OfflineEntropyProbe(model, state, **options_of(engine=engine, **own)).compute_delta_h1(rollouts)
        for engine, own in (("one_pass", of_one_pass), ("two_pass", config))
    )
    assert relative(one.kernel, two.kernel) <= 1e-10
    if math.isnan(two.std_error):
        assert math.isnan(one.std_error)  # of two blocks
    else:
        assert abs(one.std_error - two.std_error) <= 1e-9 * two.std_error


def test_what_is_clipped_is_said_by_every_engine() -> None:
    model = wide_model("gpt2", True)
    state = AdamState.from_optimizer(stepped_adamw(model), model)
    rollouts = rollouts_of(make_samples((2, 3, 2, 4)))
    notes = []
    for engine in ("one_pass", "two_pass"):
        result = fast_delta_h1(model, state, rollouts, **options_of(engine=engine, **OPTIONS["clipped ratios"]))
        share = float(result.sequences["update"].ratios.clipped.mean())
        assert 0 < share < 1
        notes.append([note for note in result.diagnostics.warnings if "clipping leaves out" in note])
        assert notes[-1] == [f"rollouts: clipping leaves out {share:.1%} of a response's tokens on average."]
    assert notes[0] == notes[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_16_bits(dtype: torch.dtype) -> None:
    """Every engine near fp64 of the same weights; fp16 would lose small coefficients that are not scaled."""
    model = add_lora(build_model("qwen2", dtype=dtype)).to(dtype)
    state = AdamState.from_optimizer(stepped_adamw(model), model)
    samples = make_samples((2, 3) * 4)
    small = [dataclasses.replace(s, advantage=1e-6 * s.advantage) for s in samples]
    entropy, update = rollouts_of(make_samples((3, 2, 2), seed=9)), rollouts_of(small, max_lengths=2**14)
    wide = copy.deepcopy(model).double()
    truth = fast_delta_h1(
        wide, state, update, entropy_rollouts=entropy, **options_of(engine="two_pass", **OPTIONS["both"])
    )
    for engine in ("one_pass", "two_pass", "jvp"):
        found = fast_delta_h1(
            model, state, update, entropy_rollouts=entropy, **options_of(engine=engine, **OPTIONS["both"])
        )
        assert relative(found.row_sums, truth.row_sums) < 0.1, engine


def test_memory_that_runs_out_between_the_two_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first of them had added is void."""
    model = wide_model("qwen2", True)
    optimizer = stepped_adamw(model)
    rollouts = rollouts_of(make_samples((2, 3, 2, 4)))
    whole, calls = PackedWay._backward_through_row, []

    def limited(self: PackedWay, layout: object, *arguments: object, **named: object) -> None:
        calls.append(len(layout.groups))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        whole(self, layout, *arguments, **named)

    with computing_in_own_dtype(model):
        expected = observe("two_pass", model, optimizer, rollouts, **OPTIONS["both"])
        monkeypatch.setattr(PackedWay, "_backward_through_row", limited)
        found = observe("one_pass", model, optimizer, rollouts, prompts_per_microbatch=4, **OPTIONS["both"])
    assert calls == [4, 4, 2, 2, 2, 2, 2, 2]
    assert_same_sums(found, expected, 1e-10)
    assert_same_estimate(found, expected, 1e-10)


def assert_same_table(found: SequenceTable, expected: SequenceTable, side: str) -> None:
    """What both of them know of a side; an engine need not compute entropies that it does not want."""
    pairs = [
        (found.sequence_logprobs, expected.sequence_logprobs),
        (found.coefficients[side], expected.coefficients[side]),
    ]
    assert (found.ratios is None) == (expected.ratios is None)
    if found.ratios is not None:
        pairs += [
            (vars(found.ratios)[name], value)
            for name, value in vars(expected.ratios).items()
            if side == "update" or name != "clipped"
        ]
    for one, two in pairs:
        assert not one.isnan().any()
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
    known = ~(found.entropy_sums.isnan() | expected.entropy_sums.isnan())
    torch.testing.assert_close(found.entropy_sums[known], expected.entropy_sums[known], rtol=1e-10, atol=1e-10)


def test_sums_and_diagonal_where_gradients_do_not_fit() -> None:
    model = wide_model("qwen3", True)
    optimizer = stepped_adamw(model)
    rollouts = rollouts_of(make_samples((2, 3, 2, 4)))
    with computing_in_own_dtype(model):
        kept, apart = (
            OfflineEntropyProbe(
                model, optimizer, **options_of(memory_budget=budget, **OPTIONS["both"])
            ).compute_delta_h1(rollouts)
            for budget in ("1GiB", 0)
        )
    assert (kept.plan.sweeps, apart.plan.sweeps) == (1, 2)
    for name in ("diagonal", "row_sums", "column_sums"):
        assert relative(getattr(apart, name), getattr(kept, name)) <= 1e-10


class Doubling(nn.Module):
    """A map that no captured module knows, with a parameter of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.strength = inner, nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * (1 + self.strength)


@pytest.mark.parametrize("by_sequence", [False, True])
def test_parameters_on_the_slower_path(by_sequence: bool) -> None:
    model = build_model("gpt2", dtype=torch.float64)
    model.transformer.h[0].mlp = Doubling(model.transformer.h[0].mlp)
    optimizer = stepped_adamw(model)
    rollouts = rollouts_of(make_samples((2, 3, 2, 4)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=EntropyFastWarning)
        found = observe("one_pass", model, optimizer, rollouts, by_sequence=by_sequence, **OPTIONS["both"])
        expected = observe("two_pass", model, optimizer, rollouts, **OPTIONS["both"])
    assert "their gradients took two backwards a prompt" in " ".join(found.result.diagnostics.warnings)
    assert_same_sums(found, expected, 1e-10)
    assert_same_estimate(found, expected, 1e-10)
    if by_sequence:
        assert_shares_add_up(found.result)


def assert_shares_add_up(result: DeltaH1Result) -> None:
    assert result.by_sequence is not None
    for shares in result.by_sequence.values():
        assert float(shares.delta_h1.sum()) == pytest.approx(result.delta_h1, rel=1e-8)


@pytest.mark.parametrize("options", OPTIONS)
def test_shares_of_sequences(options: str) -> None:
    """One batch, against the definition."""
    model = wide_model("qwen2", True)
    optimizer = stepped_adamw(model)
    samples = make_samples((2, 3, 2, 4))
    with computing_in_own_dtype(model):
        expected = definition_of(options, model, optimizer, samples).shares(1e-4)
        probe = OfflineEntropyProbe(
            model, optimizer, **options_of(by_sequence=True, engine="one_pass", **OPTIONS[options])
        )
        result = probe.compute_delta_h1(rollouts_of(samples))
        other = rollouts_of(make_samples((3, 2, 2), seed=9))
        assert_shares_add_up(probe.run_mixed_probe(entropy_rollouts=other, update_rollouts=rollouts_of(samples)))
    assert result.learning_rate == 1e-4
    assert_shares_add_up(result)
    shares = result.by_sequence["both"]
    for found, which in ((shares.as_entropy, 0), (shares.as_update, 1)):
        wanted = torch.tensor([expected[s][which] for s in samples], dtype=torch.float64)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9 * float(wanted.abs().max()))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("family", "adapter"), [("gpt2", True), ("qwen2", False), ("gpt2", False)])
def test_two_batches_by_every_engine(family: str, adapter: bool, options: str) -> None:
    """The entropy batch need not say what sampled it, and may."""
    model = wide_model(family, adapter)
    state = AdamState.from_optimizer(stepped_adamw(model), model)
    samples = make_samples((2, 3, 2), seed=9)
    entropy, update = (rollouts_of if adapter else pack)(samples), rollouts_of(make_samples((2, 3, 2, 4)))
    configs = {engine: dict(**OPTIONS[options]) for engine in ("two_pass", "one_pass", "jvp")}
    configs["alpha"] = dict(conditional_variance="alpha", **OPTIONS[options])
    with computing_in_own_dtype(model):
        results = {
            name: fast_delta_h1(
                model,
                state,
                update,
                entropy_rollouts=entropy,
                **options_of(engine="two_pass" if name == "alpha" else name, **config),
            )
            for name, config in configs.items()
        }
    expected = results.pop("two_pass")
    for name, found in results.items():
        assert relative(found.row_sums, expected.row_sums) <= 1e-10, name
        assert abs(found.delta_h1 - expected.delta_h1) <= 1e-10 * expected.std_error, name
        assert abs(found.std_error - expected.std_error) <= 1e-10 * expected.std_error, name
        for side in ("entropy", "update"):
            assert_same_table(found.sequences[side], expected.sequences[side], side)
    # Of the update batch nobody wants the entropies.
    one_pass = results["one_pass"].sequences
    assert bool(one_pass["update"].entropy_sums.isnan().all())
    assert bool(one_pass["entropy"].entropy_sums.isnan().any()) == ("entropy_estimator" not in OPTIONS[options])
    derivatives = results["jvp"].derivatives
    assert (derivatives.entropies is None) == ("entropy_estimator" not in OPTIONS[options])
    assert float(derivatives.token_shares.sum()) == pytest.approx(expected.delta_h1, rel=1e-8)
    assert bool((derivatives.token_shares[entropy.loss_mask == 0] == 0).all())


def test_shares_of_tokens_with_token_entropies_by_central_differences() -> None:
    """H'_t along the update: entropies before and after the parameters really move."""
    model = wide_model("gpt2", True)
    optimizer = stepped_adamw(model)
    entropy, update = pack(make_samples((2, 3), seed=9)), pack(make_samples((2, 3, 2)))
    config = dict(**OPTIONS["token entropies"])
    found = fast_delta_h1(
        model, optimizer, update, entropy_rollouts=entropy, **options_of(engine="jvp", **config)
    ).derivatives
    y_sum = (
        components_of(OfflineEntropyProbe(model, optimizer, **options_of(**config))).accumulate_sum_Y(update).tensors
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    step, values = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, y in zip(parameters, y_sum, strict=True):
                parameter.add_(y, alpha=sign * step / update.n_prompts)
            ids, mask = entropy.input_ids, entropy.attention_mask
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            logprobs = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.log_softmax(-1)
            values.append(-(logprobs.exp() * logprobs).sum(-1)[:, :-1])
            for parameter, y in zip(parameters, y_sum, strict=True):
                parameter.sub_(y, alpha=sign * step / update.n_prompts)
    slopes = torch.nn.functional.pad((values[0] - values[1]) / (2 * step), (1, 0))
    scored = entropy.loss_mask == 1
    torch.testing.assert_close(found.entropies[scored], slopes[scored], rtol=1e-5, atol=1e-6)
    assert not found.entropies[~scored].any()


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "precision",
    [pytest.param(None, id="fp32"), pytest.param(torch.bfloat16, id="bf16 autocast")],
)
def test_rounds_no_more_than_the_reference(precision: torch.dtype | None) -> None:
    """Errors of K against fp64 of the same weights, over four families and 16 prompts.

    Logarithms of their ratios spread by less than 0.2 over draws (0.17 in twelve): 1.5 is more than six standard errors away.
    """
    errors: dict[str, list[float]] = {"one_pass": [], "two_pass": []}
    for family in ("qwen2", "gpt2", "llama", "qwen3"):
        model = model_of(family, "lora")
        state = AdamState.from_optimizer(stepped_adamw(model), model)
        wide = widened(model)
        for seed in range(3):
            rollouts = rollouts_of(make_samples((2, 3) * 8, seed=seed))
            with computing_in_own_dtype(wide):
                truth = observe("two_pass", wide, state, rollouts, **OPTIONS["both"])
            for engine, own in errors.items():
                found = observe(engine, model, state, rollouts, autocast_dtype=precision, **OPTIONS["both"])
                own.append(median_error(found.kernel, truth.kernel))
    assert ratio_of(errors) <= 1.5, errors
    assert min(errors["two_pass"]) > (1e-6 if precision else 1e-11)
