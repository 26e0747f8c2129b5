"""Coefficients that differ from token to token, by every engine and every way through a batch, and what is said about them."""

from __future__ import annotations

import warnings

import pytest
import torch
from engine_sums import assert_same_estimate, assert_same_sums, observe, relative
from exactness import model_of, widened
from probe_models.architectures import add_lora, build_model, stepped_adamw
from probe_models.batches import make_samples, pack
from probe_models.own_dtype import computing_in_own_dtype
from token_options import OPTIONS, rollouts_of, wide_model
from torch import Tensor, nn

from entropy_fast import DeltaH1Result, OfflineEntropyProbe, ProbeConfig, fast_delta_h1
from entropy_fast.engines import capture_pass
from entropy_fast.errors import ConfigError, EntropyFastWarning, RolloutsError
from entropy_fast.geometry import AdamState

WAYS = ("packed", "packed whole", "shared", "whole", "logits")


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
        for way in WAYS:
            if way == "packed whole":
                monkeypatch.setattr(capture_pass, "reentrant_checkpointing", lambda *_: "as if")
            if way == "shared":
                monkeypatch.undo()
                monkeypatch.setattr(capture_pass, "same_packed", lambda *_: False)
            if way == "whole":
                monkeypatch.setattr(capture_pass, "same_with_shared_prefix", lambda *_: False)
            if way == "logits":
                monkeypatch.setattr(capture_pass, "same_logits", lambda *_: False)
            found = observe("one_pass", model, optimizer, rollouts, **OPTIONS[options])
            assert relative(found.kernel, expected.kernel) <= tolerance, way
            assert abs(found.std_error - expected.std_error) <= tolerance * expected.std_error, way


def test_sums_and_diagonal_where_gradients_do_not_fit() -> None:
    model = wide_model("qwen3", True)
    optimizer = stepped_adamw(model)
    rollouts = rollouts_of(make_samples((2, 3, 2, 4)))
    with computing_in_own_dtype(model):
        kept, apart = (
            OfflineEntropyProbe(
                model, optimizer, config=ProbeConfig(memory_budget=budget, **OPTIONS["both"])
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
    """By one batch and by two; a sequence whose coefficients are 0 in X and in g has no share."""
    model = wide_model("qwen2", True)
    optimizer = stepped_adamw(model)
    samples = make_samples((2, 3, 2, 4))
    one, other = rollouts_of(samples), rollouts_of(make_samples((3, 2, 2), seed=9))
    with computing_in_own_dtype(model):
        probe = OfflineEntropyProbe(
            model, optimizer, config=ProbeConfig(by_sequence=True, **OPTIONS[options]), engine="one_pass"
        )
        assert_shares_add_up(probe.compute_delta_h1(one))
        assert_shares_add_up(probe.run_mixed_probe(other, one))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("family", "adapter"), [("gpt2", True), ("qwen2", False), ("gpt2", False)])
def test_two_batches_by_every_engine(family: str, adapter: bool, options: str) -> None:
    """The entropy batch need not say what sampled it."""
    model = wide_model(family, adapter)
    state = AdamState.from_optimizer(stepped_adamw(model), model)
    entropy, update = pack(make_samples((2, 3, 2), seed=9)), rollouts_of(make_samples((2, 3, 2, 4)))
    configs = {engine: ProbeConfig(**OPTIONS[options]) for engine in ("two_pass", "one_pass", "jvp")}
    configs["alpha"] = ProbeConfig(conditional_variance="alpha", **OPTIONS[options])
    with computing_in_own_dtype(model):
        results = {
            name: fast_delta_h1(model, state, update, entropy, "two_pass" if name == "alpha" else name, config=config)
            for name, config in configs.items()
        }
    expected = results.pop("two_pass")
    for name, found in results.items():
        assert relative(found.row_sums, expected.row_sums) <= 1e-10, name
        assert abs(found.delta_h1 - expected.delta_h1) <= 1e-10 * expected.std_error, name
        assert abs(found.std_error - expected.std_error) <= 1e-10 * expected.std_error, name
        for label in "XY":
            for one, two in zip(
                vars(found.sequences[label]).values(), vars(expected.sequences[label]).values(), strict=True
            ):
                torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10, equal_nan=True)
    derivatives = results["jvp"].derivatives
    assert (derivatives.entropies is None) == ("entropy_estimator" not in OPTIONS[options])
    assert float(derivatives.token_shares.sum()) == pytest.approx(expected.delta_h1, rel=1e-8)
    assert bool((derivatives.token_shares[entropy.loss_mask == 0] == 0).all())


