"""Run ``_native`` on a call file, without torch: started in an emulator, where importing torch would take minutes.

Arguments: the module's file, a call file, where to write the results. Prints the instruction set that was selected.
"""

from __future__ import annotations

import ctypes
import importlib.util
import struct
import sys
from pathlib import Path


def main(module: str, call: str, results: str) -> None:
    spec = importlib.util.spec_from_file_location("entropy_fast._native", module)
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)

    data = Path(call).read_bytes()
    element, rows, vocabulary, stride, ignore_index = struct.unpack_from("=5q", data)
    storage, scalar = (4, 8, 2, 2)[element], 8 if element == 1 else 4
    inputs = ctypes.create_string_buffer(data, len(data))
    logits = ctypes.addressof(inputs) + 40
    targets = logits + rows * stride * storage
    grad_logprob = targets + rows * 8
    grad_lse = grad_logprob + rows * scalar
    size = rows * (scalar + 8 + vocabulary * storage)
    outputs = ctypes.create_string_buffer(b"\xff" * size, size)
    logprob = ctypes.addressof(outputs)
    lse = logprob + rows * scalar
    shape = {
        "rows": rows,
        "vocabulary": vocabulary,
        "row_stride": stride,
        "ignore_index": ignore_index,
        "element_type": native.ElementType(element),
        "threads": 1,
    }
    native.token_logprobs_forward_cpu(logits=logits, targets=targets, logprob=logprob, lse=lse, **shape)
    native.token_logprobs_backward_cpu(
        logits=logits,
        targets=targets,
        lse=lse,
        grad_logprob=grad_logprob,
        grad_lse=grad_lse,
        grad_logits=lse + rows * 8,
        **shape,
    )
    Path(results).write_bytes(outputs.raw)
    print(native.selected_variant())


if __name__ == "__main__":
    main(*sys.argv[1:])
