"""Log-probs of the policy that sampled: what is said about them, what is refused, and options that do not exist."""

from __future__ import annotations

import json
import math

import pytest
import torch
from engine_sums import relative
from probe_models.architectures import build_model, stepped_adamw
from probe_models.batches import Sample, make_samples, pack
from probe_options import options_of
from token_options import OPTIONS, rollouts_of, wide_model
from torch import Tensor, nn

from entropy_fast import EstimateOptions, Rollouts, fast_delta_h1
from entropy_fast.errors import ConfigError, RolloutsError
from entropy_fast.probe_components import ProbeComponents
from entropy_fast.run_folder.result_files import result_document
from entropy_fast.step import AdamState


def old_logprobs_of(model: nn.Module, samples: list[Sample], rollouts: Rollouts) -> Tensor:
    """What the model itself says now, in the columns of the rollouts."""
    table = torch.zeros(rollouts.loss_mask.shape, dtype=torch.float64)
    for row, sample in enumerate(samples):
        ids = torch.tensor([[*sample.prompt, *sample.response]])
        logprobs = model(input_ids=ids).logits[0].log_softmax(-1).detach()
        start = len(sample.prompt)
        table[row, rollouts.loss_mask[row] == 1] = logprobs[
            torch.arange(start - 1, ids.shape[1] - 1), ids[0, start:]
        ].double()
    return table


def test_what_was_used_and_what_was_not_is_said() -> None:
    model = wide_model("gpt2", True)
    state = AdamState.from_optimizer(stepped_adamw(model), model)
    samples = make_samples((2, 3, 2))
    rollouts = rollouts_of(samples)
    plain = fast_delta_h1(model, state, rollouts, **options_of())
    notes = " ".join(plain.diagnostics.warnings)
    assert "importance_ratio='token' would put that into the update" in notes
    assert "the entropy gradient takes responses as drawn from the current policy" in notes
    assert "score-function" in plain.entropy_functional
    used = fast_delta_h1(model, state, rollouts, **options_of(**OPTIONS["both"]))
    notes = " ".join(used.diagnostics.warnings)
    assert "would put that" not in notes
    clipped = used.sequences["update"].ratios.clipped
    assert f"clipping leaves out {float(clipped.mean()):.1%} of a response's tokens" in notes
    assert 0 < float(clipped.mean()) < 1
    assert "Rao-Blackwell" in used.entropy_functional
    assert not torch.equal(*(result.sequences["update"].coefficients["update"] for result in (used, plain)))


def test_a_policy_that_has_not_moved() -> None:
    """Ratios of 1: the same kernel, and nothing to say."""
    model = wide_model("gpt2", True)
    state = AdamState.from_optimizer(stepped_adamw(model), model)
    samples = make_samples((2, 3, 2))
    plain = fast_delta_h1(model, state, pack(samples), **options_of())
    table = old_logprobs_of(model, samples, pack(samples))
    config = {"importance_ratio": "token", "clip_range": (0.2, 0.2)}
    on_policy = fast_delta_h1(model, state, pack(samples, old_logprobs=table), **options_of(**config))
    assert not any("old_logprobs" in note for note in on_policy.diagnostics.warnings)
    assert relative(on_policy.kernel, plain.kernel) <= 1e-10
    ratios = on_policy.sequences["entropy"].ratios
    assert float(ratios.largest_log_ratio.max()) < 1e-9
    assert not ratios.clipped.any()


def test_log_probs_in_the_wrong_columns_show() -> None:
    """Their sums over a sequence hardly change: that would not tell."""
    model = wide_model("gpt2", True)
    state = AdamState.from_optimizer(stepped_adamw(model), model)
    samples = [
        Sample(
            s.group,
            s.prompt,
            tuple(torch.randint(1, 60, (40,), generator=torch.Generator().manual_seed(i)).tolist()),
            1.0,
        )
        for i, s in enumerate(make_samples((2, 3, 2)))
    ]
    table = old_logprobs_of(model, samples, pack(samples, max_lengths=40)).roll(1, 1)
    rollouts = pack(samples, max_lengths=40, old_logprobs=table)
    result = fast_delta_h1(model, state, rollouts)
    assert "Is column t of old_logprobs about the token in column t?" in " ".join(result.diagnostics.warnings)


def test_refusals() -> None:
    model = build_model("gpt2")
    state = AdamState.from_optimizer(stepped_adamw(model), model)
    config = {"importance_ratio": "token"}
    with pytest.raises(RolloutsError, match="needs the update batch's `old_logprobs`") as caught:
        fast_delta_h1(model, state, pack(make_samples()), **options_of(**config))
    assert "importance_ratio='none'" in caught.value.fix
    with pytest.raises(RolloutsError, match="needs the update batch's"):
        fast_delta_h1(
            model,
            state,
            pack(make_samples()),
            entropy_rollouts=rollouts_of(make_samples(seed=9)),
            **options_of(**config),
        )
    with pytest.raises(RolloutsError, match="needs the update batch's"):
        ProbeComponents(model, state, **options_of(**config)).accumulate_sum_Y(pack(make_samples()))


@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
def test_a_placeholder_among_old_log_probs(engine: str) -> None:
    model = build_model("gpt2")
    state = AdamState.from_optimizer(stepped_adamw(model), model)
    samples = make_samples((2, 3, 2))
    rollouts = rollouts_of(samples)
    table = rollouts.old_logprobs.clone()
    column = int((rollouts.loss_mask[4] == 1).nonzero()[1])
    table[4, column] = -9999.0
    bad = pack(samples, old_logprobs=table)
    with pytest.raises(
        RolloutsError, match=f"-9999 at response token 1 of a response to group {samples[4].group}"
    ) as caught:
        fast_delta_h1(model, state, bad, **options_of(engine=engine, **OPTIONS["both"]))
    assert "no placeholder" in caught.value.fix
    # As an entropy batch it is not read.
    result = fast_delta_h1(
        model,
        state,
        rollouts_of(make_samples(seed=9)),
        entropy_rollouts=bad,
        **options_of(engine=engine, **OPTIONS["both"]),
    )
    assert math.isfinite(result.delta_h1)
    json.dumps(result_document(result), allow_nan=False)


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ({"entropy_estimator": "exact"}, "use one of score_function, rao_blackwell"),
        ({"importance_ratio": "group"}, "use one of none, token, sequence"),
        ({"clip_range": (0.2, 0.2)}, "pass importance_ratio='token'"),
        *(
            ({"importance_ratio": "token", "clip_range": clip}, "(0.2, 0.2) or 0.2 for both")
            for clip in (True, (1.2, 0.2), (0.2, float("inf")), (), ("a", "b"), (None, 0.2), (float("nan"), 0.2))
        ),
    ],
)
def test_options_that_do_not_exist(options: dict[str, object], fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EstimateOptions(**options)
    assert fix in caught.value.fix
