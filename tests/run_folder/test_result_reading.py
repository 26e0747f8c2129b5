"""What is read from a folder is the result that was written there."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from small_policy import saved_run, tokenizer

from entropy_fast import EstimateOptions, RunOptions, fast_delta_h1, read_rollouts
from entropy_fast.errors import ResultError
from entropy_fast.run_folder.adapter import attach_adapter
from entropy_fast.run_folder.model_source import ModelSource, load_model
from entropy_fast.run_folder.provenance import provenance_of
from entropy_fast.run_folder.response_table import response_table
from entropy_fast.run_folder.result_files import read_result_document, result_document, write_result
from entropy_fast.run_folder.result_reading import read_result

SETTINGS = {
    "default": {},
    "next step, by token": {"estimate": {"step": "next"}, "run": {"by_token": True, "by_sequence": True}},
    "score function": {"estimate": {"entropy_estimator": "score_function"}},
    "direct alone": {"estimate": {"parts": ("direct",), "step": "next"}, "run": {"by_token": True}},
    "ratios": {"estimate": {"importance_ratio": "token", "clip_range": 0.2}},
    "blocks": {"estimate": {"blocks": 2}},
    "reference engine": {"estimate": {"step": "adam_static"}, "run": {"engine": "two_pass"}},
    "two batches": {"estimate": {}, "run": {"by_sequence": True}, "two": True},
    "jvp": {"run": {"engine": "jvp"}, "two": True},
}


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    folder = saved_run(tmp_path_factory.mktemp("run"))
    model = attach_adapter(load_model(ModelSource(str(folder / "base"))), folder / "adapter")
    rollouts = read_rollouts(folder / "rollouts.jsonl")
    old = torch.where(rollouts.loss_mask == 1, -2.0, 0.0)
    rollouts = dataclasses.replace(rollouts, old_logprobs=old)
    other = dataclasses.replace(rollouts, input_ids=rollouts.input_ids.roll(3, 0), group_ids=rollouts.group_ids + 10)

    def run(setting):
        batches = {"entropy": other, "update": rollouts} if setting.get("two") else {"both": rollouts}
        result = fast_delta_h1(
            model,
            folder / "optimizer.pt",
            rollouts,
            entropy_rollouts=batches.get("entropy"),
            functionals={"reward": next(iter(batches.values())).rewards},
            estimate=EstimateOptions(**setting.get("estimate", {})),
            run=RunOptions(**setting.get("run", {})),
        )
        return result, batches

    return run


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_read_is_what_was_written(probe, tmp_path, name):
    result, batches = probe(SETTINGS[name])
    table = response_table(result, batches, tokenizer())
    provenance = provenance_of([["entropy-fast", "probe", "a b"]], ModelSource("small"), {"rollouts": tmp_path})
    write_result(result, tmp_path, provenance=provenance, responses=table)
    found = read_result(tmp_path)
    written, again = result_document(result), result_document(found.result)
    for document in (written, again):
        document["diagnostics"].pop("plan")
        document.pop("derivatives")  # left out
    assert again == written
    assert str(found.result.plan) == str(result.plan)
    assert found.result.plan.not_taken == result.plan.not_taken
    assert found.result.explain() == result.explain()
    assert found.result.verdict.sentence == result.verdict.sentence
    assert str(found.result) == str(result)
    assert found.provenance == provenance
    assert found.provenance.commands == ("entropy-fast probe 'a b'",)
    assert len(found.responses) == sum(batch.n_sequences for batch in batches.values())
    if result.by_token is not None:
        shares = [response.shares for response in found.responses if response.shares is not None]
        for part, expected in (("total", result.forecast.value), ("direct", result.split.direct.value)):
            every = [x for own in shares for x in getattr(own, part)]
            assert abs(sum(every) - expected) < 1e-5 * sum(map(abs, every))
    assert repr(found.result.forecast.interval()) == repr(result.forecast.interval())


def test_without_responses_and_provenance_they_are_not_known(probe, tmp_path):
    result, _ = probe({})
    write_result(result, tmp_path)
    found = read_result(tmp_path)
    assert found.responses is None
    assert found.provenance is None
    assert found.result.delta_h1 == result.delta_h1


def test_a_changed_file_or_field_is_named(probe, tmp_path):
    result, batches = probe({})
    write_result(result, tmp_path, responses=response_table(result, batches))
    path = tmp_path / "result.json"
    document = json.loads(path.read_text())
    for field, value in (
        ("forecast", None),
        ("entropy_level", "high"),
        ("row_sums", 3),
        ("estimate", "three_batches"),
        ("provenance", {"commands": 1}),
        ("per_prompt", [{}]),
    ):
        path.write_text(json.dumps({**document, field: value}))
        with pytest.raises(ResultError, match=field):
            read_result(tmp_path)
    path.write_text(json.dumps(document))
    assert read_result_document(tmp_path) == document
    responses = tmp_path / "responses.parquet"
    responses.write_bytes(responses.read_bytes()[:-1])
    with pytest.raises(ResultError, match=r"responses\.parquet"):
        read_result(tmp_path)
