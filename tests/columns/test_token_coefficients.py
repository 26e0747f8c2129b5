"""Coefficients that differ from token to token: against loops, and every engine with them against the definition.

Legend (`entropy_fast.columns.column`): c_t and e_t coefficients of ∇s_t and ∇H_t in X, a_t of ∇s_t in g.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_sums import assert_same_estimate, assert_same_sums, observe, relative
from exactness import ADAPTERS, BATCHES, BUDGET, CHECKPOINTING, FAMILIES, checkpointed, combinations, model_of, widened
from hypothesis import given, settings
from hypothesis import strategies as st
from probe_models.architectures import stepped_adamw
from probe_models.batches import Sample, make_samples
from probe_models.own_dtype import computing_in_own_dtype
from probe_options import options_of
from token_options import OPTIONS, definition_of, rollouts_of, wide_model
from torch import Tensor

from entropy_fast import EstimateOptions, Rollouts, fast_delta_h1
from entropy_fast.columns import Coefficients, ScoredTokens, columns_of
from entropy_fast.columns.coefficients import ColumnWeights, power_of_two_scale, power_of_two_scales
from entropy_fast.errors import RolloutsError
from entropy_fast.step import AdamState


@st.composite
def scored_groups(
    draw: st.DrawFn,
) -> tuple[list[int], list[list[float]], list[list[float]], list[list[float]], list[float]]:
    """Groups in any order; log-probs, old log-probs and entropies of every token; advantages."""
    groups = draw(st.lists(st.integers(0, 2), min_size=1, max_size=8))
    lengths = draw(st.lists(st.integers(1, 5), min_size=len(groups), max_size=len(groups)))

    def table(low: float, high: float) -> list[list[float]]:
        return [draw(st.lists(st.floats(low, high), min_size=n, max_size=n)) for n in lengths]

    # Rollouts take no advantage that vanishes in fp32.
    numbers = st.floats(-3, 3).map(lambda number: number if abs(number) > 1e-30 else 0.0)
    advantages = draw(st.lists(numbers, min_size=len(groups), max_size=len(groups)))
    return groups, table(-6, 0), table(-6, 0), table(0, 4), advantages


@settings(max_examples=100, deadline=None)
@given(
    batch=scored_groups(),
    weighting=st.sampled_from(["dr_grpo", "per_token", "sequence"]),
    clip=st.sampled_from([None, (0.2, 0.2), (0.0, 5.0)]),
)
def test_against_loops(batch: Any, weighting: Any, clip: tuple[float, float] | None) -> None:
    groups, logprobs, old, entropies, advantages = batch
    lengths = [len(row) for row in logprobs]
    columns = torch.arange(1 + max(lengths))
    loss = ((columns >= 1) & (columns <= torch.tensor(lengths)[:, None])).long()
    table = torch.zeros(loss.shape, dtype=torch.float64)
    table[loss == 1] = torch.tensor([v for row in old for v in row], dtype=torch.float64)
    rollouts = Rollouts(
        input_ids=torch.tensor(groups)[:, None].expand(-1, len(columns)),
        attention_mask=(columns <= torch.tensor(lengths)[:, None]).long(),
        loss_mask=loss,
        group_ids=torch.tensor(groups),
        advantages=torch.tensor(advantages, dtype=torch.float64),
        max_lengths=9,
        old_logprobs=table,
    )
    order = [row for group in dict.fromkeys(groups) for row in range(len(groups)) if groups[row] == group]

    def flat(values: list[list[float]]) -> Tensor:
        return torch.tensor([v for row in order for v in values[row]], dtype=torch.float64)

    sums = torch.tensor([sum(logprobs[row]) for row in order], dtype=torch.float64)
    options = EstimateOptions(baseline="responses", importance_ratio="token", clip_range=clip, weighting=weighting)
    scored = ScoredTokens(rollouts, torch.tensor(order), sums, flat(logprobs), flat(entropies))
    found = columns_of(options).weigh(scored)
    of_entropy, _, of_update = found.columns
    c, e, a = [], [], []
    weight = {"dr_grpo": lambda _: 1 / 9, "per_token": lambda n: 1 / n, "sequence": lambda _: 1.0}[weighting]
    for row in order:
        others = [j for j in range(len(groups)) if groups[j] == groups[row] and j != row]
        size, w = len(others) + 1, weight(lengths[row])
        for t in range(lengths[row]):
            if weighting == "per_token":
                own, compared = sum(entropies[row]), [weight(lengths[j]) * sum(entropies[j]) for j in others]
            else:
                own = sum(entropies[row][t + 1 :])
                compared = [weight(lengths[j]) * sum(entropies[j][t + 1 :]) for j in others if lengths[j] > t]
            c.append((w * own - (sum(compared) / len(compared) if compared else 0.0)) / size)
            e.append(w / size)
            ratio = float(torch.tensor(logprobs[row][t] - old[row][t], dtype=torch.float64).exp())
            clipped = clip is not None and (
                (advantages[row] > 0 and ratio > 1 + clip[1]) or (advantages[row] < 0 and ratio < 1 - clip[0])
            )
            a.append(0.0 if clipped else ratio * advantages[row] * w / size)
    assert of_update.of_entropy is None
    for values, expected in ((of_entropy.of_logprob, c), (of_entropy.of_entropy, e), (of_update.of_logprob, a)):
        assert values is not None
        torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    starts = [sum(lengths[row] for row in order[:k]) for k in range(len(order))]
    means = [sum(c[s : s + lengths[row]]) / lengths[row] for s, row in zip(starts, order, strict=True)]
    torch.testing.assert_close(found.by_sequence[0], torch.tensor(means, dtype=torch.float64), rtol=1e-11, atol=1e-12)


def test_scales_are_powers_of_two_that_bring_numbers_to_ordinary_size() -> None:
    numbers = torch.tensor([1e-30, 3.0, 2.0, 1.0 - 2**-53, 7e5, 0.0], dtype=torch.float64)
    assert power_of_two_scales(numbers).tolist() == [power_of_two_scale(n[None]) for n in numbers]


def test_the_largest_coefficient_of_a_sequence_is_that_of_any_of_its_parts() -> None:
    rollouts = rollouts_of(make_samples((2, 2)))
    rows = torch.cat([rollouts.rows_of_prompt(n) for n in range(2)])
    count = int(rollouts.response_lengths.sum())
    scored = ScoredTokens(
        rollouts, rows, -torch.rand(4).double(), -torch.rand(count).double(), torch.rand(count).double()
    )
    found = columns_of(EstimateOptions(baseline="responses", **OPTIONS["both"])).weigh(scored)
    entropy, _, update = found.columns
    for n in range(4):
        own = found.sequence == n
        assert float(found.largest(0)[n]) == max(
            float(v[own].abs().max()) for v in (entropy.of_logprob, entropy.of_entropy)
        )
        assert float(found.largest(2)[n]) == float(update.of_logprob[own].abs().max())
    by_sequence = torch.tensor([[-2.0, 1.0], [0.5, -3.0]])
    whole = Coefficients(by_sequence, tuple(ColumnWeights(own) for own in by_sequence))
    assert [whole.largest(column).tolist() for column in range(2)] == [[2.0, 1.0], [0.5, 3.0]]


def assert_definition(
    family: str, adapter: bool, options: str, weighting: str = "dr_grpo", samples: list[Sample] | None = None
) -> None:
    model = wide_model(family, adapter)
    optimizer = stepped_adamw(model)
    samples = samples or make_samples((2, 4, 3), seed=8)
    with computing_in_own_dtype(model):
        expected = definition_of(options, model, optimizer, samples, weighting=weighting)
        for engine in ("two_pass", "one_pass"):
            found = observe(engine, model, optimizer, rollouts_of(samples), weighting=weighting, **OPTIONS[options])
            assert relative(found.kernel, expected.matrix) <= 1e-10, engine
            names = [n for n, p in model.named_parameters() if p.requires_grad]
            totals = [torch.stack(parts).sum(0) for parts in zip(*expected.x_gradients, strict=True)]
            largest = max(float(t.norm()) for t in totals)
            for name, total in zip(names, totals, strict=True):
                error = float((found.sums["X"][name] - total).norm())
                assert error <= 1e-10 * max(float(total.norm()), 1e-3 * largest), (engine, name)


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full, tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_definition(family: str, adapter: bool) -> None:
    assert_definition(family, adapter, "both")


@pytest.mark.parametrize("weighting", ["dr_grpo", "per_token", "sequence"])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_definition_of_every_coefficient(options: str, weighting: str) -> None:
    assert_definition("gpt2", True, options, weighting)


def test_clipping_takes_some_tokens_and_not_others() -> None:
    """Of the batch that the definition is compared on: otherwise it would not tell."""
    model = wide_model("gpt2", True)
    state = AdamState.from_optimizer(stepped_adamw(model), model)
    rollouts = rollouts_of(make_samples((2, 4, 3), seed=8))
    plain, clipped = (
        fast_delta_h1(model, state, rollouts, **options_of(**OPTIONS[options]))
        .sequences["update"]
        .coefficients["update"]
        for options in ("ratios", "clipped ratios")
    )
    assert bool((plain != clipped).any())
    assert bool((clipped != 0).any())


def test_one_response_a_prompt_needs_no_baseline() -> None:
    """The score function's leave-one-out baseline does; with token entropies it is only a smaller variance."""
    samples = make_samples((1, 3, 1), seed=3)
    assert_definition("gpt2", True, "token entropies", samples=samples)
    model = wide_model("gpt2", True)
    with pytest.raises(RolloutsError, match="1 response"):
        fast_delta_h1(model, stepped_adamw(model), rollouts_of(samples), **options_of())


