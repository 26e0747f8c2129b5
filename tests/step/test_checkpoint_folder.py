"""Folders of torch.distributed.checkpoint: what the live optimizer has, by name, and no more read than that takes."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import metadata as of_torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from entropy_fast.errors import OptimizerStateError
from entropy_fast.step import AdamState, adam_state_from_file, optimizer_from_file
from entropy_fast.step.optimizer_file import is_adams

pytestmark = pytest.mark.filterwarnings("ignore")  # torch remarks that there is no process group


class Layers(nn.Module):
    """Layers of one shape: nothing but names tells their parameters apart."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(3, 3, dtype=torch.float64) for _ in range(3)])
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))


def trained(named: bool = False) -> tuple[Layers, torch.optim.Optimizer]:
    """Two groups, the last layers first."""
    model = Layers()
    pick = (lambda layer: list(layer.named_parameters())) if named else (lambda layer: list(layer.parameters()))
    late, early = [*pick(model.layers[2]), *pick(model.layers[1])], pick(model.layers[0])
    if named:
        late = [(f"layers.{2 - n // 2}.{name}", p) for n, (name, p) in enumerate(late)]
        early = [(f"layers.0.{name}", p) for name, p in early]
    optimizer = torch.optim.AdamW([{"params": late, "lr": 3e-3}, {"params": early}], lr=1e-3, betas=(0.8, 0.95))
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()
    return model, optimizer


def assert_as_live(found: AdamState, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    live = AdamState.from_optimizer(optimizer, model)
    assert found.groups == live.groups
    assert dict(found.group_of) == dict(live.group_of)
    assert found.moments.keys() == live.moments.keys()
    for name, expected in live.moments.items():
        own = found.moments[name]
        assert own.step == expected.step and own.first_moment is not None and expected.first_moment is not None
        assert own.second_moment.dtype == torch.float64
        assert torch.equal(own.second_moment, expected.second_moment) and torch.equal(
            own.first_moment, expected.first_moment
        )


def saved(content: Any, folder: Path) -> Path:
    dcp.save(content, checkpoint_id=folder / "checkpoint", no_dist=True)
    return folder / "checkpoint"


def nested(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"optimizer": get_optimizer_state_dict(model, optimizer)}


FORMS: dict[str, Any] = {
    "as accelerate saves it": nested,
    "by itself": lambda model, optimizer: get_optimizer_state_dict(model, optimizer),
    "in an application's state": lambda model, optimizer: {
        "app": {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer)}
    },
    "flattened": lambda model, optimizer: {
        "model": model.state_dict(),
        "optimizer": get_optimizer_state_dict(
            model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True)
        ),
    },
}


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_moments_are_the_optimizers_by_name(tmp_path: Path, form: str, converted: bool) -> None:
    """And so they are in the file that torch makes of such a folder."""
    model, optimizer = trained()
    path = saved(FORMS[form](model, optimizer), tmp_path)
    if converted:
        dcp_to_torch_save(path, tmp_path / "optimizer.pt")
        path = tmp_path / "optimizer.pt"
    found = adam_state_from_file(path, model)
    assert_as_live(found, optimizer, model)
    assert [note for note in found.notes if "guessed" in note] == []


def test_whose_file_it_is(tmp_path: Path) -> None:
    model, optimizer = trained()
    assert is_adams(saved(nested(model, optimizer), tmp_path), model)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    assert is_adams(tmp_path / "optimizer.pt", model)
    muon = torch.optim.Muon([p for p in model.parameters() if p.dim() == 2])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    muon.step()
    torch.save(muon.state_dict(), tmp_path / "muon.pt")
    for p in model.parameters():
        p.requires_grad_(p.dim() == 2)
    assert not is_adams(tmp_path / "muon.pt", model)
    assert not is_adams(saved(nested(model, muon), tmp_path / "muon"), model)


@pytest.mark.parametrize("named", [False, True])
def test_an_optimizer_that_numbers_its_parameters(tmp_path: Path, named: bool) -> None:
    """``dcp.save({"optimizer": optimizer})``; numbers have become texts."""
    model, optimizer = trained(named)
    found = adam_state_from_file(saved({"optimizer": optimizer}, tmp_path), model)
    if named:
        assert_as_live(found, optimizer, model)
    else:  # nothing tells layers of one shape apart, and that is said
        assert "order was guessed" in found.notes[0]


def test_two_optimizers_in_one_folder(tmp_path: Path) -> None:
    model = Layers()
    muon = torch.optim.Muon([p for p in model.parameters() if p.dim() == 2])
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.dim() == 1])
    for p in model.parameters():
        p.grad = torch.ones_like(p) * p
    for one in (muon, adamw):
        one.step()
    path = saved({"both": get_optimizer_state_dict(model, [muon, adamw])}, tmp_path)
    live = optimizer_from_file(path, model).live
    assert live is not None
    for p in model.parameters():
        (expected,) = [one.state[p] for one in (muon, adamw) if p in one.state]
        assert live.state[p].keys() == expected.keys()
        assert all(torch.equal(live.state[p][key], value) for key, value in expected.items())


