"""run.json: round trip, and every way it can be wrong."""

from __future__ import annotations

import json

import pytest

from entropy_fast.config import EstimateOptions, RunOptions
from entropy_fast.errors import RunFolderError
from entropy_fast.run_folder.adapter import attach_adapter
from entropy_fast.run_folder.manifest import RunManifest, read_manifest, write_manifest
from entropy_fast.run_folder.model_source import ModelSource, load_model, load_tokenizer

ESTIMATE = EstimateOptions(
    weighting="sequence", learning_rate=1e-5, blocks=3, importance_ratio="token", clip_range=(0.2, 0.3)
)
RUN = RunOptions(engine="two_pass", memory_budget="1GiB", autocast_dtype="bfloat16", full_kernel=True, strict=True)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rollouts.jsonl").write_text("")
    (tmp_path / "optimizer.pt").write_text("")
    manifest = RunManifest(
        ModelSource("some/model", dtype="bfloat16", load_in_4bit=True),
        "rollouts.jsonl",
        "optimizer.pt",
        estimate=ESTIMATE,
        run=RUN,
    )
    write_manifest(manifest, tmp_path)
    return tmp_path


def change(folder, **fields):
    path = folder / "run.json"
    document = json.loads(path.read_text())
    for key, value in fields.items():
        target = document
        *parents, last = key.split("__")
        for parent in parents:
            target = target[parent]
        if value is ...:
            del target[last]
        else:
            target[last] = value
    path.write_text(json.dumps(document))


def test_round_trip(folder):
    manifest = read_manifest(folder)
    assert manifest.model == ModelSource("some/model", dtype="bfloat16", load_in_4bit=True)
    assert manifest.estimate == ESTIMATE
    assert manifest.run == RUN
    assert manifest.adapter is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schema": "entropy_fast.run/99"}, "schema"),
        ({"schema": "entropy_fast.run/1"}, "expected 'entropy_fast.run/2'"),
        ({"surprise": 1}, "unknown fields"),
        ({"rollouts": ...}, "missing fields"),
        ({"rollouts": 3}, "`rollouts` is 3"),
        ({"model": "a name"}, "model is a str, expected an object"),
        ({"model__dtype": "int8"}, "dtype"),
        ({"model__load_in_4bit": "yes"}, "load_in_4bit"),
        ({"model__nmae": "x"}, "unknown fields"),
        ({"model": ...}, "model is missing"),
        ({"probe": []}, "probe is a list"),
        ({"probe__full_kernel": True}, r"unknown fields \['full_kernel'\]"),
        ({"probe__estimate__blokcs": 2}, "unknown fields"),
        ({"probe__estimate__blocks": True}, "`blocks` is True"),
        ({"probe__estimate__blocks": 2.5}, "`blocks` is 2.5"),
        ({"probe__estimate__learning_rate": "1e-5"}, "`learning_rate` is '1e-5'"),
        ({"probe__estimate__learning_rate": float("nan")}, "NaN is no JSON"),
        ({"probe__estimate__importance_ratio": "none"}, "clip_range"),
        ({"probe__run__strict": "yes"}, "`strict` is 'yes'"),
        ({"probe__run__memory_budget": [1]}, "memory_budget"),
        ({"rollouts": "gone.jsonl"}, "no such file is there"),
        ({"rollouts": "."}, "no such file is there"),
        ({"rollouts": "a\0b"}, "null"),
        ({"adapter": "adapter"}, "no such folder is there"),
        ({"adapter": "rollouts.jsonl"}, "no such folder is there"),
        ({"rollouts": "../rollouts.jsonl"}, "outside the folder"),
        ({"optimizer": "/etc/hostname"}, "outside the folder"),
    ],
)
def test_a_wrong_field_is_named(folder, fields, message):
    change(folder, **fields)
    with pytest.raises(RunFolderError, match=message):
        read_manifest(folder)


def test_options_that_are_left_out_take_their_defaults(folder):
    change(folder, probe=...)
    manifest = read_manifest(folder)
    assert (manifest.estimate, manifest.run) == (EstimateOptions(), RunOptions())


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"run"', "[" * 100_000, " " * (2**20 + 1), "\x00"])
def test_a_broken_document(folder, content):
    (folder / "run.json").write_text(content)
    with pytest.raises(RunFolderError):
        read_manifest(folder)


def test_a_key_that_stands_twice(folder):
    text = (folder / "run.json").read_text()
    (folder / "run.json").write_text(text.replace('"strict": true', '"strict": true, "strict": false'))
    with pytest.raises(RunFolderError, match="the key 'strict' stands twice"):
        read_manifest(folder)


def test_no_document(tmp_path):
    with pytest.raises(RunFolderError, match=r"has no run\.json"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("package:no_such_package_here/model.gguf", "not installed"),
        ("package:os;evil/model.gguf", "not installed"),
        ("package:json/model.gguf", "no such file"),
        ("missing.gguf", "does not exist"),
    ],
)
def test_models_that_cannot_be_found(name, message):
    for load in (load_model, load_tokenizer):
        with pytest.raises(RunFolderError, match=message):
            load(ModelSource(name))


def test_an_empty_model_folder(tmp_path):
    with pytest.raises(RunFolderError, match="cannot be loaded"):
        load_model(ModelSource(str(tmp_path)))


def test_pickled_adapter_weights_are_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(RunFolderError, match="safetensors"):
        attach_adapter(None, tmp_path)