@pytest.mark.parametrize("options", OPTIONS)
def test_responses_of_one_token(options: str) -> None:
    """Which the prompt alone predicts: nothing follows it in the row."""
    samples = [Sample(s.group, s.prompt, s.response[:1], s.advantage) for s in make_samples((2, 3, 2), seed=4)]
    assert_definition("gpt2", True, options, samples=samples)


EXACT = combinations(FAMILIES, ADAPTERS, CHECKPOINTING, tuple(BATCHES), paired=(0, 1, 2, 3))


@pytest.mark.parametrize(("family", "adapter", "checkpointing", "batch"), EXACT)
def test_exact_in_fp64(family: str, adapter: str, checkpointing: str, batch: str) -> None:
    model = widened(model_of(family, adapter))
    optimizer = stepped_adamw(model)
    rollouts = rollouts_of(BATCHES[batch](5), max_lengths=BUDGET)
    with computing_in_own_dtype(model), checkpointed(model, checkpointing):
        one, two = (
            observe(engine, model, optimizer, rollouts, **OPTIONS["both"]) for engine in ("one_pass", "two_pass")
        )
    assert_same_sums(one, two, 1e-10)
    assert_same_estimate(one, two, 1e-10)
    plan = one.result.diagnostics.plan
    assert plan.backwards == 3
    assert "columns whose coefficients differ from token to token take a backward each" in str(plan)
