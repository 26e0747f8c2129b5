"""The ``.metadata`` of a folder of torch.distributed.checkpoint, read without running anything.

The file is a pickle, and a pickle can name any function of any module to be called. This unpickler knows the few names that
such a file needs and gives an inert stand-in for each: it imports nothing, calls nothing of torch, and refuses every other
name. What comes out is checked, and torch's own objects are made of it here.
"""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import pickletools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as of_torch

__all__ = ["CheckpointTables", "MetadataError", "StoredPiece", "read_metadata"]


class MetadataError(ValueError):
    """What is wrong with the file, for an error that names the folder."""


@dataclasses.dataclass(frozen=True)
class StoredPiece:
    """Where a piece of a tensor, or a value, lies.

    Attributes:
        relative_path: name of a file in the folder.
        offset: its first byte there.
        length: how many bytes.
        transform_descriptors: what it was compressed with; nothing.
    """

    relative_path: str
    offset: int
    length: int
    transform_descriptors: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class CheckpointTables:
    """What a checkpoint folder holds.

    Attributes:
        items: by name, what torch needs to know of a tensor and its pieces, or that it is a value.
        paths: by name, the keys that lead to it in what was saved: texts of tables, numbers of lists.
        pieces: where they lie.
    """

    items: Mapping[str, of_torch.STORAGE_TYPES]
    paths: Mapping[str, tuple[str | int, ...]]
    pieces: Mapping[of_torch.MetadataIndex, StoredPiece]


class _Record:
    """Stands in for an object: its state, kept as it is."""

    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Metadata(_Record):
    pass


class _Tensor(_Record):
    pass


class _Value(_Record):
    pass


class _Chunk(_Record):
    pass


class _Properties(_Record):
    pass


class _Index(_Record):
    pass


class _Storage(_Record):
    pass


class _Unread:
    """Stands in for what is not looked at: layouts, memory formats, where it was written."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


class _Size(tuple[int, ...]):
    """Stands in for torch.Size."""

    def __setstate__(self, state: object) -> None:
        raise MetadataError("a size has a state")


_METADATA, _FILESYSTEM = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
STAND_INS: Mapping[tuple[str, str], type] = {
    (_METADATA, "Metadata"): _Metadata,
    (_METADATA, "TensorStorageMetadata"): _Tensor,
    (_METADATA, "BytesStorageMetadata"): _Value,
    (_METADATA, "ChunkStorageMetadata"): _Chunk,
    (_METADATA, "TensorProperties"): _Properties,
    (_METADATA, "MetadataIndex"): _Index,
    (_METADATA, "StorageMeta"): _Unread,
    (_METADATA, "_MEM_FORMAT_ENCODING"): _Unread,
    (_FILESYSTEM, "_StorageInfo"): _Storage,
    ("torch", "Size"): _Size,
    ("torch.serialization", "_get_layout"): _Unread,
    ("pathlib", "PosixPath"): _Unread,
    ("pathlib", "WindowsPath"): _Unread,
    ("pathlib._local", "PosixPath"): _Unread,
    ("pathlib._local", "WindowsPath"): _Unread,
}


# What pickle writes for such tables since its fourth protocol. Not among them: instructions that put something at a place of
# the file's choice into the unpickler's memory, which it would make as large as that takes.
INSTRUCTIONS = frozenset(
    {"PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINGET", "LONG_BINGET", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD"}
    | {"EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS", "NONE", "NEWTRUE", "NEWFALSE"}
    | {"EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
    | {"SHORT_BINUNICODE", "BINUNICODE"}
)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name; a dtype is its own name.

        Raises:
            MetadataError: the name is none that a checkpoint needs.
        """
        if (module, name) in STAND_INS:
            return STAND_INS[module, name]
        if (module, name) == ("builtins", "getattr"):
            # How enumerations are written before Python 3.11.4. A new function each time: what BUILD does to it stays here.
            return lambda kind, member: _member(kind, member)
        if module == "torch" and name.isidentifier() and isinstance(getattr(torch, name, None), torch.dtype):
            return name
        raise MetadataError(f"it names {module}.{name}, which no checkpoint of torch needs and which is not run")


def _member(kind: object, name: object) -> object:
    """Stands in for the member of an enumeration, of those that are not looked at alone.

    Raises:
        MetadataError: it is of something else.
    """
    if kind is not _Unread or not isinstance(name, str):
        raise MetadataError("it names builtins.getattr for something else than a memory format, which is not run")
    return _Unread()


