"""linear_token_logprobs_with_units: two matrix products of the size of the output layer, and nothing else if it goes well."""

from __future__ import annotations

import torch

from benchmarks.kernels import rivals, third_party
from benchmarks.kernels.problem import BACKENDS, Contender, Problem, Results
from benchmarks.kernels.specs import Spec
from entropy_fast import reference
from entropy_fast.ops import linear_token_logprobs_with_units

CHECKED_ROWS = 128  # in float64 at a time
GEMMS = "GEMMs"


def moved_bytes(spec: Spec) -> int:
    """Hidden states, output layer and targets in, once; logprob, lse, entropy and the unit gradients out."""
    item, scalar = spec.torch_dtype.itemsize, max(4, spec.torch_dtype.itemsize)
    read = item * spec.hidden * (spec.rows + spec.vocabulary) + 8 * spec.rows
    units = (1 + spec.entropy) * spec.rows * spec.hidden * scalar
    return read + spec.rows * (scalar + 8 + 8 * spec.entropy) + units


def problem(spec: Spec, device: str, compiles: bool) -> Problem:
    """Random hidden states and output layer, such that logits have a standard deviation of 3."""
    generator = torch.Generator().manual_seed(0)
    dtype, n, v, h = spec.torch_dtype, spec.rows, spec.vocabulary, spec.hidden
    hidden = torch.randn(n, h, generator=generator).to(device, dtype)
    weight = (torch.randn(v, h, generator=generator) * (3 / h**0.5)).to(device, dtype)
    targets = torch.randint(v, (n,), generator=generator).to(device)

    def expected() -> Results:
        weight64 = weight.double()
        parts = [
            reference.linear_token_logprobs(
                part.double(), weight64, t, want_entropy=spec.entropy, unit_gradients=True
            )._asdict()
            for part, t in zip(hidden.split(CHECKED_ROWS), targets.split(CHECKED_ROWS), strict=True)
        ]
        return {key: torch.cat([p[key] for p in parts]) for key, value in parts[0].items() if value is not None}

    def run_backend(name: str) -> Results:
        found = linear_token_logprobs_with_units(hidden, weight, targets, want_entropy=spec.entropy, backend=name)
        return {key: value for key, value in found._asdict().items() if value is not None}

    eager = rivals.linear_logprobs_and_entropy if spec.entropy else rivals.linear_logprobs
    inputs = (hidden, weight, targets)
    backends = [Contender(name, "backend", lambda name=name: run_backend(name)) for name in BACKENDS[device]]
    contenders = [
        *backends,
        Contender("eager", "rival", lambda: rivals.with_gradient(eager, *inputs), eager.__doc__),
        Contender(
            "eager, chunked",
            "rival",
            lambda: rivals.with_gradient_in_chunks(eager, *inputs),
            "eager, 128 rows at a time",
        ),
    ]
    if compiles:
        compiled = rivals.compiled(eager)
        contenders.append(
            Contender("compiled", "rival", lambda: rivals.with_gradient(compiled, *inputs), "torch.compile of eager")
        )
    missing = {}
    if not spec.entropy:
        function = rivals.linear_cross_entropy
        contenders.append(
            Contender("cross_entropy", "rival", lambda: rivals.with_gradient(function, *inputs), function.__doc__)
        )
        for name, other in (
            (
                "cut-cross-entropy",
                third_party.cut_cross_entropy(device) if compiles else "left out, as is torch.compile",
            ),
            ("Liger", third_party.liger(device)),
        ):
            if isinstance(other, str):
                missing[name] = other
            else:
                contenders.append(
                    Contender(
                        name, "rival", lambda other=other: rivals.with_gradient(other, *inputs), other.__doc__ or ""
                    )
                )
    if spec.timed:
        contenders += _limits(spec, hidden, weight)
    products = 2 + spec.entropy
    return Problem(contenders, expected, lambda: None, moved_bytes(spec), 2 * products * n * h * v, GEMMS, missing)


def _limits(spec: Spec, hidden: torch.Tensor, weight: torch.Tensor) -> list[Contender]:
    logits = hidden.new_empty(spec.rows, spec.vocabulary)
    gradient = torch.empty_like(hidden)

    def products() -> Results:
        torch.mm(hidden, weight.t(), out=logits)
        for _ in range(1 + spec.entropy):
            torch.mm(logits, weight, out=gradient)
        return {}

    def allocating() -> Results:
        z = hidden @ weight.t()
        for _ in range(1 + spec.entropy):
            z @ weight
        return {}

    return [
        Contender(
            GEMMS, "limit", products, f"{2 + spec.entropy} products of the same shapes into memory that is there"
        ),
        Contender("GEMMs, allocating", "limit", allocating, "the same as `z = h @ W.t(); z @ W`, with fresh results"),
    ]
