"""Compile every Triton kernel for GPUs that are not here, and print what each one spills, as JSON.

A program of its own, for its process must not have TRITON_INTERPRET set when triton is imported.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from entropy_fast.kernels import token_logprobs as kernels

TARGETS = {
    "cuda-80": GPUTarget("cuda", 80, 32),
    "cuda-90": GPUTarget("cuda", 90, 32),
    "cuda-100": GPUTarget("cuda", 100, 32),
    "hip-gfx942": GPUTarget("hip", "gfx942", 64),
}
ACCUMULATORS = {"fp32": "fp32", "bf16": "fp32", "fp16": "fp32", "fp64": "fp64"}


def cuobjdump() -> Path:
    backend = Path(triton.__file__).parent / "backends" / "nvidia"
    return next(path for path in sorted(backend.rglob("cuobjdump*")) if path.is_file())


def spilled(compiled: triton.compiler.CompiledKernel, target: str) -> int:
    """Bytes of stack on NVIDIA (that is where spills go), spilled vector registers on AMD."""
    if target.startswith("hip"):
        return int(re.search(r"\.vgpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])[1])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(cuobjdump()), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


def main() -> None:
    report = {}
    for element, accumulator in ACCUMULATORS.items():
        common = {"logits": f"*{element}", "targets": "*i64"}
        sizes = {"vocabulary": "i32", "row_stride": "i64", "ignore_index": "i32"}
        signatures = {
            kernels.token_logprobs_forward_kernel: {"logprob": f"*{accumulator}", "lse": "*fp64"},
            kernels.token_logprobs_backward_kernel: {
                "lse": "*fp64",
                "grad_logprob": f"*{accumulator}",
                "grad_lse": "*fp64",
                "grad_logits": f"*{element}",
            },
        }
        constants = {
            "ACCUMULATOR": triton.language.float64 if accumulator == "fp64" else triton.language.float32,
            "BLOCK": kernels.BLOCK,
        }
        for kernel, own in signatures.items():
            signature = {**common, **own, **sizes, **dict.fromkeys(constants, "constexpr")}
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            for name, target in TARGETS.items():
                compiled = triton.compile(source, target=target, options={"num_warps": kernels.NUM_WARPS})
                report[f"{kernel.fn.__name__} {element} {name}"] = spilled(compiled, name)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