def read_metadata(path: Path) -> CheckpointTables:
    """Read the file.

    Args:
        path: of ``.metadata``.

    Raises:
        MetadataError: it names something else than such a file needs, is damaged, or points outside of its folder.
        OSError: it cannot be opened.
    """
    with open(path, "rb") as file:
        content = file.read()
    try:
        for instruction, _, _ in pickletools.genops(content):
            if instruction.name not in INSTRUCTIONS:
                raise MetadataError(f"it has the instruction {instruction.name}, which no checkpoint of torch has")
        found = _Unpickler(io.BytesIO(content)).load()
    except MetadataError:
        raise
    except Exception as error:  # damage shows as any of a dozen exceptions
        raise MetadataError(f"it is damaged or none of torch's ({type(error).__name__})") from error
    table = _state(found, _Metadata)
    items = {str(name): _item(of_name) for name, of_name in _table(table.get("state_dict_metadata")).items()}
    if not all(isinstance(name, str) for name in _table(table.get("state_dict_metadata"))):
        raise MetadataError("it has a name that is no text")
    planned = table.get("planner_data")
    paths = {name: _path(name, {} if planned is None else _table(planned)) for name in items}
    pieces = {_index(key): _piece(value) for key, value in _table(table.get("storage_data")).items()}
    return CheckpointTables(items, paths, pieces)


def _item(found: object) -> of_torch.STORAGE_TYPES:
    if isinstance(found, _Value):
        return of_torch.BytesStorageMetadata()
    table = _state(found, _Tensor)
    properties, chunks = table.get("properties"), table.get("chunks")
    state = properties.state if isinstance(properties, _Properties) else None
    name = state[0] if isinstance(state, tuple) and state else None
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype) or not isinstance(chunks, list):
        raise MetadataError("a tensor has no dtype or no pieces")
    found_chunks = []
    for chunk in chunks:
        of_chunk = _state(chunk, _Chunk)
        found_chunks.append(
            of_torch.ChunkStorageMetadata(offsets=_size(of_chunk.get("offsets")), sizes=_size(of_chunk.get("sizes")))
        )
    return of_torch.TensorStorageMetadata(
        properties=of_torch.TensorProperties(dtype=dtype), size=_size(table.get("size")), chunks=found_chunks
    )


def _path(name: str, planned: Mapping[Any, Any]) -> tuple[str | int, ...]:
    path = planned.get(name, (name,))
    if not isinstance(path, tuple) or not path or not all(type(part) in (str, int) for part in path):
        raise MetadataError("the way to an item is no row of names and numbers")
    return path


def _index(found: object) -> of_torch.MetadataIndex:
    table = _state(found, _Index)
    name, offset = table.get("fqn"), table.get("offset")
    if not isinstance(name, str):
        raise MetadataError("a piece has no name")
    return of_torch.MetadataIndex(name, None if offset is None else _size(offset))


def _piece(found: object) -> StoredPiece:
    table = _state(found, _Storage)
    name, offset, length = (table.get(key) for key in ("relative_path", "offset", "length"))
    if not isinstance(name, str) or not name or name in (".", "..") or os.path.basename(name) != name or "\0" in name:
        raise MetadataError("a piece lies in something else than a file of the folder")
    if type(offset) is not int or type(length) is not int or offset < 0 or length < 0:
        raise MetadataError("a piece has no place in its file")
    if table.get("transform_descriptors"):
        raise MetadataError("its pieces are compressed or otherwise transformed")
    return StoredPiece(name, offset, length)


def _size(found: object) -> torch.Size:
    if not isinstance(found, (_Size, tuple, list)) or not all(type(n) is int and 0 <= n < 1 << 62 for n in found):
        raise MetadataError("a size is no row of numbers")
    return torch.Size(found)


def _state(found: object, kind: type[_Record]) -> Mapping[str, Any]:
    """The fields of an object; one without any is empty."""
    state = found.state if isinstance(found, kind) else None
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise MetadataError("its objects are not those of such a file")
    return state


def _table(found: object) -> Mapping[Any, Any]:
    if not isinstance(found, dict):
        raise MetadataError("it lacks its tables")
    return found
