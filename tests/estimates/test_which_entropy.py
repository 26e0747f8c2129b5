"""Which entropy is forecast: weightings apart from the update's, masks, the mean over all tokens, a policy's own temperature.

Legend: H_t entropy of the distribution that response token t is drawn from, m_t 1 where it counts, R = Σ m H / Σ m over the
batch, X_n^direct and X_n the direct and the whole gradient of prompt n, g_n its update gradient, Y_m = P g_m.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forecast_ways import ENGINES
from probe_options import options_of
from probe_oracle import models
from probe_oracle.batches import Shape, make_rollouts
from probe_oracle.oracle import cross_kernel, preconditioner, relative_error
from probe_oracle.token_gradients import groups_of, prompt_gradients_of, token_values
from torch import Tensor, nn

from entropy_fast import DeltaH1Result, Rollouts, fast_delta_h1
from entropy_fast.errors import ConfigError

Setup = tuple[nn.Module, torch.optim.Optimizer]
SHAPE = Shape(budget=2, empty=1)
WEIGHTINGS = ("dr_grpo", "per_token", "sequence", "pooled")

# Two ways that share every line about weightings and masks with the others.
OFTEN = [
    pytest.param(name, marks=[pytest.mark.exhaustive] if name in ("own logits", "second sweep") else [])
    for name in ENGINES
]

pytestmark = pytest.mark.filterwarnings("ignore:.*without response tokens were left out")


def forecast(setup: Setup, rollouts: Rollouts, entropy: Rollouts | None = None, **options: Any) -> DeltaH1Result:
    given = {"entropy_mask": options.pop("entropy_mask")} if "entropy_mask" in options else {}
    chosen = options_of(learning_rate=1.0, **{"entropy_estimator": "rao_blackwell", **options})
    return fast_delta_h1(*setup, rollouts, entropy_rollouts=entropy, **chosen, **given)


def close(found: object, expected: object, tolerance: float = 1e-9) -> None:
    assert relative_error(found, expected) < tolerance


def weights_of(rollouts: Rollouts, weighting: str, counted: Tensor) -> Tensor:
    """[N] w_i / G, from the definition."""
    groups = groups_of(rollouts)
    order = list(dict.fromkeys(rollouts.group_ids.tolist()))
    found = torch.zeros(rollouts.n_sequences, dtype=torch.float64)
    for members in groups:
        for row in members:
            length = float(counted[row].sum())
            found[row] = {
                "dr_grpo": 1 / float(rollouts.max_lengths[order.index(int(rollouts.group_ids[row]))]),  # type: ignore[index]
                "per_token": 1 / length if length else 0.0,
                "sequence": 1.0,
                "pooled": len(groups) * len(members) / float(counted.sum()),
            }[weighting] / len(members)
    return found


def coefficients_of(rollouts: Rollouts, h: Tensor, weighting: str, counted: Tensor) -> tuple[Tensor, Tensor]:
    """[N, T] c_t and e_t, token by token."""
    weights = weights_of(rollouts, weighting, counted)
    offset = float((h * counted).sum() / counted.sum()) if weighting == "pooled" else 0.0
    c, e = torch.zeros_like(h), weights[:, None] * counted
    for members in groups_of(rollouts):
        places = {row: (rollouts.loss_mask[row] == 1).nonzero().flatten().tolist() for row in members}

        def following(row: int, t: int, places: dict[int, list[int]] = places) -> float:
            chosen = places[row] if weighting == "per_token" else places[row][t + 1 :]
            own = sum(float(counted[row, k] * (h[row, k] - offset)) for k in chosen)
            return float(weights[row]) * own

        for row in members:
            for t, column in enumerate(places[row]):
                others = [j for j in members if j != row and (weighting == "per_token" or len(places[j]) > t)]
                compared = sum(following(j, t) for j in others) / len(others) if others else 0.0
                c[row, column] = following(row, t) - compared
    return c, e


def assert_forecast(
    result: DeltaH1Result,
    setup: Setup,
    rollouts: Rollouts,
    weighting: str,
    update: str,
    *,
    counted: Tensor | None = None,
    temperature: float = 1.0,
) -> None:
    counted = rollouts.loss_mask.double() if counted is None else counted
    h = token_values(setup[0], rollouts, temperature)[1].detach()
    c, e = coefficients_of(rollouts, h, weighting, counted)
    a = (
        rollouts.advantages[:, None]
        * rollouts.loss_mask
        * weights_of(rollouts, update, rollouts.loss_mask.double())[:, None]
    )
    y = prompt_gradients_of(setup[0], rollouts, a, None, temperature) * preconditioner(*setup)
    whole, direct = (
        cross_kernel(prompt_gradients_of(setup[0], rollouts, of_s, e, temperature), y) for of_s in (c, None)
    )
    B = len(y)
    assert result.split is not None
    for kernel, found in ((whole, result.split.total), (direct, result.split.direct)):
        close(found.value, (kernel.sum() - kernel.trace()) / (B * (B - 1)))
        rows = (kernel.sum(1) - kernel.diagonal()) / (B - 1)
        close(found.std_error, rows.std() / B**0.5)
    close(result.split.on_batch, direct.sum() / B**2)
    level = weights_of(rollouts, weighting, counted) @ (h * counted).sum(1) / B
    close(result.entropy_level, level)


@pytest.mark.parametrize("engine", OFTEN)
@pytest.mark.parametrize(
    ("weighting", "update"),
    [(w, u) for n, w in enumerate(WEIGHTINGS) for u in (WEIGHTINGS[n - 1], WEIGHTINGS[n])],
)
def test_entropy_and_update_are_weighed_apart(
    setups: dict[str, Setup], engine: str, weighting: str, update: str
) -> None:
    family, options = ENGINES[engine]
    setup, rollouts = setups[family], make_rollouts(SHAPE, models.VOCABULARY, 0)
    result = forecast(setup, rollouts, entropy_weighting=weighting, update_weighting=update, **options)
    assert_forecast(result, setup, rollouts, weighting, update)
    assert ("all response tokens" in result.entropy_functional) == (weighting == "pooled")


@pytest.mark.parametrize("engine", OFTEN)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_mask(setups: dict[str, Setup], engine: str, weighting: str) -> None:
    """Half of the tokens, all of the first response's and none of the second's."""
    family, options = ENGINES[engine]
    setup, rollouts = setups[family], make_rollouts(SHAPE, models.VOCABULARY, 1)
    mask = torch.randint(0, 2, rollouts.loss_mask.shape, generator=torch.Generator().manual_seed(2))
    first, second = groups_of(rollouts)[0][:2]
    mask[first], mask[second] = 1, 0
    result = forecast(setup, rollouts, weighting=weighting, entropy_mask=mask, **options)
    assert_forecast(result, setup, rollouts, weighting, weighting, counted=mask.double() * rollouts.loss_mask)
    assert "of the tokens that entropy_mask marks" in result.entropy_functional


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_a_policy_of_another_temperature(setups: dict[str, Setup], engine: str, temperature: float) -> None:
    family, options = ENGINES[engine]
    setup, rollouts = setups[family], make_rollouts(SHAPE, models.VOCABULARY, 2)
    result = forecast(setup, rollouts, policy_temperature=temperature, **options)
    assert_forecast(result, setup, rollouts, "dr_grpo", "dr_grpo", temperature=temperature)
    s = token_values(setup[0], rollouts, temperature)[0].detach().sum(1)
    kept = rollouts.loss_mask.sum(1) > 0
    close(result.sequences["update"].sequence_logprobs, s[kept])
    assert f"softmax(logits/{temperature})" in result.entropy_functional


@pytest.mark.parametrize("engine", ["two_pass", "one_pass", "jvp"])
@pytest.mark.parametrize("weighting", ["pooled", "per_token"])
def test_two_batches(setups: dict[str, Setup], engine: str, weighting: str) -> None:
    setup = setups["qwen2"]
    entropy, update = (make_rollouts(SHAPE, models.VOCABULARY, seed) for seed in (3, 4))
    result = forecast(
        setup,
        update,
        entropy,
        entropy_weighting=weighting,
        engine=engine,
        policy_temperature=0.8,
        update_weighting="sequence",
    )
    h = token_values(setup[0], entropy, 0.8)[1].detach()
    c, e = coefficients_of(entropy, h, weighting, entropy.loss_mask.double())
    a = (
        update.advantages[:, None]
        * update.loss_mask
        * weights_of(update, "sequence", update.loss_mask.double())[:, None]
    )
    step = prompt_gradients_of(setup[0], update, a, None, 0.8).mean(0) * preconditioner(*setup)
    assert result.split is not None
    for of_s, found in ((c, result.split.total), (None, result.split.direct)):
        rows = prompt_gradients_of(setup[0], entropy, of_s, e, 0.8) @ step
        close(found.value, rows.mean())
        close(found.std_error, rows.std() / len(rows) ** 0.5)


def test_the_mean_over_all_tokens_is_what_trainers_log(setups: dict[str, Setup]) -> None:
    """`on_batch` is the derivative of Σ m H / Σ m of this very batch along the step: by central differences."""
    setup = setups["tiny"]
    rollouts = make_rollouts(SHAPE, models.VOCABULARY, 5)
    model, _ = setup
    result = forecast(setup, rollouts, entropy_weighting="pooled", engine="one_pass")
    a = rollouts.advantages[:, None] * rollouts.loss_mask
    a = a * weights_of(rollouts, "dr_grpo", rollouts.loss_mask.double())[:, None]
    step = prompt_gradients_of(model, rollouts, a, None).mean(0) * preconditioner(*setup)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def logged(eta: float) -> float:
        parts = (eta * step).split([p.numel() for p in parameters])
        with torch.no_grad():
            for p, part in zip(parameters, parts, strict=True):
                p.add_(part.view_as(p))
            h = token_values(model, rollouts)[1]
            for p, part in zip(parameters, parts, strict=True):
                p.sub_(part.view_as(p))
        return float(h.sum() / rollouts.loss_mask.sum())

    eta = 1e-5 / float(step.norm())
    assert result.split is not None
    close(result.split.on_batch, (logged(eta) - logged(-eta)) / (2 * eta), 1e-6)
    close(result.entropy_level, logged(0.0))


def test_masks_that_cannot_be_meant(setups: dict[str, Setup]) -> None:
    rollouts = make_rollouts(SHAPE, models.VOCABULARY, 0)
    shape = rollouts.loss_mask.shape
    for mask, problem in (
        (torch.ones(shape[0], shape[1] + 1), "entropy_mask has shape"),
        (torch.full(shape, 0.5), "expected zeros and ones"),
        (torch.zeros(shape), "0 at every response token"),
    ):
        with pytest.raises(ConfigError, match=problem):
            forecast(setups["tiny"], rollouts, entropy_mask=mask)
    with pytest.raises(ConfigError, match="knows no entropy of single tokens"):
        forecast(setups["tiny"], rollouts, entropy_mask=torch.ones(shape), entropy_estimator="score_function")


END, SMALL = 0, 5


def every_response(prompts: list[list[int]]) -> Rollouts:
    """All responses of at most two tokens to every prompt, each a group of its own."""
    responses = [(END,), *((a, b) for a in range(1, SMALL) for b in range(SMALL))]
    rows = [(prompt, list(response)) for prompt in prompts for response in responses]
    width = max(len(prompt) for prompt in prompts) + 2
    ids, attention, loss = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(3))
    for row, (prompt, response) in enumerate(rows):
        both = len(prompt) + len(response)
        ids[row, :both] = torch.tensor(prompt + response)
        attention[row, :both] = 1
        loss[row, len(prompt) : both] = 1
    return Rollouts(
        ids,
        attention,
        loss,
        torch.arange(len(rows)),
        advantages=torch.zeros(len(rows)),
        max_lengths=3,
        temperature=0.6,
        top_p=1.0,
    )


@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
@pytest.mark.parametrize("weighting", ["sequence", "dr_grpo", "per_token"])
def test_a_tempered_policy_by_enumeration(engine: str, weighting: str) -> None:
    """At T = 0.6: the mean of X_n · V over every response is the derivative of the tempered policy's entropy along V."""
    torch.manual_seed(4)
    model = models.TinyTransformer(vocabulary=SMALL).double()
    optimizer = models.stepped_adam(model.train())
    prompts = [[1, 2, 3], [4, 2]]
    everything = every_response(prompts)
    update = make_rollouts(Shape(sizes=(3, 2), budget=1), SMALL, 1)
    result = forecast(
        (model, optimizer), update, everything, weighting=weighting, engine=engine, policy_temperature=0.6
    )
    a = update.advantages[:, None] * update.loss_mask  # type: ignore[index]
    a = a * weights_of(update, weighting, update.loss_mask.double())[:, None]
    step = prompt_gradients_of(model, update, a, None, 0.6).sum(0) * preconditioner(model, optimizer)
    w = weights_of(everything, weighting, everything.loss_mask.double())
    s = token_values(model, everything, 0.6)[0].detach()
    probability = s.sum(1).exp()
    assert float(probability.sum()) == pytest.approx(len(prompts), rel=1e-12)
    parameters = list(model.parameters())

    def entropy(eta: float) -> float:
        parts = (eta * step).split([p.numel() for p in parameters])
        with torch.no_grad():
            for p, part in zip(parameters, parts, strict=True):
                p.add_(part.view_as(p))
            logprobs, entropies = token_values(model, everything, 0.6)
            for p, part in zip(parameters, parts, strict=True):
                p.sub_(part.view_as(p))
        return float((logprobs.sum(1).exp() * w * entropies.sum(1)).sum())

    eta = 1e-5 / float(step.norm())
    close(probability @ result.row_sums, (entropy(eta) - entropy(-eta)) / (2 * eta), 1e-6)