@pytest.mark.parametrize("how", ["frozen", "not asked for"])
def test_no_more_is_read_than_is_needed(tmp_path: Path, how: str) -> None:
    """Everything but the state of the trainable parameters, or of those that are asked for, may be overwritten."""
    model, optimizer = trained()
    path = saved({"model": model.state_dict(), **nested(model, optimizer)}, tmp_path)
    if how == "frozen":
        for index in (0, 2):
            model.layers[index].requires_grad_(False)
    metadata = FileSystemReader(path).read_metadata()
    kept = [
        place
        for index, place in metadata.storage_data.items()
        if "param_groups" in index.fqn or "state.layers.1." in index.fqn
    ]
    others = [place for place in metadata.storage_data.values() if place not in kept]
    assert len(others) == 6 + 4 * 3
    for place in others:
        blank(path / place.relative_path, place.offset, place.length)
    only = ["layers.1.weight", "layers.1.bias"] if how == "not asked for" else None
    found = optimizer_from_file(path, model, only).state
    assert set(found.moments) == {"layers.1.weight", "layers.1.bias"}
    live = AdamState.from_optimizer(optimizer, model)
    assert all(torch.equal(m.second_moment, live.moments[name].second_moment) for name, m in found.moments.items())
    blank(path / kept[0].relative_path, kept[0].offset, kept[0].length)
    with pytest.raises(OptimizerStateError, match="does not begin as an archive"):
        adam_state_from_file(path, model)


def blank(file: Path, offset: int, length: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset : offset + length] = bytes(length)
    file.write_bytes(bytes(data))


def test_one_flipped_bit_in_a_moment_is_seen(tmp_path: Path) -> None:
    model, optimizer = trained()
    path = saved(nested(model, optimizer), tmp_path)
    (file,) = path.glob("*.distcp")
    data = bytearray(file.read_bytes())
    moment = optimizer.state[model.layers[1].weight]["exp_avg_sq"]
    data[data.index(moment.numpy().tobytes()) + 9] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(OptimizerStateError, match="checksum of record"):
        adam_state_from_file(path, model)


def changed(path: Path, change: Any) -> None:
    metadata = FileSystemReader(path).read_metadata()
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


WEIGHT = "optimizer.state.layers.1.weight.exp_avg_sq"


def chunk(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> of_torch.ChunkStorageMetadata:
    return of_torch.ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))


def with_chunks(*chunks: of_torch.ChunkStorageMetadata) -> Any:
    def change(metadata: of_torch.Metadata) -> None:
        metadata.state_dict_metadata[WEIGHT].chunks = list(chunks)  # type: ignore[union-attr]
        place = next(p for index, p in metadata.storage_data.items() if index.fqn == WEIGHT)
        metadata.storage_data.update({of_torch.MetadataIndex(WEIGHT, c.offsets): place for c in chunks})

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_chunks(), "do not make up the whole"),
        (with_chunks(chunk((0, 0), (2, 3))), "do not make up the whole"),
        (
            with_chunks(chunk((0, 0), (2, 3)), chunk((1, 0), (1, 3))),
            "do not make up the whole",
        ),  # one row twice, one never
        (with_chunks(chunk((0, 0), (2, 3)), chunk((2, 0), (2, 3))), "do not make up the whole"),
        (with_chunks(chunk((0,), (9,))), "do not make up the whole"),
        (lambda m: m.storage_data.pop(next(i for i in m.storage_data if i.fqn == WEIGHT)), "is stored nowhere"),
        (lambda m: setattr(next(iter(m.storage_data.values())), "relative_path", "gone"), "its file 'gone' is missing"),
        (lambda m: setattr(next(iter(m.storage_data.values())), "length", 10**9), "ends before its content"),
        (lambda m: setattr(m.state_dict_metadata[WEIGHT], "size", torch.Size((9, 9))), "do not make up the whole"),
        (lambda m: m.planner_data.update({WEIGHT: ("optimizer", "param_groups", 7, "lr")}), "lacks some of its items"),
        (
            lambda m: m.planner_data.update({WEIGHT: ("optimizer", "param_groups")}),
            "inside of a value|not a table|list",
        ),
    ],
)
def test_folders_whose_parts_do_not_fit_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    model, optimizer = trained()
    path = saved(nested(model, optimizer), tmp_path)
    changed(path, change)
    with pytest.raises(OptimizerStateError, match=message):
        adam_state_from_file(path, model)


def test_a_folder_that_would_run_code_is_refused_with_the_way_out(tmp_path: Path) -> None:
    model, optimizer = trained()
    path, proof = saved(nested(model, optimizer), tmp_path), tmp_path / "code_has_run"

    class Calling:
        def __reduce__(self) -> Any:
            return Path.mkdir, (proof,)

    changed(path, lambda m: setattr(m, "planner_data", Calling()))
    with pytest.raises(OptimizerStateError, match="which no checkpoint of torch needs and which is not run") as refusal:
        adam_state_from_file(path, model)
    assert "dcp_to_torch_save(folder, 'optimizer.pt')" in refusal.value.fix and not proof.exists()


def test_a_value_that_would_run_code_is_refused(tmp_path: Path) -> None:
    """torch's own planner unpickles values with ``weights_only=False``."""
    proof = tmp_path / "code_has_run"
    model, optimizer = trained()
    content = nested(model, optimizer)

    class Calling:
        def __reduce__(self) -> Any:
            return Path.mkdir, (proof,)

    content["optimizer"]["param_groups"][0]["weight_decay"] = Calling()
    path = saved(content, tmp_path)
    with pytest.raises(OptimizerStateError, match="Weights only load failed"):
        adam_state_from_file(path, model)
    assert not proof.exists()


def test_a_folder_without_an_optimizer(tmp_path: Path) -> None:
    model, _ = trained()
    path = saved({"model": model.state_dict()}, tmp_path)
    with pytest.raises(OptimizerStateError, match="has no 'param_groups' of an optimizer"):
        adam_state_from_file(path, model)


@pytest.mark.parametrize("name", ["optimizer.pt", "optimizer.bin", "optimizer_0"])
def test_a_trainers_folder_is_told_what_to_pass(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(OptimizerStateError, match=rf"folder without the \.metadata .*, and has {name}") as refusal:
        adam_state_from_file(tmp_path, Layers())
    assert refusal.value.fix == f"pass {tmp_path / name}."
