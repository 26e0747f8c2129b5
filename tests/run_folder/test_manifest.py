"""run.json: round trip, and every way it can be wrong."""

from __future__ import annotations

import json

import pytest

from entropy_fast.errors import RunFolderError
from entropy_fast.run_folder.manifest import ProbeSettings, RunManifest, read_manifest, write_manifest
from entropy_fast.run_folder.model_source import ModelSource, attach_adapter, load_model, load_tokenizer


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rollouts.jsonl").write_text("")
    (tmp_path / "optimizer.pt").write_text("")
    manifest = RunManifest(
        ModelSource("some/model", dtype="bfloat16", load_in_4bit=True),
        "rollouts.jsonl",
        "optimizer.pt",
        probe=ProbeSettings(weighting="sequence", learning_rate=1e-5, blocks=3, mode="blocks"),
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
    assert manifest.probe == ProbeSettings(weighting="sequence", learning_rate=1e-5, blocks=3, mode="blocks")
    assert manifest.adapter is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schema": "entropy_fast.run/99"}, "schema"),
        ({"surprise": 1}, "unknown fields"),
        ({"rollouts": ...}, "missing fields"),
        ({"rollouts": 3}, "`rollouts` is 3"),
        ({"model": "a name"}, "`model` is 'a name'"),
        ({"model__dtype": "int8"}, "dtype"),
        ({"model__load_in_4bit": "yes"}, "load_in_4bit"),
        ({"model__nmae": "x"}, "unknown fields"),
        ({"probe__blocks": True}, "blocks"),
        ({"probe__blocks": 2.5}, "blocks"),
        ({"probe__learning_rate": "1e-5"}, "learning_rate"),
        ({"rollouts": "gone.jsonl"}, "not there"),
        ({"adapter": "adapter"}, "not there"),
        ({"rollouts": "../rollouts.jsonl"}, "outside the folder"),
        ({"optimizer": "/etc/hostname"}, "outside the folder"),
    ],
)
def test_a_wrong_field_is_named(folder, fields, message):
    change(folder, **fields)
    with pytest.raises(RunFolderError, match=message):
        read_manifest(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"run"'])
def test_a_broken_document(folder, content):
    (folder / "run.json").write_text(content)
    with pytest.raises(RunFolderError):
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
