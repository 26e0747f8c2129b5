"""token_logprobs: one pass over the logits, limited by how fast they can be read."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.kernels import rivals, third_party
from benchmarks.kernels.problem import BACKENDS, Contender, Problem, Results
from benchmarks.kernels.specs import Spec
from entropy_fast import reference
from entropy_fast.ops import token_logprobs

CHECKED_ROWS = 64  # in float64 at a time
# Of each element: compare with the maximum, subtract it, exponentiate, add; for the entropy also multiply and add.
OPERATIONS, OPERATIONS_WITH_ENTROPY = 4, 6


def named(results: Tensor | tuple[Tensor, Tensor]) -> Results:
    """What a rival returned, under the names of the op's results."""
    return (
        {"logprob": results} if isinstance(results, Tensor) else dict(zip(("logprob", "entropy"), results, strict=True))
    )


def moved_bytes(spec: Spec) -> int:
    """Logits and targets in; logprob, lse and the entropy out."""
    scalar = max(4, spec.torch_dtype.itemsize)
    per_row = 8 + scalar + 8 + 8 * spec.entropy
    return spec.rows * (spec.vocabulary * spec.torch_dtype.itemsize + per_row)


def problem(spec: Spec, device: str, compiles: bool) -> Problem:
    """Random logits with a standard deviation of 3."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(spec.rows, spec.vocabulary, generator=generator) * 3).to(device, spec.torch_dtype)
    targets = torch.randint(spec.vocabulary, (spec.rows,), generator=generator).to(device)

    def expected() -> Results:
        parts = [
            reference.token_logprobs(z.double(), t, want_entropy=spec.entropy)
            for z, t in zip(logits.split(CHECKED_ROWS), targets.split(CHECKED_ROWS), strict=True)
        ]
        names = ("logprob", "lse", "entropy")[: 2 + spec.entropy]
        return {name: torch.cat([part[i] for part in parts]) for i, name in enumerate(names)}

    def run_backend(name: str) -> Results:
        found = token_logprobs(logits, targets, want_entropy=spec.entropy, backend=name)
        return {key: value for key, value in found._asdict().items() if value is not None}

    def run_limit() -> Results:
        return {"sum": logits.sum()}

    eager = rivals.logprobs_and_entropy if spec.entropy else rivals.logprobs
    contenders = [Contender(name, "backend", lambda name=name: run_backend(name)) for name in BACKENDS[device]]
    contenders.append(Contender("eager", "rival", lambda: named(eager(logits, targets)), eager.__doc__))
    missing = {}
    if compiles:
        compiled = rivals.compiled(eager)
        contenders.append(
            Contender("compiled", "rival", lambda: named(compiled(logits, targets)), "torch.compile of eager")
        )
    if not spec.entropy:
        function = rivals.cross_entropy
        contenders.append(
            Contender("cross_entropy", "rival", lambda: named(function(logits, targets)), function.__doc__)
        )
        trl = third_party.trl_selective_log_softmax(device)
        if isinstance(trl, str):
            missing["TRL"] = trl
        else:
            contenders.append(
                Contender("TRL", "rival", lambda: named(trl(logits, targets)), "selective_log_softmax of TRL")
            )
    contenders.append(Contender("z.sum()", "limit", run_limit, "a plain sum of the logits, which reads them once"))
    per_element = OPERATIONS_WITH_ENTROPY if spec.entropy else OPERATIONS
    return Problem(
        contenders,
        expected,
        lambda: None,
        moved_bytes(spec),
        spec.rows * spec.vocabulary * per_element,
        "z.sum()",
        missing,
    )
