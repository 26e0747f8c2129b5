"""Run ``_native`` on a call file, without torch: started where importing torch would take minutes, or would not do at all.

Arguments: the module's file, a call file (tests/ops/drivers/call_file.h), where to write the blobs after the calls, and the
number of threads, 1 unless given. Prints the instruction set that was selected.
"""

from __future__ import annotations

import ctypes
import importlib.util
import struct
import sys
from pathlib import Path

ALIGNMENT = 64
FUNCTIONS = (
    ("token_logprobs_forward_cpu", "@5P4qi0q"),
    ("token_logprobs_backward_cpu", "@8P5qi0q"),
    ("softmax_block_cpu", "@4P4qd?i0q"),
    ("precondition_accumulate_cpu", "@5P2q2d?0q"),
    ("sums_of_blocks_cpu", "@5P2qi0q"),
    ("unit_products_cpu", "@6P10qi0q"),
    ("rms_norm_forward_cpu", "@4P2qdi0q"),
    ("rms_norm_backward_cpu", "@5P2qi0q"),
    ("gated_silu_forward_cpu", "@3P2qi0q"),
    ("gated_silu_backward_cpu", "@5P2qi0q"),
    ("packed_attention_forward_cpu", "@PqqPqqPqqPqqPqq2P7qdPi0q"),
    ("packed_attention_backward_cpu", "@PqqPqqPqqPqqPqq2P7qdPqq7P3qi0q"),
)


def allocate(size: int) -> int:
    """Memory from malloc's family that ends with its last byte: a sanitizer sees what is read or written beyond."""
    address = ctypes.c_void_p()
    if ctypes.CDLL(None).posix_memalign(ctypes.byref(address), ctypes.c_size_t(ALIGNMENT), ctypes.c_size_t(size)):
        raise MemoryError
    return address.value


def main(module: str, calls: str, results: str, threads: str = "1") -> None:
    spec = importlib.util.spec_from_file_location("entropy_fast._native", module)
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)

    data = Path(calls).read_bytes()
    n_blobs, n_relocations, n_calls = struct.unpack_from("=3q", data)
    count = 3 + n_blobs + 4 * n_relocations + 2 * n_calls
    numbers = struct.unpack_from(f"={count}q", data)
    sizes, relocations, calls_to_make = numbers[3:][:n_blobs], numbers[3 + n_blobs :], numbers[count - 2 * n_calls :]
    addresses, begin = [], 8 * count
    for size in sizes:
        addresses.append(allocate(size))
        ctypes.memmove(addresses[-1], data[begin : begin + size], size)
        begin += size
    for index in range(n_relocations):
        blob, offset, target, at = relocations[4 * index : 4 * index + 4]
        ctypes.c_uint64.from_address(addresses[blob] + offset).value = addresses[target] + at
    for index in range(n_calls):
        op, blob = calls_to_make[2 * index : 2 * index + 2]
        name, layout = FUNCTIONS[op]
        fields = list(struct.unpack(layout, ctypes.string_at(addresses[blob], sizes[blob])))
        if layout.endswith("i0q"):
            fields[-1] = native.ElementType(fields[-1])
        getattr(native, name)(*fields, int(threads))
    with Path(results).open("wb") as file:
        for address, size in zip(addresses, sizes, strict=True):
            file.write(ctypes.string_at(address, size))
    print(native.selected_variant())


if __name__ == "__main__":
    main(*sys.argv[1:])
