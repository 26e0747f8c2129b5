"""Whether ranks hold replicas of one model and one optimizer: what a probe by all of them takes for granted."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from entropy_fast.context import ProbeContext
from entropy_fast.distributed.agreement import fingerprint, refuse_other_tensors, refuse_others
from entropy_fast.distributed.team import Team
from entropy_fast.step import OptimizerAtHand

__all__ = ["refuse_other_replicas", "replica_tensors"]


PARAMETERS, STATE, GRADIENT = "parameters of the model", "state of the optimizer", "gradient in .grad"


def refuse_other_replicas(team: Team, context: ProbeContext, optimizer: OptimizerAtHand) -> None:
    """Raise, on all ranks alike, unless options, parameters and optimizer states are the same on all of them.

    Of large tensors the sums of their bits are compared. A gradient is looked at where it is what the step is made of.

    Args:
        team: the ranks.
        context: of the probe.
        optimizer: as it was read.

    Raises:
        DistributedError: they are not; it names the rank and the first thing that differs.
    """
    if team.size == 1:
        return
    named = {name: tensor for _, name, tensor in replica_tensors(context, optimizer)}
    forms = {name: (str(tensor.dtype), list(tensor.shape)) for name, tensor in named.items()}
    refuse_others(
        team,
        {
            "options of the estimate": fingerprint(context.estimate.to_dict()),
            "options of the run": fingerprint(context.run.to_dict()),
            "learning rate": repr(context.step.learning_rate),
            "parameters or optimizer states (names, shapes, dtypes)": fingerprint(forms),
            "trainable parameters": fingerprint(context.registry.names),
        },
        fix="make the same call on all ranks, with replicas of one model and the optimizer of each.",
    )
    refuse_other_tensors(
        team,
        named,
        fix="probe replicas: parameters and optimizer states have to be the same on all ranks (sharded ones are not), and a "
        "gradient has to be the averaged one.",
    )


def replica_tensors(context: ProbeContext, optimizer: OptimizerAtHand) -> Iterator[tuple[str, str, Tensor]]:
    """All that a probe's numbers depend on in a model and its optimizer: of what kind each is, its name, and the tensor."""
    names = {id(p.tensor): p.name for p in context.registry.parameters}
    for name, parameter in context.registry.module.named_parameters():
        yield PARAMETERS, name, parameter
    if context.parted is not None:
        return  # every rank has states and gradients of parameters of its own
    for name, moments in sorted(optimizer.state.moments.items()):
        yield STATE, f"second moment of {name}", moments.second_moment
    if optimizer.live is not None:
        for owner, state in optimizer.live.state.items():
            for key, value in sorted(state.items()):
                if isinstance(value, Tensor) and id(owner) in names:
                    yield STATE, f"{key} of {names[id(owner)]}", value
    if context.next_step is not None and context.next_step.live is not None:
        for name, gradient in zip(context.registry.names, context.next_step.live, strict=True):
            if gradient is not None:
                yield GRADIENT, f"gradient of {name}", gradient
