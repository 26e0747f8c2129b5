"""No weight of a policy is a random number: what loading reports as missing, unexpected or misshapen is an error."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from small_policy import policy, saved_model

from entropy_fast.cli.app import run
from entropy_fast.cli.exit_status import ExitStatus
from entropy_fast.errors import RunFolderError
from entropy_fast.run_folder import adapter as adapters
from entropy_fast.run_folder.adapter import attach_adapter
from entropy_fast.run_folder.model_source import ModelSource, load_model


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    saved_model(folder / "base")
    torch.manual_seed(2)
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    get_peft_model(policy(), lora).save_pretrained(str(folder / "adapter"))
    return folder


@pytest.fixture
def folder(stored, tmp_path) -> Path:
    return Path(shutil.copytree(stored, tmp_path / "models"))


def change(path: Path, edit) -> None:
    tensors = load_file(path)
    save_file({name: tensor.contiguous() for name, tensor in edit(tensors).items()}, path, metadata={"format": "pt"})


def without(part: str):
    def edit(tensors):
        kept = {name: tensor for name, tensor in tensors.items() if part not in name}
        assert len(kept) == len(tensors) - 1
        return kept

    return edit


def renamed(old: str, new: str):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def load(folder: Path):
    return attach_adapter(load_model(ModelSource(str(folder / "base"))), folder / "adapter")


def test_a_whole_model_and_adapter_load_to_the_bit(folder):
    model = load(folder)
    expected = {**load_file(folder / "adapter" / "adapter_model.safetensors")}
    assert len(expected) == 2 * 2 * 2 + 1
    found = dict(model.named_parameters())
    for name, tensor in expected.items():
        stem, _, kind = name.rpartition(".")
        target = f"{stem}.modules_to_save.default.{kind}" if "lm_head" in name else f"{stem}.default.{kind}"
        assert torch.equal(found[target], tensor)
        assert found[target].requires_grad


def test_tied_weights_are_not_missing(tmp_path):
    model = policy()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(str(tmp_path))
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load_model(ModelSource(str(tmp_path)))
    assert torch.equal(loaded.lm_head.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (without("layers.1.mlp.up_proj"), "lacks 'model.layers.1.mlp.up_proj.weight'"),
        (lambda tensors: {}, "and 18 more"),
        (renamed("model.layers", "transformer.h"), "unknown to the model, 'transformer.h.0"),
        (lambda tensors: {**tensors, "model.stray": torch.ones(2)}, "unknown to the model, 'model.stray'"),
        (lambda tensors: {**tensors, "model.norm.weight": torch.ones(7)}, "model.norm.weight"),
    ],
    ids=["one tensor missing", "empty", "renamed", "one too many", "another shape"],
)
def test_a_base_whose_weights_are_not_the_model_s(folder, edit, named):
    change(folder / "base" / "model.safetensors", edit)
    with pytest.raises(RunFolderError) as caught:
        load_model(ModelSource(str(folder / "base")))
    assert named in caught.value.problem


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (without("layers.1.self_attn.q_proj.lora_B"), "lacks 'base_model.model.model.layers.1.self_attn.q_proj.lora_B"),
        (without("layers.0.mlp.down_proj.lora_A"), "down_proj.lora_A"),
        (without("lm_head"), "lm_head"),
        (
            renamed("model.model.layers", "model._orig_mod.model.layers"),
            "unknown to the model, 'base_model.model._orig_mod.",
        ),
        (renamed("base_model.model.model.", "_orig_mod.base_model.model.model."), "model, '_orig_mod.base_model."),
        (renamed("lora_A.weight", "lora_A.other.weight"), "lora_A"),
        (lambda tensors: {}, "lm_head"),
        (lambda tensors: {**tensors, "base_model.model.stray.lora_A.weight": torch.ones(2)}, "stray"),
        (lambda tensors: {name: tensor[:1] for name, tensor in tensors.items()}, "does not fit the model"),
    ],
    ids=[
        "no lora_B",
        "no lora_A",
        "no saved module",
        "compiled inside",
        "compiled outside",
        "another adapter's name",
        "empty",
        "one too many",
        "another shape",
    ],
)
def test_an_adapter_whose_weights_are_not_the_model_s(folder, edit, named):
    change(folder / "adapter" / "adapter_model.safetensors", edit)
    with pytest.raises(RunFolderError) as caught:
        load(folder)
    assert named in caught.value.problem


def test_every_command_that_loads_a_model_refuses(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    change(folder / "base" / "model.safetensors", without("layers.1.mlp.up_proj"))
    optimizer, rows, tasks = (tmp_path / name for name in ("optimizer.pt", "rollouts.jsonl", "tasks.jsonl"))
    torch.save({}, optimizer)
    row = {"group_id": 0, "prompt_token_ids": [3], "response_token_ids": [4, 5]}
    rows.write_text("".join(json.dumps({**row, "reward": reward}) + "\n" for reward in (0.0, 1.0)))
    tasks.write_text(json.dumps({"prompt": "1 plus 1 is", "answer": "2"}) + "\n")
    model = ["--model", str(folder / "base")]
    for command in (
        ["probe", *model, "--optimizer", str(optimizer), "--rollouts", str(rows), "--out", str(tmp_path / "out")],
        ["sample", str(tasks), *model, "--out", str(tmp_path / "sampled.jsonl")],
        ["doctor", *model],
    ):
        assert run(command) == ExitStatus.REFUSED
        assert "lacks 'model.layers.1.mlp.up_proj.weight'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "sampled.jsonl").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\xff" * 64 + b[64:]])
def test_a_damaged_base_is_a_sentence(folder, name, damage):
    path = folder / "base" / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RunFolderError, match="cannot be loaded"):
        load_model(ModelSource(str(folder / "base")))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\xff" * 64 + b[64:]])
def test_a_damaged_adapter_is_a_sentence(folder, name, damage):
    path = folder / "adapter" / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RunFolderError):
        load(folder)


def configure(folder: Path, **fields) -> None:
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": r"((.*)*)*x\.y"},
        {"exclude_modules": r"(.+)+#"},
        {"rank_pattern": {r"(.|.|.)+#": 2}},
    ],
)
def test_a_pattern_that_runs_for_ever_is_ended(folder, fields, monkeypatch):
    monkeypatch.setattr(adapters, "PATTERN_SECONDS", 0.5)
    configure(folder, **fields)
    with pytest.raises(RunFolderError, match="regular expressions"):
        load(folder)


def test_patterns_that_come_to_an_end_are_taken(folder):
    configure(folder, target_modules=r".*\.(q_proj|down_proj)", rank_pattern={"q_proj": 2})
    assert load(folder).peft_config["default"].target_modules == r".*\.(q_proj|down_proj)"
    configure(folder, target_modules="(")
    with pytest.raises(RunFolderError, match="cannot be used"):
        load(folder)


def test_a_configuration_nested_too_deep_is_a_sentence(folder):
    (folder / "adapter" / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(RunFolderError, match=r"adapter_config\.json"):
        load(folder)
    (folder / "base" / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(RunFolderError, match="cannot be loaded"):
        load(folder)


@pytest.mark.parametrize("field", ["num_hidden_layers", "vocab_size"])
def test_a_configuration_that_asks_for_more_than_the_files_hold(folder, field):
    """Neither by the time that so many layers take to build nor by the memory of so many weights."""
    path = folder / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: 10**9}))
    with pytest.raises(RunFolderError, match="far more weights than its files"):
        load_model(ModelSource(str(folder / "base")))


@pytest.mark.parametrize("part", ["base", "adapter"])
def test_a_pipe_among_the_files_does_not_hang(folder, part):
    os.mkfifo(folder / part / "extra.json")
    with pytest.raises(RunFolderError, match=r"extra\.json is not a file"):
        load(folder)


def write_gguf(path: Path, *, left_out: str | None = None, extra: str | None = None) -> None:
    """A Llama of one layer in llama.cpp's format."""
    gguf = pytest.importorskip("gguf")
    width, inner, keys, words = 16, 24, 8, 23
    shapes = {
        "token_embd": (words, width), "output_norm": (width,), "output": (words, width),
        "blk.0.attn_norm": (width,), "blk.0.attn_q": (width, width), "blk.0.attn_k": (keys, width),
        "blk.0.attn_v": (keys, width), "blk.0.attn_output": (width, width), "blk.0.ffn_norm": (width,),
        "blk.0.ffn_gate": (inner, width), "blk.0.ffn_up": (inner, width), "blk.0.ffn_down": (width, inner),
    }  # fmt: skip
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(words)
    generator = np.random.default_rng(0)
    for name, shape in {**shapes, **({extra: (width,)} if extra else {})}.items():
        if name != left_out:
            writer.add_tensor(f"{name}.weight", generator.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_whole_gguf_loads(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    model = load_model(ModelSource(str(tmp_path / "m.gguf")))
    assert sum(p.numel() for p in model.parameters()) == 2 * 23 * 16 + 3 * 16 + 2 * 16 * 16 + 2 * 8 * 16 + 3 * 24 * 16


@pytest.mark.parametrize(
    ("left_out", "named"), [("blk.0.ffn_up", "mlp.up_proj.weight"), ("blk.0.attn_norm", "input_layernorm.weight")]
)
def test_a_gguf_that_lacks_a_tensor(tmp_path, left_out, named):
    write_gguf(tmp_path / "m.gguf", left_out=left_out)
    with pytest.raises(RunFolderError, match=re.escape(named)) as caught:
        load_model(ModelSource(str(tmp_path / "m.gguf")))
    assert "lacks" in str(caught.value)
