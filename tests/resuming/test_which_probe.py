"""A checkpoint is gone on from by the very same probe alone; anything else is an error that names what differs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from ended_probes import CASES, SIZES, EndedError, all_of, probe
from probe_models.batches import make_rollouts

import entropy_fast.engines.probe_identity as identity_module
from entropy_fast import RunOptions, candidates
from entropy_fast.distributed import Team
from entropy_fast.errors import ConfigError, OutputFileError, ResumeError
from entropy_fast.integrations.forecast_options import ForecastOptions
from entropy_fast.resuming.folder import CheckpointFolder
from entropy_fast.truth import measure_delta_h, scored

OPTIONS = CASES["units' gradients not kept, next step"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder with the checkpoint of a probe that was ended."""
    folder = tmp_path_factory.mktemp("kept")
    with pytest.raises(EndedError):
        probe(folder, 6, **OPTIONS)
    return folder


def other_weight(model, optimizer):
    with torch.no_grad():
        next(p for p in model.parameters() if not p.requires_grad).view(-1)[7] += 1e-12


def other_adapter(model, optimizer):
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).view(-1)[0] += 1e-12


def other_moment(model, optimizer):
    optimizer.state[next(p for p in model.parameters() if p.requires_grad)]["exp_avg"].view(-1)[0] += 1e-12


def other_decay(model, optimizer):
    optimizer.param_groups[0]["weight_decay"] = 0.01


def other_buffer(model, optimizer):
    model.register_buffer("one_more", torch.ones(1))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"change": other_weight}, "other parameters of the model"),
        ({"change": other_adapter}, "other parameters of the model"),
        ({"change": other_moment}, "other state of the optimizer"),
        ({"change": other_decay}, "other settings of the optimizer"),
        ({"change": other_buffer}, "other buffers of the model"),
        ({"sizes": (3, 2, 2, 2)}, "other rollouts"),
        ({"fields": {"rollouts": make_rollouts(SIZES, seed=6)}}, "other rollouts"),
        ({"batches": 2}, "other rollouts|other update_rollouts"),
        ({"memory_budget": "1MiB"}, r"run option memory_budget \(0 there, '1MiB' here\)"),
        ({"learning_rate": 1e-5}, r"estimate option learning_rate \(None there, 1e-05 here\)"),
        ({"engine": "one_pass"}, "run option engine"),
        ({"fields": {"functionals": {"length": torch.arange(11.0)}}}, "other functionals, mask, update or scores"),
        ({"fields": {"updates": {"bonus": candidates.entropy_bonus(0.1)}}}, "functionals, mask, update or scores"),
    ],
)
def test_what_differs_is_named(kept, changed, said):
    before = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    with pytest.raises(ResumeError, match=f"another probe: .*({said})"):
        probe(kept, **{**OPTIONS, **changed})
    assert {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()} == before


def test_another_version_is_another_probe(kept, monkeypatch):
    monkeypatch.setattr(identity_module, "__version__", "0.0.0")
    with pytest.raises(ResumeError, match=r"version of entropy_fast \(.* there, 0.0.0 here\)"):
        probe(kept, **OPTIONS)


@pytest.mark.exhaustive
def test_a_loss_that_says_something_else_is_another(tmp_path):
    """Two functions of one type: what they say of the batch is what differs."""

    def loss_of(factor):
        mask = make_rollouts(SIZES).loss_mask.double()
        return lambda logprobs, entropies: -factor * (logprobs * mask).sum()

    with pytest.raises(EndedError):
        probe(tmp_path, 6, fields={"update": loss_of(1.0)}, **OPTIONS)
    with pytest.raises(ResumeError, match="its loss says something else"):
        probe(tmp_path, fields={"update": loss_of(2.0)}, **OPTIONS)
    found, _ = probe(tmp_path, fields={"update": loss_of(1.0)}, **OPTIONS)
    expected, _ = probe(None, fields={"update": loss_of(1.0)}, **OPTIONS)
    assert all_of(found) == all_of(expected)


def test_another_number_of_ranks(tmp_path):
    (tmp_path / "rank-1-of-2").mkdir(parents=True)
    (tmp_path / "rank-1-of-2" / "checkpoint.json").write_text("{}")
    with pytest.raises(ResumeError, match=r"written by 2 rank\(s\), and here are 1"):
        probe(tmp_path, **OPTIONS)


def test_two_at_once(kept):
    with CheckpointFolder.held(str(kept), Team.alone()), pytest.raises(ResumeError, match="another process"):
        probe(kept, **OPTIONS)


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputFileError, match="cannot be written"):
        probe(tmp_path / "file", **OPTIONS)
    assert (tmp_path / "file").read_text() == "mine"


def test_what_others_put_there_stays(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    own = tmp_path / "rank-0-of-1"
    own.mkdir()
    (own / "sums.safetensors").write_text("mine too")
    probe(tmp_path, **OPTIONS)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine.txt", "rank-0-of-1", "sums.safetensors"]


def test_what_keeps_no_checkpoint_refuses_one(tmp_path):
    run = RunOptions(checkpoint=tmp_path / "kept")
    assert run.checkpoint == str(tmp_path / "kept")
    with pytest.raises(ConfigError, match="engine 'jvp' has no use for it"):
        probe(tmp_path / "kept", engine="jvp", batches=2)
    with pytest.raises(ConfigError, match="engine 'two_pass': checkpoint with full_kernel"):
        probe(tmp_path / "kept", engine="two_pass", full_kernel=True)
    with pytest.raises(ConfigError, match="takes steps"):
        measure_delta_h(None, None, make_rollouts(SIZES), run=run)
    with pytest.raises(ConfigError, match="forwards alone"):
        scored(None, None, make_rollouts(SIZES), run=run)
    with pytest.raises(ConfigError, match="training loop"):
        ForecastOptions(run=run)
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"checkpoint": ""}, "is empty"),
        ({"checkpoint": 3}, "checkpoint"),
        ({"checkpoint_seconds": 5.0}, "without a checkpoint"),
        ({"checkpoint": "here", "checkpoint_seconds": -1}, "checkpoint_seconds"),
        ({"checkpoint": "here", "checkpoint_seconds": float("nan")}, "checkpoint_seconds"),
        ({"checkpoint": "here", "checkpoint_seconds": float("inf")}, "checkpoint_seconds"),
    ],
)
def test_options_that_say_nothing(given, said):
    with pytest.raises(ConfigError, match=said):
        RunOptions(**given)
    assert dataclasses.replace(RunOptions(checkpoint="here", checkpoint_seconds=0), checkpoint="there").changed()
