"""``.metadata`` of checkpoint folders: torch's own objects come out, and nothing that a pickle can name is run."""

from __future__ import annotations

import io
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as of_torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

from entropy_fast.step.checkpoint_metadata import STAND_INS, MetadataError, read_metadata

CONTENT: dict[str, Any] = {
    "optimizer": {
        "state": {"a.b": {"step": torch.tensor(3.0), "exp_avg": torch.randn(3, 4, dtype=torch.bfloat16)}},
        "param_groups": [{"params": ["a.b"], "lr": 1e-3}, {"params": [], "lr": torch.tensor(0.1)}],
    },
    "epoch": 3,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dcp.save(CONTENT, checkpoint_id=tmp_path / "saved", no_dist=True)
    return tmp_path / "saved"


@pytest.mark.filterwarnings("ignore")
def test_the_tables_are_torchs_own(folder: Path) -> None:
    found, expected = read_metadata(folder / ".metadata"), FileSystemReader(folder).read_metadata()
    assert found.items.keys() == expected.state_dict_metadata.keys()
    for name, item in expected.state_dict_metadata.items():
        own = found.items[name]
        assert type(own) is type(item)
        if isinstance(item, of_torch.TensorStorageMetadata):
            assert isinstance(own, of_torch.TensorStorageMetadata)
            assert (own.size, own.chunks, own.properties.dtype) == (item.size, item.chunks, item.properties.dtype)
    assert found.paths == expected.planner_data
    places = {index: (p.relative_path, p.offset, p.length) for index, p in found.pieces.items()}
    assert places == {index: (p.relative_path, p.offset, p.length) for index, p in expected.storage_data.items()}


def test_every_name_that_torch_writes_is_known_and_no_other(folder: Path) -> None:
    """What the file names is told by an unpickler that notes it; each stand-in is inert."""
    asked: set[tuple[str, str]] = set()

    class Noting(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            asked.add((module, name))
            return super().find_class(module, name)

    Noting(io.BytesIO((folder / ".metadata").read_bytes())).load()
    by_version = {("builtins", "getattr")}  # of members of an enumeration
    assert asked - STAND_INS.keys() - by_version == {("torch", "float32"), ("torch", "bfloat16")}
    assert all(kind.__module__ == read_metadata.__module__ for kind in STAND_INS.values())


class Calling:
    """Pickles as a call of something."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def with_inside(inside: Any) -> of_torch.Metadata:
    return of_torch.Metadata({}, planner_data=inside, storage_data={})


@pytest.mark.parametrize("wrap", [lambda call: call, with_inside, lambda call: [call], lambda call: {call: 1}])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_is_called(tmp_path: Path, wrap: Any, protocol: int) -> None:
    proof = tmp_path / "code_has_run"
    path = tmp_path / ".metadata"
    path.write_bytes(pickle.dumps(wrap(Calling(os.mkdir, str(proof))), protocol=protocol))
    with pytest.raises(MetadataError, match=r"it names posix\.mkdir, which no|it has the instruction"):
        read_metadata(path)
    assert not proof.exists()


@pytest.mark.parametrize(
    "function",
    [
        eval,
        exec,
        setattr,
        __import__,
        os.system,
        torch.load,
    ],
)
def test_other_names_are_refused_wherever_they_stand(tmp_path: Path, function: Any) -> None:
    path = tmp_path / ".metadata"
    path.write_bytes(pickle.dumps(with_inside({"x": function})))
    with pytest.raises(MetadataError):
        read_metadata(path)


@pytest.mark.parametrize(
    "arguments", [("text", "upper"), (torch.Size, "__class__"), (of_torch.ChunkStorageMetadata, "x")]
)
def test_members_of_anything_but_memory_formats_are_refused(tmp_path: Path, arguments: tuple[Any, ...]) -> None:
    path = tmp_path / ".metadata"
    path.write_bytes(pickle.dumps(with_inside({"x": Calling(getattr, *arguments)})))
    with pytest.raises(MetadataError, match=r"builtins\.getattr for something else"):
        read_metadata(path)


def test_a_memory_format_by_its_name_is_read(tmp_path: Path) -> None:
    """As Python before 3.11.4 writes it."""
    path = tmp_path / ".metadata"
    named = Calling(getattr, of_torch._MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT")
    path.write_bytes(pickle.dumps(with_inside({"x": named})))
    assert not read_metadata(path).items


@pytest.mark.parametrize("name", ["load", "hub", "nn", "Tensor", "float32.__class__", "_C", "ops"])
def test_of_torch_itself_there_are_dtypes_and_sizes(tmp_path: Path, name: str) -> None:
    path = tmp_path / ".metadata"
    path.write_bytes(b"\x80\x04\x8c\x05torch\x8c" + bytes([len(name)]) + name.encode() + b"\x93.")
    with pytest.raises(MetadataError, match="which no checkpoint of torch needs"):
        read_metadata(path)


def test_no_class_is_changed(tmp_path: Path) -> None:
    """BUILD sets attributes of whatever lies on the stack; on a class that would outlast the file."""
    before = {kind: dict(vars(kind)) for kind in STAND_INS.values()}
    for (module, name), kind in STAND_INS.items():
        names = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
        for state in (b"}\x8c\x01xK\x01s", b"N}\x8c\x01xK\x01s\x86"):
            (tmp_path / ".metadata").write_bytes(b"\x80\x04" + names + b"\x93" + state + b"b.")
            with pytest.raises(MetadataError, match="TypeError"):
                read_metadata(tmp_path / ".metadata")
        assert dict(vars(kind)) == before[kind]


def test_no_memory_is_taken_that_a_number_asks_for(tmp_path: Path) -> None:
    """LONG_BINPUT with a large place: the unpickler would make its table that long."""
    (tmp_path / ".metadata").write_bytes(b"\x80\x04Nr\xff\xff\xff\x7f.")
    with pytest.raises(MetadataError, match="it has the instruction LONG_BINPUT"):
        read_metadata(tmp_path / ".metadata")


def changed(folder: Path, change: Any) -> None:
    metadata = FileSystemReader(folder).read_metadata()
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def elsewhere(name: str) -> Any:
    def change(metadata: of_torch.Metadata) -> None:
        for place in metadata.storage_data.values():
            place.relative_path = name

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *[
            (elsewhere(name), "something else than a file of the folder")
            for name in ("../x", "/etc/passwd", "a/b", "..", "", "a\0")
        ],
        (lambda m: setattr(next(iter(m.storage_data.values())), "offset", -1), "no place in its file"),
        (lambda m: setattr(next(iter(m.storage_data.values())), "length", 1.5), "no place in its file"),
        (
            lambda m: setattr(next(iter(m.storage_data.values())), "transform_descriptors", ["zstd"]),
            "compressed or otherwise transformed",
        ),
        (lambda m: setattr(m, "state_dict_metadata", None), "lacks its tables"),
        (lambda m: setattr(m, "storage_data", [1]), "lacks its tables"),
        (lambda m: m.planner_data.update({"epoch": "epoch"}), "no row of names and numbers"),
        (lambda m: m.planner_data.update({"epoch": (1.5,)}), "no row of names and numbers"),
        (lambda m: m.state_dict_metadata.update({"epoch": 3}), "objects are not those"),
        (lambda m: m.state_dict_metadata.update({7: of_torch.BytesStorageMetadata()}), "no text"),
    ],
)
def test_tables_that_cannot_be_used_are_refused(folder: Path, change: Any, message: str) -> None:
    changed(folder, change)
    with pytest.raises(MetadataError, match=message):
        read_metadata(folder / ".metadata")


@pytest.mark.parametrize("cases", [200, pytest.param(20_000, marks=pytest.mark.exhaustive)])
def test_damaged_bytes_are_refused_or_read(folder: Path, cases: int) -> None:
    path, draw, refused = folder / ".metadata", random.Random(0), 0
    content = path.read_bytes()
    for _ in range(cases):
        data = bytearray(content)
        for _ in range(draw.choice([1, 1, 4])):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(bytes(data[: draw.choice([len(data), len(data), draw.randrange(len(data))])]))
        try:
            read_metadata(path)
        except MetadataError:
            refused += 1
    assert refused > cases / 4
