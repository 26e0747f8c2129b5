"""An optimizer's state from a folder of torch.distributed.checkpoint, in one process and without a process group.

Settings of groups are read first, then the state of those parameters alone that are asked for, by torch's own reader. As with
a single file, checksums are compared before anything is unpickled, and nothing in the folder is executed.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from entropy_fast.errors import OptimizerStateError
from entropy_fast.step.checkpoint_metadata import CheckpointTables, MetadataError, read_metadata
from entropy_fast.step.optimizer_archive import check_archive
from entropy_fast.step.scalars import shown

__all__ = ["METADATA", "read_checkpoint_folder"]

METADATA = ".metadata"
Keys = tuple[str | int, ...]


def read_checkpoint_folder(folder: Path, wanted: Callable[[str], bool]) -> object:
    """Groups of all optimizers in a folder, and the state of some of their parameters, as nested tables.

    Args:
        folder: of ``torch.distributed.checkpoint.save``, whatever the number of processes that wrote it.
        wanted: whether the state of a parameter of this name is needed. State by number is read whole.

    Raises:
        OptimizerStateError: it is no such folder, damaged, holds anything but tensors and plain values, or no optimizer.
    """
    try:
        tables = read_metadata(folder / METADATA)
        roots = _roots(tables.paths.values())
        chosen = [name for name, path in tables.paths.items() if _is_needed(path, roots, wanted)]
        if not chosen:
            raise _refused(folder, "it has no 'param_groups' of an optimizer")
        values = _load(folder, tables, chosen)
        return _nested({tables.paths[name]: values[name] for name in chosen})
    except OptimizerStateError:
        raise
    except MetadataError as error:
        raise _refused(folder, f"{METADATA}: {error}") from error
    except Exception as error:  # a damaged folder can fail anywhere in torch's reader
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise _refused(folder, f"{type(error).__name__}: {lines[0]}") from error


class _PlainPlanner(DefaultLoadPlanner):
    """torch's, with values read as plain containers too; torch's own lets them run code."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, map_location="cpu", weights_only=True)


def _load(folder: Path, tables: CheckpointTables, chosen: list[str]) -> Mapping[str, Any]:
    """The values of some items."""
    items = {name: tables.items[name] for name in chosen}
    indices = [index for name, item in items.items() for index in _indices(name, item)]
    _check_pieces(folder, tables, indices)
    state_dict: dict[str, Any] = {}
    for name, item in items.items():
        if isinstance(item, TensorStorageMetadata):
            _check_cover(folder, name, item)
            state_dict[name] = torch.empty(item.size, dtype=item.properties.dtype)
        else:
            state_dict[name] = None
    metadata = Metadata(dict(items), storage_data=dict(tables.pieces))
    reader, planner = FileSystemReader(folder), _PlainPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(state_dict, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    reader.read_data(planner.finish_plan(plan), planner).wait()
    return planner.state_dict


def _indices(name: str, item: object) -> list[MetadataIndex]:
    """Of the pieces that are not empty."""
    if isinstance(item, TensorStorageMetadata):
        return [MetadataIndex(name, chunk.offsets) for chunk in item.chunks if math.prod(chunk.sizes)]
    return [MetadataIndex(name)]


def _check_pieces(folder: Path, tables: CheckpointTables, indices: Iterable[MetadataIndex]) -> None:
    """Compare the checksums of everything that will be read."""
    by_file: dict[str, list[MetadataIndex]] = {}
    for index in indices:
        if index not in tables.pieces:
            raise _refused(folder, f"a piece of {shown(index.fqn)} is stored nowhere")
        by_file.setdefault(tables.pieces[index].relative_path, []).append(index)
    for name, its_indices in by_file.items():
        path = folder / name
        if not path.is_file():
            raise _refused(folder, f"its file {shown(name)} is missing")
        with open(path, "rb") as file:
            for index in its_indices:
                piece = tables.pieces[index]
                file.seek(piece.offset)
                content = file.read(piece.length)
                if len(content) < piece.length:
                    raise _refused(folder, f"its file {shown(name)} ends before its content does")
                check_archive(f"{path} ({index.fqn})", io.BytesIO(content))


def _check_cover(folder: Path, name: str, item: TensorStorageMetadata) -> None:
    """Every element has to come from one piece and no other: what is in no piece would be whatever memory held."""
    pieces = sorted((tuple(c.offsets), tuple(c.sizes)) for c in item.chunks)
    inside = all(
        len(offsets) == len(sizes) == len(item.size)
        and all(o + s <= n for o, s, n in zip(offsets, sizes, item.size, strict=True))
        for offsets, sizes in pieces
    )
    counted = sum(math.prod(sizes) for _, sizes in pieces)
    if not inside or counted != math.prod(item.size) or _overlapping(pieces):
        raise _refused(folder, f"the pieces of {shown(name)} do not make up the whole of shape {list(item.size)}")


def _overlapping(pieces: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether two boxes share an element; boxes are sorted by where they begin."""
    filled = [(offsets, sizes) for offsets, sizes in pieces if math.prod(sizes)]
    for place, (offsets, sizes) in enumerate(filled):
        for others, other_sizes in filled[place + 1 :]:
            if offsets and others[0] >= offsets[0] + sizes[0]:
                break  # all that follow begin behind this one
            if all(a < b + m and b < a + n for a, n, b, m in zip(offsets, sizes, others, other_sizes, strict=True)):
                return True
    return False


def _roots(paths: Iterable[Keys]) -> frozenset[Keys]:
    """Where optimizers lie: what stands in front of 'param_groups'."""
    return frozenset(
        path[:depth]
        for path in paths
        for depth, part in enumerate(path)
        if isinstance(part, str) and (part == "param_groups" or part.startswith("param_groups."))
    )


def _is_needed(path: Keys, roots: frozenset[Keys], wanted: Callable[[str], bool]) -> bool:
    for depth, part in enumerate(path):
        if path[:depth] not in roots or not isinstance(part, str):
            continue
        if part == "param_groups" or part.startswith("param_groups."):
            return True
        if part == "state" and depth + 1 < len(path):
            name = str(path[depth + 1])
            return name.isdigit() or wanted(name)
        if part.startswith("state."):
            inside = part.split(".")[1:]
            return any(wanted(".".join(inside[:n])) for n in range(1, len(inside)))
    return False


class _Node(dict[str | int, Any]):
    """A table or a list that is being put together; a value's own tables are none."""


def _nested(values: Mapping[Keys, Any]) -> object:
    """Tables of tables, and lists where numbers lead on."""
    root = _Node()
    for path, value in values.items():
        place = root
        for part in path[:-1]:
            place = place.setdefault(part, _Node())
            if not isinstance(place, _Node):
                raise ValueError("an item lies inside of a value")
        place[path[-1]] = value
    return _with_lists(root)


def _with_lists(node: object) -> object:
    if not isinstance(node, _Node):
        return node
    found = {key: _with_lists(value) for key, value in node.items()}
    if all(isinstance(key, int) for key in found):
        if sorted(found) != list(range(len(found))):
            raise ValueError("a list lacks some of its items")
        return [found[place] for place in range(len(found))]
    return found


def _refused(folder: Path, problem: str) -> OptimizerStateError:
    return OptimizerStateError(
        f"checkpoint folder {folder} cannot be read: {problem}.",
        fix="take another copy; or, where it was written and if you trust it (this runs what is in it), make a file of it with "
        "torch.distributed.checkpoint.format_utils.dcp_to_torch_save(folder, 'optimizer.pt'), and pass that.",
    )
