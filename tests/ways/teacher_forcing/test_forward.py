"""Teacher forcing: no sampler's temperature anywhere, padding that does not matter, log-probs aligned with their tokens."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil

import pytest
import torch
from probe_models.architectures import VOCABULARY, build_model
from probe_models.batches import make_rollouts, make_samples, pack
from torch import Tensor, nn

from entropy_fast.errors import ModelStateError
from entropy_fast.ways import teacher_forcing
from entropy_fast.ways.teacher_forcing import PaddedBatch, align_logprobs, model_logits, pad_rows

CPU = torch.device("cpu")


def everything_callable() -> list[tuple[str, object]]:
    found = []
    for info in pkgutil.iter_modules(teacher_forcing.__path__):
        module = importlib.import_module(f"{teacher_forcing.__name__}.{info.name}")
        for name, value in vars(module).items():
            if callable(value) and getattr(value, "__module__", None) == module.__name__:
                found.append((f"{module.__name__}.{name}", value))
    return found


def test_no_temperature_in_teacher_forcing_but_the_policy_s_own_which_is_1() -> None:
    found = everything_callable()
    names = {name.rpartition(".")[2] for name, _ in found}
    assert names >= {"align_logprobs", "model_logits", "pad_rows", "ForwardResult", "PaddedBatch"}
    for name, function in found:
        parameters = inspect.signature(function).parameters  # type: ignore[arg-type]
        found_here = {p: q.default for p, q in parameters.items() if "temp" in p.lower() or p.lower() == "tau"}
        assert found_here in ({}, {"temperature": 1.0}), name
        if inspect.isfunction(function):
            assert "rollouts.temperature" not in inspect.getsource(function), name
    for field in dataclasses.fields(PaddedBatch):
        assert "temp" not in field.name


def test_rows_are_packed_to_the_left_with_positions_counted_from_their_first_token() -> None:
    samples = make_samples()
    batch = pad_rows(pack(samples), torch.arange(len(samples)), CPU)
    for row, sample in enumerate(samples):
        tokens = [*sample.prompt, *sample.response]
        n, start = len(tokens), len(sample.prompt)
        assert batch.input_ids[row, :n].tolist() == tokens
        assert batch.attention_mask[row].tolist() == [1] * n + [0] * (batch.input_ids.shape[1] - n)
        assert batch.position_ids[row, :n].tolist() == list(range(n))
        assert batch.loss_mask[row].nonzero().squeeze(-1).tolist() == list(range(start, n))
    assert batch.input_ids.shape[1] == max(len(s.prompt) + len(s.response) for s in samples)
    assert batch.first_scored == min(len(s.prompt) for s in samples)


def test_log_probs_belong_to_the_token_after_their_logits() -> None:
    samples = make_samples()
    batch = pad_rows(pack(samples), torch.arange(len(samples)), CPU)
    generator = torch.Generator().manual_seed(0)
    width = batch.input_ids.shape[1]
    logits = torch.randn(len(samples), width - batch.first_scored, VOCABULARY, generator=generator, dtype=torch.float64)
    result = align_logprobs(logits, batch)
    for row, sample in enumerate(samples):
        total = 0.0
        for k, token in enumerate(sample.response):
            column = len(sample.prompt) + k  # the token's column; its logits are one column earlier
            line = logits[row, column - batch.first_scored]
            expected = float(line[token] - line.logsumexp(0))
            assert float(result.token_logprobs[row, column - 1]) == pytest.approx(expected, rel=1e-12)
            total += expected
        assert float(result.sequence_logprobs[row]) == pytest.approx(total, rel=1e-12)
    assert int((result.token_logprobs != 0).sum()) == sum(len(s.response) for s in samples)
    assert result.response_lengths.tolist() == [len(s.response) for s in samples]


@pytest.mark.parametrize(
    ("given", "kept"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_log_probs_accumulate_in_fp32_or_wider(given: torch.dtype, kept: torch.dtype) -> None:
    batch = pad_rows(make_rollouts(), torch.arange(3), CPU)
    logits = torch.zeros(3, batch.input_ids.shape[1] - batch.first_scored, VOCABULARY, dtype=given)
    assert align_logprobs(logits, batch).sequence_logprobs.dtype == kept


class Recorder(nn.Module):
    """A forward that takes what it names, and keeps what it was given."""

    def __init__(self, keep_every_column: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, VOCABULARY)
        self.keep_every_column = keep_every_column
        self.given: dict[str, object] = {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, logits_to_keep: int) -> Tensor:
        self.given = {"position_ids": position_ids, "logits_to_keep": logits_to_keep}
        logits: Tensor = self.table(input_ids)
        return logits if self.keep_every_column else logits[:, -logits_to_keep:]


@pytest.mark.parametrize("keep_every_column", [True, False])
def test_positions_are_passed_and_only_the_columns_that_are_scored_are_asked_for(keep_every_column: bool) -> None:
    batch = pad_rows(make_rollouts(), torch.arange(4), CPU)
    module = Recorder(keep_every_column)
    logits = model_logits(module, batch)
    width = batch.input_ids.shape[1]
    assert torch.equal(module.given["position_ids"], batch.position_ids)
    assert module.given["logits_to_keep"] == width - batch.first_scored + 1
    assert torch.equal(logits, module.table(batch.input_ids)[:, batch.first_scored - 1 : -1])


class Headless(nn.Module):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {}


def test_a_model_without_logits_is_refused() -> None:
    with pytest.raises(ModelStateError, match="without logits"):
        model_logits(Headless(), pad_rows(make_rollouts(), torch.arange(2), CPU))


def test_the_model_runs_without_a_cache() -> None:
    module = build_model()
    seen = []

    def look(inner: nn.Module, arguments: object, named: dict[str, object]) -> None:
        seen.append((named["use_cache"], named["position_ids"]))

    module.model.register_forward_pre_hook(look, with_kwargs=True)
    batch = pad_rows(make_rollouts(), torch.arange(2), CPU)
    model_logits(module, batch)
    assert seen[0][0] is False
    assert torch.equal(seen[0][1], batch.position_ids)
