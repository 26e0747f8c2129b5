"""Damaged run.json, adapters and bases: what loads has every weight from the files, and all else is an error of ours."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import JUNK, damaged_bytes, damaged_value, refused
from peft import LoraConfig, get_peft_model
from safetensors.torch import load, save_file
from small_policy import policy, saved_model
from torch import nn

from entropy_fast.config import EstimateOptions, RunOptions
from entropy_fast.run_folder.adapter import attach_adapter
from entropy_fast.run_folder.manifest import RunManifest, read_manifest, write_manifest
from entropy_fast.run_folder.model_source import ModelSource, load_model

MANIFESTS = [400, pytest.param(10_000, marks=pytest.mark.exhaustive)]
# A model takes tens of milliseconds to load.
MODELS = [25, pytest.param(1_500, marks=pytest.mark.exhaustive)]
# What JSON has no word for.
JSON_JUNK = [value for value in JUNK if not isinstance(value, str) or value.isprintable()]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    saved_model(folder / "base")
    torch.manual_seed(2)
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(policy(), lora).save_pretrained(str(folder / "adapter"))
    return folder


@pytest.mark.parametrize("count", MANIFESTS)
@pytest.mark.parametrize("kind", ["bytes", "values"])
def test_run_json(tmp_path: Path, kind: str, count: int) -> None:
    chance, errors = random.Random(f"run.json {kind}"), 0
    for name in ("rollouts.jsonl", "optimizer.pt"):
        (tmp_path / name).write_text("")
    manifest = RunManifest(
        ModelSource("some/model"),
        "rollouts.jsonl",
        "optimizer.pt",
        estimate=EstimateOptions(weighting="sequence", learning_rate=1e-5, blocks=3),
        run=RunOptions(memory_budget="1GiB", strict=True),
    )
    write_manifest(manifest, tmp_path)
    path = tmp_path / "run.json"
    good = path.read_bytes()
    assert not refused(lambda: read_manifest(tmp_path), "the good file")
    for _ in range(count):
        if kind == "bytes":
            bad = damaged_bytes(good, chance)
        else:
            bad = json.dumps(damaged_value(json.loads(good), chance, JSON_JUNK)).encode()
        path.write_bytes(bad)
        errors += refused(lambda: read_manifest(tmp_path), bad)
    assert errors > count // 4, "most damage is seen"


def damaged_tensors(path: Path, chance: random.Random) -> None:
    """Whole and readable, with tensors gone, doubled, renamed, of another shape or dtype."""
    tensors = load(path.read_bytes())
    for _ in range(chance.randint(1, 3)):
        name = chance.choice(sorted(tensors))
        tensor = tensors[name]
        change = chance.randrange(6)
        if change == 0:
            del tensors[name]
        elif change == 1:
            tensors[name + "x"] = tensors.pop(name)
        elif change == 2:
            tensors[name] = tensor[:1].clone()
        elif change == 3:
            tensors[name] = tensor.t().clone() if tensor.dim() == 2 else tensor[None].clone()
        elif change == 4:
            tensors[name] = tensor.to(chance.choice([torch.bfloat16, torch.int8, torch.float64, torch.bool]))
        else:
            tensors[chance.choice([name.replace("layers.0", "layers.7"), "lm_head.bias"])] = tensor.clone()
        if not tensors:
            break
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def damage(folder: Path, weights: str, config: str, chance: random.Random) -> None:
    kind = chance.randrange(4)
    if kind == 0:
        (folder / weights).write_bytes(damaged_bytes((folder / weights).read_bytes(), chance))
    elif kind == 1:
        damaged_tensors(folder / weights, chance)
    elif kind == 2:
        (folder / config).write_bytes(damaged_bytes((folder / config).read_bytes(), chance))
    else:
        changed = damaged_value(json.loads((folder / config).read_text()), chance, JSON_JUNK)
        (folder / config).write_text(json.dumps(changed))


def nothing_made_up(module: nn.Module, path: Path, name_in_file: Callable[[str], str | None]) -> None:
    """Every parameter is what the file says, in the module's dtype."""
    tensors = load(path.read_bytes())
    for name, parameter in module.named_parameters():
        stored_as = name_in_file(name)
        if stored_as is not None:
            expected = tensors[stored_as].to(parameter.dtype)
            assert torch.equal(parameter.detach().nan_to_num(), expected.nan_to_num()), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", MODELS)
def test_bases(stored: Path, tmp_path: Path, count: int) -> None:
    chance, errors = random.Random("bases"), 0
    folder = tmp_path / "base"
    for _ in range(count):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(stored / "base", folder)
        damage(folder, "model.safetensors", "config.json", chance)
        loaded: list[Any] = []

        def read(into: list[Any] = loaded) -> None:
            into.append(load_model(ModelSource(str(folder))))

        if refused(read, (folder / "config.json").read_bytes()):
            errors += 1
        else:
            tied = loaded[0].config.tie_word_embeddings
            nothing_made_up(
                loaded[0],
                folder / "model.safetensors",
                lambda name, tied=tied: None if tied and "head" in name else name,
            )
    assert errors > count // 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", MODELS)
def test_adapters(stored: Path, tmp_path: Path, count: int) -> None:
    chance, errors = random.Random("adapters"), 0
    folder, base = tmp_path / "adapter", load_model(ModelSource(str(stored / "base")))
    for _ in range(count):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(stored / "adapter", folder)
        damage(folder, "adapter_model.safetensors", "adapter_config.json", chance)
        loaded: list[Any] = []

        def read(into: list[Any] = loaded) -> None:
            into.append(attach_adapter(copy.deepcopy(base), folder))

        if refused(read, (folder / "adapter_config.json").read_bytes()):
            errors += 1
        else:
            nothing_made_up(
                loaded[0],
                folder / "adapter_model.safetensors",
                lambda name: name.replace(".default.", ".") if "lora" in name else None,
            )
    assert errors > count // 3
