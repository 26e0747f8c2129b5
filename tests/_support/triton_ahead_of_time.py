"""Compile every Triton kernel for GPUs that are not here, and print what each one takes there, as JSON.

A program of its own, for its process must not have TRITON_INTERPRET set when triton is imported. The argument ``most``
leaves out what says little beside the rest (`says_little`); further ones have to be part of a label. The report is
``{"kernel mode target": {"spilled": bytes or registers, "registers": per thread, "shared": bytes}}``.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from entropy_fast.kernels import linear_token_logprobs, precondition_accumulate, token_logprobs
from entropy_fast.ops.accumulation_table import CHUNK

TARGETS = {
    "cuda-80": GPUTarget("cuda", 80, 32),
    "cuda-90": GPUTarget("cuda", 90, 32),
    "cuda-100": GPUTarget("cuda", 100, 32),
    "hip-gfx942": GPUTarget("hip", "gfx942", 64),
}
ACCUMULATORS = {"fp32": "fp32", "bf16": "fp32", "fp16": "fp32", "fp64": "fp64"}
ELEMENTS = {
    "fp32": triton.language.float32,
    "bf16": triton.language.bfloat16,
    "fp16": triton.language.float16,
    "fp64": triton.language.float64,
}
KINDS = {"fp32": 0, "bf16": 1, "fp16": 2, "bf16-moments": 3, "fp64": 4}


class Compilation(NamedTuple):
    """One kernel in one mode: types of its arguments, and values of those that are constants."""

    mode: str
    kernel: Any
    arguments: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int] = {}  # noqa: RUF012 - never changed


def of_token_logprobs(element: str, entropy: bool) -> Iterator[Compilation]:
    accumulator = ACCUMULATORS[element]
    constants = {
        "ACCUMULATOR": ELEMENTS[accumulator],
        "HAS_ENTROPY": entropy,
        "BLOCK": token_logprobs.BLOCK,
        **({} if entropy else {"entropy": None, "grad_entropy": None}),
    }
    types = {
        **dict.fromkeys(("logits", "grad_logits"), f"*{element}"),
        **dict.fromkeys(("logprob", "grad_logprob"), f"*{accumulator}"),
        **dict.fromkeys(("lse", "grad_lse", "entropy", "grad_entropy"), "*fp64"),
        "targets": "*i64",
        "vocabulary": "i32",
        "row_stride": "i64",
        "grad_row_stride": "i64",
        "ignore_index": "i32",
    }
    mode = f"{element}{' entropy' if entropy else ''}"
    for kernel in (token_logprobs.token_logprobs_forward_kernel, token_logprobs.token_logprobs_backward_kernel):
        yield Compilation(mode, kernel, types, constants, {"num_warps": token_logprobs.NUM_WARPS})


def of_linear_token_logprobs(element: str, everything: bool) -> Iterator[Compilation]:
    """With ``everything``: bias, softcap and both unit gradients; else none of these but one unit gradient."""
    accumulator = ACCUMULATORS[element]
    kernels = linear_token_logprobs
    tiles = kernels.tiles_for(ELEMENTS[element].primitive_bitwidth)
    types = {
        **dict.fromkeys(("hidden", "weight", "bias"), f"*{element}"),
        **dict.fromkeys(("workspace", "partial", "logprob", "unit_logprob", "unit_entropy"), f"*{accumulator}"),
        **dict.fromkeys(("lse", "entropy", "state"), "*fp64"),
        **dict.fromkeys(("targets", "chosen"), "*i64"),
        **dict.fromkeys(("rows", "units", "vocabulary", "token_tiles"), "i32"),
        **dict.fromkeys(("hidden_stride", "weight_stride", "part_stride", "workspace_stride"), "i32"),
    }
    constants = {
        "ACCUMULATOR": ELEMENTS[accumulator],
        "FACTOR": ELEMENTS[element],
        "UPCAST": element == accumulator,
        "SOFTCAP": 30.0 if everything else 0.0,
        "ROW_STATE": kernels.ROW_STATE,
        "ROWS": tiles.rows,
        "TOKENS": tiles.tokens,
        "UNITS": tiles.units,
        "TILES_BLOCK": kernels.TILES_BLOCK,
        **({} if everything else {"bias": None, "entropy": None, "unit_entropy": None}),
    }
    mode = f"{element}{' bias softcap entropy' if everything else ''}"
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    yield Compilation(mode, kernels.logits_kernel, types, {**constants, "DEPTH": tiles.depth}, options)
    yield Compilation(mode, kernels.unit_gradients_kernel, types, {**constants, "DEPTH": tiles.unit_depth}, options)
    if everything and element == accumulator:
        yield Compilation(mode, kernels.row_kernel, types, constants)


def of_precondition_accumulate() -> Iterator[Compilation]:
    kernels = precondition_accumulate
    types = {
        **dict.fromkeys(("entries", "x_scale", "g_scale"), "i64"),
        "entries": "*i64",
        "factors": "*fp64",
        "owners": "*i32",
        **dict.fromkeys(("partial_dots", "dots"), "*fp64"),
        **dict.fromkeys(("tensors", "chunks"), "i32"),
    }
    masks = {name: 1 << kind for name, kind in KINDS.items()} | {"all kinds": 31}
    for mode, mask in masks.items():
        constants = {"KINDS": mask, "UPDATE": True, "CHUNK": CHUNK, "BLOCK": kernels.BLOCK}
        yield Compilation(
            mode, kernels.precondition_accumulate_kernel, types, constants, {"num_warps": kernels.NUM_WARPS}
        )
    yield Compilation("", kernels.sum_dots_kernel, types, {"BLOCK": kernels.DOTS_BLOCK})


def compilations() -> Iterator[Compilation]:
    for element in ACCUMULATORS:
        for entropy in (False, True):
            yield from of_token_logprobs(element, entropy)
            yield from of_linear_token_logprobs(element, entropy)
    yield from of_precondition_accumulate()


def says_little(label: str) -> bool:
    """Whether another label takes the same path and at least as many registers.

    Matrix products are compiled otherwise for each target, and those with bias, softcap and entropy are the largest; all else
    differs between the targets of a vendor in the last step only. The kinds of the table are all in "all kinds", fp16 takes
    what bf16 takes, and entropy comes on top of what is done without it.
    """
    products = label.startswith(("logits_kernel", "unit_gradients_kernel"))
    if products and "entropy" in label:
        return "fp16" in label
    kinds = label.startswith("precondition_accumulate") and "all kinds" not in label
    without_entropy = label.startswith("token_logprobs") and "entropy" not in label
    return "fp16" in label or kinds or without_entropy or not label.endswith(("cuda-80", "hip-gfx942"))


def cuobjdump() -> Path:
    backend = Path(triton.__file__).parent / "backends" / "nvidia"
    return next(path for path in sorted(backend.rglob("cuobjdump*")) if path.is_file())


def usage(compiled: triton.compiler.CompiledKernel, target: str) -> dict[str, int]:
    """``spilled`` is bytes of stack on NVIDIA (that is where spills go), vector registers on AMD."""
    if target.startswith("hip"):
        assembly = compiled.asm["amdgcn"]
        spilled, registers = (
            int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1]) for name in ("vgpr_spill_count", "vgpr_count")
        )
        return {"spilled": spilled, "registers": registers, "shared": compiled.metadata.shared}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(cuobjdump()), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    spilled, registers = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("STACK", "REG"))
    # What the launch asks for; cuobjdump counts what is fixed in the code alone.
    return {"spilled": spilled, "registers": registers, "shared": compiled.metadata.shared}


def main() -> None:
    most = sys.argv[1:2] == ["most"]
    only = sys.argv[1 + most :]
    report = {}
    for mode, kernel, types, values, options in compilations():
        names = kernel.arg_names
        constants = {name: values[name] for name in names if name in values}
        signature = {name: "constexpr" if name in constants else types[name] for name in names}
        # In models, addresses, strides and numbers of hidden units are multiples of 16.
        aligned = [
            (index,)
            for index, name in enumerate(names)
            if signature[name][0] == "*" or name.endswith("_stride") or name == "units"
        ]
        source = ASTSource(kernel, signature, constants, {index: [["tt.divisibility", 16]] for index in aligned})
        for name, target in TARGETS.items():
            label = " ".join(filter(None, (kernel.fn.__name__, mode, name)))
            if all(part in label for part in only) and not (most and says_little(label)):
                report[label] = usage(triton.compile(source, target=target, options=options), name)
    print(json.dumps(report, indent=0))


if __name__ == "__main__":
    main()