def test_shares_of_tokens_with_token_entropies_by_central_differences() -> None:
    """H'_t along the update: entropies before and after the parameters really move."""
    model = wide_model("gpt2", True)
    optimizer = stepped_adamw(model)
    entropy, update = pack(make_samples((2, 3), seed=9)), pack(make_samples((2, 3, 2)))
    config = ProbeConfig(**OPTIONS["token entropies"])
    found = fast_delta_h1(model, optimizer, update, entropy, "jvp", config=config).derivatives
    y_sum = OfflineEntropyProbe(model, optimizer, config=config).components.accumulate_sum_Y(update).tensors
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


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["fp32", "bf16 autocast"])
def test_rounds_no_more_than_the_reference(precision: torch.dtype | None) -> None:
    """Errors of K against fp64 of the same weights, pooled over four families and 16 prompts."""
    errors: dict[str, list[float]] = {"one_pass": [], "two_pass": []}
    for seed, family in enumerate(("qwen2", "gpt2", "llama", "qwen3")):
        model = model_of(family, "lora")
        state = AdamState.from_optimizer(stepped_adamw(model), model)
        wide = widened(model)
        rollouts = rollouts_of(make_samples((2, 3) * 8, seed=seed))
        with computing_in_own_dtype(wide):
            truth = observe("two_pass", wide, state, rollouts, **OPTIONS["both"])
        for engine, own in errors.items():
            found = observe(engine, model, state, rollouts, autocast_dtype=precision, **OPTIONS["both"])
            own.append(relative(found.kernel, truth.kernel))
    one, two = (sum(e * e for e in own) ** 0.5 for own in errors.values())
    assert one <= 1.5 * two, errors
    assert two > (1e-3 if precision else 1e-8)


def test_what_was_used_and_what_was_not_is_said() -> None:
    model = wide_model("gpt2", True)
    state = AdamState.from_optimizer(stepped_adamw(model), model)
    samples = make_samples((2, 3, 2))
    rollouts = rollouts_of(samples)
    plain = fast_delta_h1(model, state, rollouts)
    notes = " ".join(plain.diagnostics.warnings)
    assert "old_logprobs are there and were not used" in notes
    assert "nats a token away from old_logprobs" in notes
    assert "score-function" in plain.entropy_functional
    used = fast_delta_h1(model, state, rollouts, config=ProbeConfig(**OPTIONS["both"]))
    assert "not used" not in " ".join(used.diagnostics.warnings)
    assert "Rao-Blackwell" in used.entropy_functional
    scored = plain.sequences["X"].sequence_logprobs
    assert not torch.equal(used.sequences["Y"].update, plain.sequences["Y"].update)
    # A policy that has not moved: ratios of 1, and nothing to say.
    table = torch.zeros(rollouts.loss_mask.shape, dtype=torch.float64)
    for row in range(len(samples)):
        ids = torch.tensor([[*samples[row].prompt, *samples[row].response]])
        logprobs = model(input_ids=ids).logits[0].log_softmax(-1).detach()
        start = len(samples[row].prompt)
        own = logprobs[torch.arange(start - 1, ids.shape[1] - 1), ids[0, start:]]
        table[row, rollouts.loss_mask[row] == 1] = own
    torch.testing.assert_close(table.sum(1), scored)
    fresh = pack(samples, old_logprobs=table)
    on_policy = fast_delta_h1(model, state, fresh, config=ProbeConfig(importance_ratio="token", clip_range=(0.2, 0.2)))
    assert not any("old_logprobs" in note for note in on_policy.diagnostics.warnings)
    assert relative(on_policy.kernel, plain.kernel) <= 1e-10


def test_refusals() -> None:
    model = build_model("gpt2")
    state = AdamState.from_optimizer(stepped_adamw(model), model)
    with pytest.raises(RolloutsError, match="needs the update batch's `old_logprobs`") as caught:
        fast_delta_h1(model, state, pack(make_samples()), config=ProbeConfig(importance_ratio="token"))
    assert "importance_ratio='none'" in caught.value.fix
    with pytest.raises(RolloutsError, match="needs the update batch's"):
        fast_delta_h1(
            model,
            state,
            pack(make_samples()),
            rollouts_of(make_samples(seed=9)),
            config=ProbeConfig(importance_ratio="token"),
        )
    for options, message in (
        ({"entropy_estimator": "exact"}, "use one of score_function, rao_blackwell"),
        ({"importance_ratio": "sequence"}, "use one of none, token"),
        ({"clip_range": (0.2, 0.2)}, "pass importance_ratio='token'"),
        ({"importance_ratio": "token", "clip_range": (1.2, 0.2)}, "in \\[0, 1\\]"),
        ({"importance_ratio": "token", "clip_range": (0.2, float("inf"))}, "such as"),
        ({"importance_ratio": "token", "clip_range": (0.2,)}, "such as"),
    ):
        with pytest.raises(ConfigError) as caught:
            ProbeConfig(**options)
        assert message.replace("\\", "") in caught.value.fix
