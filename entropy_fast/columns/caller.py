"""Losses that a caller gives, run as the caller would run them, wherever in a probe they are run."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from entropy_fast.columns.candidates import Candidate
from entropy_fast.columns.given import LossFunction
from entropy_fast.columns.wanted import Wanted

__all__ = ["as_caller"]


def as_caller(wanted: Wanted, module: nn.Module) -> Wanted:
    """The same, with losses that see the model's train and eval flags and autocast as they are now.

    A trainer's loss may ask for them (what it divides by, under which name it logs), and a probe changes them for its passes.

    Args:
        wanted: what one call asks for.
        module: the model, not wrapped.
    """
    flags = [(part, part.training) for part in module.modules()]
    kinds = sorted({p.device.type for p in module.parameters()} - {"meta"})
    autocasts = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]

    @contextlib.contextmanager
    def state() -> Iterator[None]:
        inside = [(part, part.training) for part, _ in flags]
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in autocasts:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            try:
                for part, training in flags:
                    part.training = training
                yield
            finally:
                for part, training in inside:
                    part.training = training

    def wrapped(loss: LossFunction) -> LossFunction:
        def run(logprobs: Tensor, entropies: Tensor) -> Tensor:
            with state():
                return loss(logprobs, entropies)

        return run

    update = (
        wrapped(wanted.update) if callable(wanted.update) and not isinstance(wanted.update, Tensor) else wanted.update
    )
    candidates = {
        name: wrapped(given) if callable(given) and not isinstance(given, (Tensor, Candidate)) else given
        for name, given in wanted.candidates.items()
    }
    return dataclasses.replace(wanted, update=update, candidates=candidates)
