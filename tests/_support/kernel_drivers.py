"""Call files: how calls get to kernels in another program, and their results back (tests/ops/drivers/call_file.h).

A call file is an image of memory: blobs of bytes, which of their bytes are addresses of what, and which blobs are structs to
call an op with. The program runs the calls and writes all blobs back.
"""

from __future__ import annotations

import dataclasses
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
DRIVERS = REPOSITORY / "tests" / "ops" / "drivers"
CSRC = REPOSITORY / "csrc"
ELEMENT_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# The number of each op in a call file, and the fields of its struct in csrc/ as the struct module writes them.
OPS = {
    "token_logprobs_forward": (0, "@5P4qi0q"),
    "token_logprobs_backward": (1, "@8P5qi0q"),
    "softmax_block": (2, "@4P4qd?i0q"),
    "precondition_accumulate": (3, "@5P2q2d?0q"),
    "sums_of_blocks": (4, "@5P2qi0q"),
    "unit_products": (5, "@6P10qi0q"),
    "rms_norm_forward": (6, "@4P2qdi0q"),
    "rms_norm_backward": (7, "@5P2qi0q"),
    "gated_silu_forward": (8, "@3P2qi0q"),
    "gated_silu_backward": (9, "@5P2qi0q"),
    "packed_attention_forward": (10, "@PqqPqqPqqPqqPqq2P7qdPi0q"),
    "packed_attention_backward": (11, "@PqqPqqPqqPqqPqq2P7qdPqq7P3qi0q"),
}


class Place(NamedTuple):
    """Where in the image something is."""

    blob: int
    offset: int = 0


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@dataclasses.dataclass
class CallImage:
    """What a call file holds.

    Attributes:
        guard: bytes of poison after each blob, where a result that reaches too far is found; 0 for a program that a
            sanitizer watches.
    """

    guard: int = 64
    blobs: list[bytes] = dataclasses.field(default_factory=list)
    relocations: list[tuple[int, int, int, int]] = dataclasses.field(default_factory=list)
    calls: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    def add(self, data: Tensor | bytes, *, misaligned_by: int = 0) -> Place:
        """Take these bytes into the image, so many bytes past a multiple of 64."""
        content = data if isinstance(data, bytes) else bytes_of(data)
        self.blobs.append(b"\xff" * misaligned_by + content + b"\xff" * self.guard)
        return Place(len(self.blobs) - 1, misaligned_by)

    def poison(self, size: int) -> Place:
        """Room for results. All bits set is a NaN in every element type: what a kernel forgets to write is seen."""
        return self.add(b"\xff" * size)

    def point(self, where: Place, target: Place) -> None:
        """Let the eight bytes there hold the address of ``target``."""
        self.relocations.append((*where, *target))

    def call(self, op: str, *fields: Place | float | None) -> None:
        """Call ``op`` with these fields; a place is passed as its address, None as null."""
        number, layout = OPS[op]
        values = [0 if field is None or isinstance(field, Place) else field for field in fields]
        self.blobs.append(struct.pack(layout, *values))
        blob = len(self.blobs) - 1
        for index, field in enumerate(fields):
            if isinstance(field, Place):  # Addresses come before any field that is not eight bytes long.
                self.point(Place(blob, 8 * index), field)
        self.calls.append((number, blob))

    def file_content(self) -> bytes:
        sizes = [len(blob) for blob in self.blobs]
        numbers = [len(sizes), len(self.relocations), len(self.calls), *sizes]
        numbers += [number for entry in (*self.relocations, *self.calls) for number in entry]
        return struct.pack(f"={len(numbers)}q", *numbers) + b"".join(self.blobs)

    def results(self, content: bytes) -> CallResults:
        blobs, begin = [], 0
        for blob in self.blobs:
            blobs.append(content[begin : begin + len(blob)])
            begin += len(blob)
        assert begin == len(content)
        return CallResults(blobs)


@dataclasses.dataclass(frozen=True)
class CallResults:
    """All blobs after the calls."""

    blobs: list[bytes]

    def tensor(self, place: Place, dtype: torch.dtype, *shape: int) -> Tensor:
        """The values from ``place`` on, poison where the blob ends early; what follows them must still be poison."""
        result = torch.empty(shape, dtype=dtype)
        size = result.numel() * dtype.itemsize
        content = self.blobs[place.blob][place.offset :]
        assert content[size:] == b"\xff" * (len(content) - size), "written past the end"
        if size:
            result = torch.frombuffer(bytearray(content[:size].ljust(size, b"\xff")), dtype=dtype).view(shape)
        return result


def run_image(command: Sequence[str], image: CallImage, folder: Path, timeout: float = 120) -> CallResults:
    """The results of ``command CALLS RESULTS``; a failure or a hang of the program is one of the test."""
    calls, results = folder / "calls", folder / "results"
    calls.write_bytes(image.file_content())
    done = subprocess.run(
        [*command, str(calls), str(results)], capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, f"{command} exited with {done.returncode}:\n{done.stdout}{done.stderr}"
    return image.results(results.read_bytes())


def compile_driver(compiler: str, sources: Sequence[Path], output: Path, *flags: str) -> Path:
    includes = ["-I", str(CSRC), "-I", str(DRIVERS)]
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", *includes, *flags]
    done = subprocess.run(
        [*command, *map(str, sources), "-o", str(output), "-pthread", "-ldl"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return output
