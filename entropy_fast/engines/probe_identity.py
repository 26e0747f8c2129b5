"""What a probe is, in words and fingerprints: a checkpoint is gone on from by the very same one alone."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from entropy_fast._version import __version__
from entropy_fast.columns import Wanted
from entropy_fast.context import ProbeContext
from entropy_fast.distributed.agreement import fingerprint, sum_of_bits
from entropy_fast.engines.replicas import replica_tensors
from entropy_fast.rollouts import Rollouts
from entropy_fast.step import OptimizerAtHand

__all__ = ["probe_identity"]

# How long, where, and who waits: a probe is the same one whatever they are.
BESIDE_THE_POINT = ("checkpoint", "checkpoint_seconds", "rank_timeout", "when_busy")


def probe_identity(
    context: ProbeContext, optimizer: OptimizerAtHand, wanted: Wanted, batches: Mapping[str, Rollouts], engine: str
) -> dict[str, str]:
    """By what each text is of.

    Of parameters, optimizer states and gradients the sums of their bits are taken; of a function its type alone (what a loss
    says of the batch is compared when a sweep goes on).

    Args:
        context: of the probe.
        optimizer: as it was read.
        wanted: what is asked for beside the options.
        batches: by name.
        engine: its name.
    """
    found = {f"version of {name}": version for name, version in _versions()}
    found |= {"engine": engine, "device": context.device.type, "number of ranks": str(context.team.size)}
    for kind, options in (("estimate", context.estimate), ("run", context.run)):
        given = options.to_dict()
        found |= {f"{kind} option {name}": repr(own) for name, own in given.items() if name not in BESIDE_THE_POINT}
    found |= {name: fingerprint(batch) for name, batch in batches.items()}
    found["functionals, mask, update or scores"] = fingerprint(wanted)
    of_kinds: dict[str, list[Any]] = {}
    for kind, name, tensor in replica_tensors(context, optimizer):
        of_kinds.setdefault(kind, []).append((name, tensor.dtype, list(tensor.shape), sum_of_bits(tensor)))
    of_kinds["buffers of the model"] = [
        (name, own.dtype, list(own.shape), sum_of_bits(own)) for name, own in context.registry.module.named_buffers()
    ]
    found |= {kind: fingerprint(own) for kind, own in of_kinds.items()}
    found["settings of the optimizer"] = fingerprint(list(_settings(context, optimizer)))
    return found


def _versions() -> Iterator[tuple[str, str]]:
    yield "entropy_fast", __version__
    for name in ("torch", "transformers", "peft", "bitsandbytes"):  # that do the arithmetic
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


def _settings(context: ProbeContext, optimizer: OptimizerAtHand) -> Iterator[Any]:
    """Numbers of an optimizer that are no tensors of its state."""
    yield context.registry.names
    yield context.step.learning_rate
    yield optimizer.state.groups
    yield sorted(optimizer.state.group_of.items())
    for name, moments in sorted(optimizer.state.moments.items()):
        yield name, moments.step
        for field in dataclasses.fields(moments):
            value = getattr(moments, field.name)
            if isinstance(value, Tensor):
                yield field.name, sum_of_bits(value)
    if optimizer.live is not None:
        yield type(optimizer.live).__qualname__
        for group in optimizer.live.param_groups:
            yield sorted((key, repr(value)) for key, value in group.items() if key != "params")
